"""How operators are run makes no difference to their bits: threads, capture and replay, one call after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import open_machine
from machine import Array, Machine, normal
from numpy.testing import assert_array_equal

from numbainfer.device import Device
from numbainfer.errors import NumbaInferError
from numbainfer.quantization import Matrix, QuantizedMatrix, QuantizedRows
from numbainfer.registry import CONTRACTS, bind


def results(machine: Machine) -> dict[str, Array]:
    """The bits that every operator gives for some inputs, in each of its forms; keys begin with its name.

    Sizes make several tasks of each launch, so that threads have something to share.
    """
    found: dict[str, Array] = {}
    put, run = machine.put, machine.run

    def keep(name: str, *outputs: Any) -> None:
        for i, out in enumerate(outputs):
            parts = machine.get_rows(out) if isinstance(out, QuantizedRows) else (machine.get(out),)
            for j, part in enumerate(parts):
                found[f"{name} {i}{j}"] = np.ascontiguousarray(part).view(np.uint8)

    tokens, width = 11, 384
    x, weight = put(normal(1, tokens, width)), put(normal(2, width))
    table = machine.matrix(normal(3, 97, width), 64)
    plain = [Matrix(put(normal(3, 97, width).astype(dtype))) for dtype in ("float32", "float16")]

    def outputs(wide: int = width) -> list[tuple[str, Any]]:
        quantized = [(f" quantized {planes}", machine.rows(tokens, wide, 64, planes)) for planes in (1, 2)]
        return [("", machine.out(tokens, wide)), *quantized]

    for form, out in outputs():
        run("rmsnorm", x, weight, 1e-5, out)
        keep("rmsnorm" + form, out)
    for form, out in outputs(width // 2):
        run("swiglu", x, out)
        keep("swiglu" + form, out)
    for i, matrix in enumerate([table, *plain]):
        run("embedding", put(np.arange(90, 90 + tokens, dtype=np.int32)), matrix, out := machine.out(tokens, width))
        keep(f"embedding {i}", out)
    for name in ("add", "softmax"):
        run(name, x, *([x] if name == "add" else []), out := machine.out(tokens, width))
        keep(name, out)
    run("argmax", x, out := machine.out(tokens, dtype=np.int32))
    keep("argmax", out)
    there = put(np.arange(tokens, dtype=np.int32))
    history = put(np.zeros((4, tokens), np.int32))
    run("greedy", x, out := machine.out(tokens, dtype=np.int32), there, history)
    keep("greedy", out, there, history)
    run("top_k", x, out := machine.out(tokens, 9), indices := machine.out(tokens, 9, dtype=np.int32))
    keep("top_k", out, indices)
    quantized = [machine.rows(tokens, width, 64, planes) for planes in (1, 2)]
    for rows in quantized:
        run("quantize", x, rows)
        keep(f"quantize {rows.planes}", rows)
    codes, scales = machine.out(700, width, dtype=np.int8), machine.out(700, width // 64, dtype=np.float16)
    values = normal(4, 700, width)
    values[::9, 5] = np.nan
    run("quantize_matrix", put(values), QuantizedMatrix(codes, scales, 64), faults := put(np.zeros(2, np.int32)))
    good = ~np.isnan(values).any(axis=1)  # what the faulty rows hold means nothing
    keep("quantize_matrix", machine.get(codes)[good], machine.get(scales)[good], faults)
    for some in (1, 3, tokens):
        for rows in quantized:
            weight = machine.matrix(normal(5, 700, width), 64)
            run("linear", rows.first(some), weight, None, None, out := machine.out(some, 700))
            keep(f"linear int8 {some} {rows.planes}", out)
        for matrix in plain:
            run("linear", x[:some], matrix, put(normal(6, 97)), None, out := machine.out(some, 97))
            keep(f"linear {matrix.data.dtype} {some}", out)

    experts, choice = 6, machine.out(tokens, 2, dtype=np.int32)
    run("route", put(normal(10, tokens, experts)), 1, choice, shares := machine.out(tokens, 2))
    keep("route", choice, shares)
    starts, source = machine.out(experts + 1, dtype=np.int32), machine.out(2 * tokens, dtype=np.int32)
    run("group_by_expert", choice, starts, source, places := machine.out(tokens, 2, dtype=np.int32))
    keep("group_by_expert", starts, source, places)
    int8, exact = machine.matrix(normal(11, experts * 40, width), 64), Matrix(put(normal(11, experts * 40, width)))
    for mixture, rows in [(int8, quantized[0]), (int8, quantized[1]), (exact, x)]:
        run("linear_experts", rows, mixture, starts, source, mixed := machine.out(2 * tokens, 40))
        keep(f"linear_experts {getattr(rows, 'planes', 0)}", mixed)
    run("combine", mixed, places, shares, None, None, put(normal(12, tokens, 40)), out := machine.out(tokens, 40))
    keep("combine", out)

    heads, kv_heads, head_dim = 16, 4, 20  # 320 values, which groups of 64 divide
    qkv = put(normal(7, tokens, (heads + 2 * kv_heads) * head_dim))
    angle = np.arange(200)[:, None] * 0.5 ** np.arange(head_dim // 2)
    cos, sin = (put(f(angle).astype(np.float32)) for f in (np.cos, np.sin))
    positions, sequences = put(np.arange(60, 60 + tokens, dtype=np.int32)), put(np.zeros(tokens, np.int32))
    pages = [put(normal(8 + i, 2, kv_heads, 64, head_dim).astype(np.float16)) for i in range(2)]
    page_table, norm = put(np.array([[1, 0]], np.int32)), put(normal(9, head_dim))
    run("rope_and_store", qkv, heads, norm, norm, 1e-5, positions, sequences, cos, sin, *pages, page_table)
    keep("rope_and_store", qkv, *pages)
    step = (qkv, heads, 0.2, 0, positions, sequences, *pages, page_table)
    for form, out in outputs(heads * head_dim):
        run("attention", *step, out)
        keep("attention" + form, out)
    run("rope", qkv, heads + 2 * kv_heads, positions, cos, sin)
    keep("rope", qkv)
    return found


def assert_same_bits(actual: dict[str, Array], expected: dict[str, Array]) -> None:
    assert actual.keys() == expected.keys()
    for name, bits in expected.items():
        assert_array_equal(actual[name], bits, err_msg=name)


@pytest.fixture
def opened(kind: str):
    """Opens machines of the device and closes them."""
    machines: list[Machine] = []

    def opener(threads: int | None = None, captured: bool = False) -> Machine:
        machines.append(open_machine(kind, threads, captured))
        return machines[-1]

    yield opener
    for machine in machines:
        machine.close()


def test_every_operator_takes_part(opened: Callable[..., Machine]) -> None:
    assert {name.split()[0] for name in results(opened())} == set(CONTRACTS)


def test_results_do_not_depend_on_the_number_of_threads(opened: Callable[..., Machine], kind: str) -> None:
    if kind != "cpu":
        pytest.skip("threads are the CPU's")
    expected = results(opened(threads=1))
    for _ in range(5):  # tasks go to other workers each time
        assert_same_bits(results(opened(threads=2)), expected)


def test_replay_gives_the_bits_of_eager(opened: Callable[..., Machine]) -> None:
    assert_same_bits(results(opened(captured=True)), results(opened()))


def test_results_are_the_same_every_time(opened: Callable[..., Machine]) -> None:
    machine = opened()
    expected = results(machine)
    for _ in range(3):
        assert_same_bits(results(machine), expected)


def test_a_program_runs_when_told_in_order_and_again(machine: Machine) -> None:
    ops = machine.ops
    x, y, out = machine.put(normal(1, 33, 100)), machine.put(normal(2, 33, 100)), machine.out(33, 100)
    with ops.stream.capture() as program:
        ops.add(x, y, x)  # each reads what the one before wrote
        ops.add(x, y, y)
        ops.softmax(y, out)
    assert np.isnan(machine.get(out)).all(), "capturing ran a launch"
    a, b = normal(1, 33, 100), normal(2, 33, 100)
    for _ in range(20):
        a = a + b
        b = a + b
        program.run()
    assert_array_equal(machine.get(x), a)
    assert_array_equal(machine.get(y), b)
    replayed = machine.get(out)
    ops.softmax(y, out)
    assert_array_equal(machine.get(out), replayed)


def test_a_program_reads_its_arrays_when_it_runs(machine: Machine) -> None:
    """Positions and tokens change between replays; so does anything else that an array holds."""
    ops = machine.ops
    x, out = machine.put(normal(1, 2, 40)), machine.out(2, dtype=np.int32)
    with ops.stream.capture() as program:
        ops.argmax(x, out)
    for peak in (3, 39, 0):
        host = np.zeros((2, 40), np.float32)
        host[:, peak] = 1
        ops.add(machine.put(host), machine.put(np.zeros((2, 40), np.float32)), x)
        program.run()
        assert machine.get(out).tolist() == [peak, peak]


def test_programs_and_eager_launches_share_a_stream(machine: Machine) -> None:
    """Scratch that grows for a later launch leaves an earlier program its own."""
    ops = machine.ops
    x, weight = machine.put(normal(1, 3, 64)), machine.put(normal(2, 64))
    rows = machine.rows(3, 64, 32)
    with ops.stream.capture() as program:
        ops.rmsnorm(x, weight, 1e-5, rows)
    big = machine.rows(2, 8192, 32)
    ops.rmsnorm(machine.put(normal(3, 2, 8192)), machine.put(normal(4, 8192)), 1e-5, big)
    program.run()
    replayed = machine.get_rows(rows)
    ops.rmsnorm(x, weight, 1e-5, rows)
    for a, b in zip(replayed, machine.get_rows(rows), strict=True):
        assert_array_equal(a, b)


def test_a_failed_capture_leaves_the_stream_eager(machine: Machine) -> None:
    ops = machine.ops
    x, out = machine.put(normal(1, 2, 40)), machine.out(2, 40)
    with pytest.raises(ValueError, match="differ"), ops.stream.capture():
        ops.add(x, x, machine.out(2, 41))
    ops.add(x, x, out)
    assert_array_equal(machine.get(out), 2 * normal(1, 2, 40))


def test_no_tokens_are_no_work(machine: Machine) -> None:
    empty = machine.put(np.empty((0, 32), np.float32))
    machine.run("rmsnorm", empty, machine.put(normal(1, 32)), 1e-5, machine.out(0, 32))
    machine.run("linear", empty, Matrix(machine.put(normal(2, 5, 32))), None, None, machine.out(0, 5))
    out = machine.out(1, 32)  # the stream still works
    machine.run("add", machine.put(normal(1, 1, 32)), machine.put(normal(1, 1, 32)), out)
    assert_array_equal(machine.get(out), 2 * normal(1, 1, 32))


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_impossible_thread_counts_are_refused(threads: int) -> None:
    with pytest.raises(NumbaInferError, match=f"--threads {threads}: this machine offers 1 to"):
        bind(Device("cpu"), threads)


def test_arrays_that_kernels_cannot_read_are_refused() -> None:
    """A stride or a dtype that a pointer does not carry would be read as something else."""
    machine = open_machine("cpu")
    x, out = normal(1, 4, 32), np.empty((4, 32), np.float32)
    for wrong in (np.asfortranarray(x), normal(1, 4, 64)[:, ::2], normal(1, 4, 64)[:, :32], x.astype(np.float64)):
        with pytest.raises(ValueError, match="kernels take no"):
            machine.run("add", wrong, x, out)


def test_scalars_of_numpy_count_as_what_they_are() -> None:
    machine = open_machine("cpu")
    x, weight, one, two = normal(1, 3, 32), normal(2, 32), np.empty((3, 32), np.float32), np.empty((3, 32), np.float32)
    machine.run("rmsnorm", x, weight, 0.25, one)
    for eps in (np.float32(0.25), np.float64(0.25)):
        machine.run("rmsnorm", x, weight, eps, two)
        assert_array_equal(two, one)


def test_programs_are_timed_one_by_one(machine: Machine) -> None:
    """What bench --profile rests on: as many times as programs, which have run once, in order."""
    ops = machine.ops
    x, y = machine.put(np.ones((4, 256), np.float32)), machine.put(np.ones((4, 256), np.float32))
    programs = []
    for _ in range(150):  # more than a GPU's queue takes at once
        with ops.stream.capture() as program:
            ops.add(x, y, x)
        programs.append(program)
    seconds = ops.stream.time(programs)
    assert len(seconds) == 150
    assert all(0 < each < 1 for each in seconds)
    assert (machine.get(x) == 151).all()
