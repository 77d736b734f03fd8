"""Where a step's time goes: every operator timed by itself, beside the bytes that it has to move.

The model is walked once with each operator captured as a program of its own. These run in the order of the walk, so
that caches are as in the real step, and the device's stream times each. What capturing all of them as one program saves
(on the CPU a few microseconds an operator, on a GPU the gaps between kernels) shows in the last row: that step. On a
GPU a step of one token may be another kernel altogether (gpu/token_kernel.py): the last row is that one's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from numbainfer.bench import Bench, Test
from numbainfer.model import Model
from numbainfer.quantization import Matrix, QuantizedMatrix, QuantizedRows
from numbainfer.registry import CONTRACTS, Operators, parameters

WHOLE_STEP, ONE_KERNEL = "all, as one program", "all, as one kernel"


@dataclass
class Call:
    """One operator of a walk. nbytes: read and written at least once; operations: multiplications and additions."""

    name: str
    operator: Callable[[], None]
    program: Any
    nbytes: int
    operations: int
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """The tokens of a profiled step: `tokens` of them, from `depth` on, of each of `batch` sequences."""

    tokens: int
    depth: int
    batch: int

    def seen(self, window: int) -> int:
        """Positions that its tokens attend to, summed over the tokens."""
        lengths = (self.depth + i + 1 for i in range(self.tokens // self.batch))
        return self.batch * sum(min(length, window) if window else length for length in lengths)

    def cached(self, window: int) -> int:
        """Positions whose keys and values it has to read, each once."""
        new = self.tokens // self.batch
        length = self.depth + new
        return self.batch * (min(length, window + new - 1) if window else length)


class Recorder:
    """Stands in for a device's operators: captures each call as a program instead of running it."""

    def __init__(self, ops: Operators, labels: dict[int, str], step: Step) -> None:
        self._ops, self._labels, self._step = ops, labels, step
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._ops, name)
        if name not in CONTRACTS:
            return operator

        def record(*arguments: Any) -> None:
            again = partial(operator, *arguments)
            with self._ops.stream.capture() as program:
                again()
            given = dict(zip(parameters(CONTRACTS[name])[1:], arguments, strict=True))
            labels = [
                self._labels[id(value)] for key, value in given.items() if key != "table" and id(value) in self._labels
            ]
            nbytes = sum(_bytes(name, parameter, value, given, self._step) for parameter, value in given.items())
            self.calls.append(
                Call(" ".join([name, *labels]), again, program, nbytes, _operations(name, given, self._step))
            )

        return record


def profile(bench: Bench, test: Test, repetitions: int) -> list[dict[str, Any]]:
    """A row per operator of one step of a test, with the keys that `bench --profile -o json` prints. A prompt longer
    than a chunk is represented by its first chunk."""
    if test.kind == "pp":
        test = replace(test, count=min(test.count, bench.model.chunk))
        step = Step(test.count, test.depth, 1)
    else:
        test = replace(test, count=1)
        step = Step(test.batch, test.depth, test.batch)
    bench.progress(f"profiling {test}", 0, repetitions)
    bench.seconds(test)  # compiles
    bench.feeder.reset(test.depth, test.batch)
    with _recording(bench.model, step) as calls:
        bench.feeder.feed(test.count) if test.kind == "pp" else bench.feeder.step(test.batch)
    if test.kind == "pp":
        with bench.ops.stream.capture() as step_program:
            for call in calls:
                call.operator()
    else:
        step_program = bench.model.program(test.batch, test.batch, True)
    whole, ceilings = [], []
    for done in range(repetitions + 1):
        ceilings.append(bench.bandwidth())
        for call, seconds in zip(calls, bench.ops.stream.time([call.program for call in calls]), strict=True):
            call.seconds.append(seconds)
        whole += bench.ops.stream.time([step_program])
        bench.progress(f"profiling {test}", done, repetitions)
    alone = test.kind != "pp" and test.batch == 1 and bench.model.token_step is not None
    last = ONE_KERNEL if alone else WHOLE_STEP
    return _rows(
        bench, test, [replace(call, seconds=call.seconds[1:]) for call in calls], last, whole[1:], ceilings[1:]
    )


@contextmanager
def _recording(model: Model, step: Step) -> Iterator[list[Call]]:
    """Within, a step of the model is recorded, not run."""
    recorder = Recorder(model.ops, _labels(model), step)
    ops, eager, token_step = model.ops, model.eager, model.token_step
    model.ops, model.eager, model.token_step = recorder, True, None  # type: ignore[assignment]
    try:
        yield recorder.calls
    finally:
        model.ops, model.eager, model.token_step = ops, eager, token_step


def _labels(model: Model) -> dict[int, str]:
    """What the model calls each of its matrices, by identity."""
    owners = [owner for layer in model.layers for owner in (layer, layer.mixture) if owner is not None]
    labels = {
        id(value): item.name
        for owner in owners
        for item in fields(owner)
        if isinstance(value := getattr(owner, item.name), (Matrix, QuantizedMatrix))
    }
    return labels | {id(model.head): "head"}


def _bytes(name: str, parameter: str, value: Any, given: dict[str, Any], step: Step) -> int:
    """What a call moves of one of its arguments: all of it, or of a table only the rows that the step touches."""
    if parameter in ("k_pages", "v_pages"):
        _, kv_heads, _, head_dim = value.shape
        positions = step.cached(given["window"]) if name == "attention" else step.tokens
        return positions * kv_heads * head_dim * value.itemsize
    if name == "linear_experts" and parameter == "weight":  # of the experts, those that have a token: so many at most
        experts = given["starts"].shape[0] - 1
        return min(experts, given["out"].shape[0]) * _size(value) // experts
    if parameter in ("table", "cos", "sin") and value is not None:
        return step.tokens * _size(value) // value.shape[0]
    return 0 if parameter == "page_table" else _size(value)


def _size(value: Any) -> int:
    if isinstance(value, QuantizedRows):
        groups = value.width // value.group
        return value.tokens * (value.stride + groups * (value.scales.itemsize + value.sums.itemsize))
    return getattr(value, "nbytes", 0)


def _operations(name: str, given: dict[str, Any], step: Step) -> int:
    """Of the operators that multiply matrices; 0 for the others, which only memory limits."""
    if name == "linear":
        rows, width = given["weight"].shape
        return 2 * given["x"].shape[0] * rows * width
    if name == "linear_experts":
        rows, width = given["weight"].shape
        return 2 * given["out"].shape[0] * rows // (given["starts"].shape[0] - 1) * width
    if name == "attention":
        head_dim = given["k_pages"].shape[3]
        return 4 * given["heads"] * head_dim * step.seen(given["window"])
    return 0


def _rows(
    bench: Bench, test: Test, calls: list[Call], last: str, whole: list[float], ceilings: list[float]
) -> list[dict[str, Any]]:
    groups: dict[str, list[Call]] = {}
    for call in calls:
        groups.setdefault(call.name, []).append(call)
    each = {name: [sum(times) for times in zip(*(c.seconds for c in of), strict=True)] for name, of in groups.items()}
    total = sum(statistics.median(seconds) for seconds in each.values())
    ceiling = statistics.median(ceilings)

    def row(name: str, of: list[Call], seconds: float) -> dict[str, Any]:
        rate = sum(call.nbytes for call in of) / seconds
        return {
            "model": bench.weights.name,
            "device": str(bench.ops.device),
            "threads": bench.ops.stream.threads,
            "test": str(test),
            "operator": name,
            "calls": len(of),
            "milliseconds": 1000 * seconds,
            "percent_of_time": 100 * seconds / total,
            "bytes": sum(call.nbytes for call in of),
            "bytes_per_second": rate,
            "bandwidth_ceiling": ceiling,
            "percent_of_ceiling": 100 * rate / ceiling,
            "operations_per_second": sum(call.operations for call in of) / seconds,
        }

    rows = [row(name, of, statistics.median(each[name])) for name, of in groups.items()]
    rows.sort(key=lambda r: -r["milliseconds"])
    return [*rows, row(last, calls, statistics.median(whole))]
