"""Runs GPU kernels without a GPU: every thread of a block is a Python generator, every PTX instruction a function.

Slow (a block of 256 threads takes about a second), but it is the kernel's own source that runs, with its barriers,
shuffles and addresses: what a compile alone can't check. The source is rewritten in one way: where a function may have
to wait for other threads, its call becomes a `yield from`. So threads take turns, and that all of them wait is seen at
once. Integers are Python's, cut where a kernel says int32 or int64, as Numba has them: sums of 32 bits are of 64.

What they run on is in simt_world.py, the instructions in simt_instructions.py and simt_fragments.py.

Kernels run block after block, or `together` where blocks wait for each other. With an `order`, a number, warps proceed
and copies arrive at random speeds, the same ones for the same number: what lacks a barrier shows in some order.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import random
import re
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from simt_fragments import fragment_function
from simt_instructions import INSTRUCTIONS, Cuda, wait_for_copies
from simt_world import NUMBERS, Block, Pointer, Steps, Thread, Warp, World, now

from numbainfer.gpu import arithmetic, pipeline, ptx
from numbainfer.gpu.compile import Kernel

TIMEOUT = 300  # seconds of a launch
PATIENCE = 100  # rounds in which all threads asked for something in vain

# --- from a kernel to generators ---------------------------------------------------------------------------------


def _emulated(value: Any, made: dict[int, Any]) -> Any:
    """A kernel's global or closure value, for Python: device functions and instructions as functions."""
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, type):
        return NUMBERS.get(value, value)
    name = getattr(value, "__name__", "")
    if name in INSTRUCTIONS and value in [getattr(module, name, None) for module in (arithmetic, ptx, pipeline)]:
        return INSTRUCTIONS[name]
    codegen = value._defn.__globals__.get("codegen") if hasattr(value, "_defn") else None
    emitted = inspect.getclosurevars(codegen).nonlocals if codegen else {}
    if name == "wait" and "text" in emitted:
        return wait_for_copies(int(re.search(r"wait_group (\d+)", emitted["text"])[1]))
    if name == "dealt" and "text" in emitted:
        return lambda: None  # registers
    if "body" in emitted:  # over_fragment made it
        return fragment_function(emitted["body"], emitted["arguments"], emitted["result"])
    function = getattr(value, "py_func", None)
    if function is None:
        return value
    made[id(value)] = python_function(function, made)
    return made[id(value)]


class _Waits(ast.NodeTransformer):
    """Calls of what may wait become `yield from`."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        function: Any = None
        if isinstance(node.func, ast.Name):
            function = self.known.get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            function = getattr(self.known.get(node.func.value.id), node.func.attr, None)
        return ast.copy_location(ast.YieldFrom(node), node) if inspect.isgeneratorfunction(function) else node


def python_function(function: Any, made: dict[int, Any]) -> Any:
    """The function with everything that it names emulated; a generator function if it may wait."""
    code, names = function.__code__, {*function.__code__.co_names}
    found = {name: value for name, value in function.__globals__.items() if name in names}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    found.update((name, cell.cell_contents) for name, cell in cells)
    known = {name: Cuda() if name == "cuda" else _emulated(value, made) for name, value in found.items()}

    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree.body[0].decorator_list = []
    ast.increment_lineno(_Waits(known).visit(tree), code.co_firstlineno - 1)
    space = {**known, "__builtins__": builtins}
    exec(compile(ast.fix_missing_locations(tree), code.co_filename, "exec", dont_inherit=True), space)
    result = space.pop(function.__name__)
    if function.__name__ in known:
        space[function.__name__] = known[function.__name__]
    return result


@cache
def _body(kernel: Kernel) -> Callable:
    return python_function(kernel.function, {})


def _steps(body: Callable, arguments: list) -> Steps:
    if inspect.isgeneratorfunction(body):
        yield from body(*arguments)
    else:
        body(*arguments)
    now.world.progress += 1


# --- launching ---------------------------------------------------------------------------------------------------


class DeadlockError(Exception):
    """All threads wait for each other, or a launch takes too long."""


def _report(why: str, threads: list[Thread]) -> DeadlockError:
    groups: dict[tuple, list[int]] = defaultdict(list)
    for thread in threads:
        if thread.steps.gi_frame is not None:
            index = thread.block.index
            groups[index.z, index.y, index.x, thread.where()].append(thread.index)
    lines = [f"block {key[2::-1]}, threads {_ranges(indices)}: {key[3]}" for key, indices in groups.items()]
    return DeadlockError("\n".join([why, *lines]))


def _ranges(numbers: list[int]) -> str:
    edges = np.flatnonzero(np.diff(numbers) != 1) + 1
    return ", ".join(f"{run[0]}-{run[-1]}" for run in np.split(np.array(numbers), edges))


def _run(threads: list[Thread]) -> None:
    """In rounds: in each, whoever can goes on until it has to wait."""
    now.world.ready = list(threads)
    deadline, vain, dice = time.monotonic() + TIMEOUT, 0, now.world.dice
    while now.world.ready:
        turn, now.world.ready = now.world.ready, []
        progress = now.world.progress
        if dice is not None:
            turn = list(_postpone(turn, dice))
        for thread in turn:
            now.thread = thread
            try:
                again = next(thread.steps)
            except StopIteration:
                continue
            if again:
                now.world.ready.append(thread)
        vain = 0 if now.world.progress != progress else vain + 1
        if vain == (PATIENCE if dice is None else 50 * PATIENCE):
            raise _report("deadlock: all threads wait", threads)
        if time.monotonic() > deadline:
            raise _report(f"not done after {TIMEOUT} seconds", threads)
    if any(thread.steps.gi_frame is not None for thread in threads):
        raise _report("deadlock: all threads wait", threads)


def _postpone(turn: list[Thread], dice: random.Random) -> Iterator[Thread]:
    """Those whose turn it is after all: each warp has a pace, for a while."""
    warps = {id(thread.warp): thread.warp for thread in turn}
    for warp in warps.values():
        if warp.number >= 0 and dice.random() < 0.02:
            warp.pace = dice.choice((0.02, 0.3, 1.0, 1.0))
    chosen = [key for key, warp in warps.items() if dice.random() < warp.pace]
    dice.shuffle(chosen)
    by_warp: dict[int, list[Thread]] = defaultdict(list)
    for thread in turn:
        by_warp[id(thread.warp)].append(thread)
    late = set(warps) - set(chosen)
    now.world.ready += [thread for thread in turn if id(thread.warp) in late]
    for key in chosen:
        yield from by_warp[key]


def launch(
    kernel: Kernel,
    grid: Any,
    *arguments: Any,
    shared: int = 0,
    together: bool = False,
    cluster: int = 1,
    order: int | None = None,
    others: list[np.ndarray] | None = None,
) -> None:
    """Runs kernel(*arguments) on `grid` blocks; arrays are written in place, None is a null pointer.

    others: arrays that are no arguments, but pointed at by what is in one. Blocks are in no clusters.
    """
    assert cluster == 1
    body = _body(kernel)
    taken: list[Any] = []
    held = list(others or ())
    for value, kind in zip(arguments, kernel.parameters, strict=True):
        if kind.endswith("p"):
            held += [] if value is None else [value]
            flat = None if value is None else np.asarray(value).reshape(-1)
            taken.append(Pointer(flat.view(np.uint16) if flat is not None and flat.dtype == np.float16 else flat))
        else:
            taken.append(np.float32(value) if kind == "f32" else int(value))

    x, y, z = (*(grid if isinstance(grid, tuple) else (grid,)), 1, 1)[:3]
    blocks = [Block((x, y, z), index[::-1], kernel.threads, shared) for index in np.ndindex(z, y, x)]
    for group in [blocks] if together else [[block] for block in blocks]:
        now.world = World()
        now.world.holds(held)
        now.world.dice = None if order is None else random.Random(order)
        threads = []
        for block in group:
            warps = [Warp(number) for number in range(-(-kernel.threads // 32))]
            for i in range(kernel.threads):
                threads.append(Thread(block, warps[i // 32], i))
                threads[-1].steps = _steps(body, taken)
        with np.errstate(all="ignore"):
            _run(threads)
