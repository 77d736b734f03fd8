"""`bench --plot`: tokens per second over depth, batch and prompt length, beside what the memory allows.

The roofline (Williams et al. 2009) of a test is the rate at which its bytes could be read: the read bandwidth that was
measured in turn with it, divided by its bytes per token. Decoding lives near it; a prompt meets arithmetic's limit
first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numbainfer.bench import Test
from numbainfer.errors import NumbaInferError


@dataclass(frozen=True)
class Point:
    """One measured test. Rates in tokens/s."""

    series: str  # model and device
    test: Test
    rate: float
    stddev: float
    roofline: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Point:
        bytes_per_token = row["bytes_per_second"] / row["tokens_per_second"]
        series = f"{row['model']}, {row['device']}"
        roofline = row["bandwidth_ceiling"] / bytes_per_token
        return cls(series, Test.parse(row["test"]), row["tokens_per_second"], row["stddev"], roofline)


@dataclass(frozen=True)
class Panel:
    """One set of axes: how the rate depends on `x`, a line for each value of `line`."""

    title: str
    axis: str
    kind: str
    x: Callable[[Test], int]
    line: Callable[[Test], str]


PANELS = (
    Panel("Decoding", "tokens in the cache", "tg", lambda t: t.depth, lambda t: f"batch {t.batch}"),
    Panel("Decoding together", "sequences", "tg", lambda t: t.batch, lambda t: f"depth {t.depth:,}"),
    Panel("Prefill", "prompt tokens", "pp", lambda t: t.count, lambda t: f"depth {t.depth:,}"),
    Panel("Prefill after a context", "tokens in the cache", "pp", lambda t: t.depth, lambda t: f"{t.count:,} tokens"),
)


def check_path(path: str) -> None:
    """Refuses, before anything is measured, what can't be plotted to."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NumbaInferError('--plot needs matplotlib: pip install "numbainfer[plot]"') from None
    if not Path(path).resolve().parent.is_dir():
        raise NumbaInferError(f"--plot {path}: there is no directory {Path(path).parent}")


def plot(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Draws what varies among the rows; with nothing that varies, a bar for each test."""
    from matplotlib.figure import Figure

    points = [Point.of(row) for row in rows]
    panels = [panel for panel in PANELS if len({panel.x(p.test) for p in points if p.test.kind == panel.kind}) > 1]
    drawn = {panel.kind for panel in panels}
    rest = [point for point in points if point.test.kind not in drawn]
    columns = len(panels) + bool(rest)
    # Figure without pyplot: no window system is looked for
    figure = Figure(figsize=(max(6.4, 4.8 * columns), 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for panel, ax in zip(panels, axes, strict=False):
        _lines(ax, panel, [point for point in points if point.test.kind == panel.kind])
    if rest:
        _bars(axes[-1], rest)
    names = sorted({point.series for point in points})
    figure.suptitle(f"{names[0]} ({rows[0].get('device_name', '')})" if len(names) == 1 else "numbainfer bench")
    figure.savefig(path, dpi=150)


def _lines(ax: Any, panel: Panel, points: list[Point]) -> None:
    groups: dict[str, list[Point]] = {}
    several = len({point.series for point in points}) > 1
    for point in points:
        name = f"{point.series}, " if several else ""
        groups.setdefault(name + panel.line(point.test), []).append(point)
    for name, members in groups.items():
        members.sort(key=lambda point: panel.x(point.test))
        x = [panel.x(point.test) for point in members]
        line = ax.errorbar(x, [p.rate for p in members], [p.stddev for p in members], marker="o", capsize=3, label=name)
        if panel.kind == "tg":
            ax.plot(x, [p.roofline for p in members], linestyle="--", linewidth=1, color=line[0].get_color())
    if panel.kind == "tg":
        ax.plot([], [], linestyle="--", linewidth=1, color="gray", label="roofline: memory bandwidth")
    ax.set_xticks(sorted({panel.x(point.test) for point in points}))
    ax.set(title=panel.title, xlabel=panel.axis, ylabel="tokens/s", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def _bars(ax: Any, points: list[Point]) -> None:
    several = len({point.series for point in points}) > 1
    labels = [f"{point.series}\n{point.test}" if several else str(point.test) for point in points]
    for i, point in enumerate(points):
        ax.barh(i, point.rate, xerr=point.stddev, color="C0" if point.test.kind == "tg" else "C1", capsize=3)
        ax.text(0, i, f" {point.rate:,.1f}", va="center", color="white", fontweight="bold")
        if point.test.kind == "tg":
            ax.vlines(point.roofline, i - 0.4, i + 0.4, linestyle="--", color="C3")
    if any(point.test.kind == "tg" for point in points):
        ax.plot([], [], linestyle="--", color="C3", label="roofline: memory bandwidth")
        ax.legend(fontsize="small")
    ax.set_yticks(range(len(points)), labels)
    ax.invert_yaxis()
    ax.set(xlabel="tokens/s", xlim=(0, None))
    ax.grid(alpha=0.3, axis="x")
