"""How measurements are shown: a table for people, JSON, markdown or CSV for programs; and beside older ones."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numbainfer.bench import Test
from numbainfer.bench_profile import ONE_KERNEL, WHOLE_STEP
from numbainfer.console import size
from numbainfer.errors import NumbaInferError

Row = Mapping[str, Any]
# The keys that another bench's rows need to be compared with, or plotted.
_NEEDED = ("model", "device", "test", "tokens_per_second", "stddev", "bytes_per_second", "bandwidth_ceiling")


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, what it says of a row; numbers stand at the right."""

    heading: str
    text: Callable[[Row], str]
    number: bool = True
    style: Callable[[Row], str] = lambda row: ""


def _fixed(key: str, digits: int, unit: float = 1) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / unit:.{digits}f}"


def _plain(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def _change(row: Row) -> str:
    if row["change_percent"] is None:
        return "new"
    return f"{row['change_percent']:+.1f}%" + ("" if _is_significant(row) else " ~")


def _change_style(row: Row) -> str:
    if row["change_percent"] is None or not _is_significant(row):
        return "dim"
    return "green" if row["change_percent"] > 0 else "red"


def _is_significant(row: Row) -> bool:
    """Whether a difference is more than twice the standard deviation of the two measurements' difference."""
    noise = (row["stddev"] ** 2 + row["before_stddev"] ** 2) ** 0.5
    return abs(row["tokens_per_second"] - row["before"]) > 2 * noise


BENCH = (
    Column("model", _plain("model"), number=False),
    Column("device", _plain("device"), number=False),
    Column("threads", _plain("threads")),
    Column("test", _plain("test"), number=False),
    Column("tok/s", _fixed("tokens_per_second", 2), style=lambda row: "bold"),
    Column("+/-", _fixed("stddev", 2)),
    Column("GB/s", _fixed("bytes_per_second", 2, 1e9)),
    Column("ceiling GB/s", _fixed("bandwidth_ceiling", 1, 1e9)),
    Column("% of ceiling", _fixed("percent_of_ceiling", 0)),
)
COMPARISON = (
    *BENCH,
    Column("before", lambda row: "" if row["before"] is None else f"{row['before']:.2f}"),
    Column("change", _change, style=_change_style),
)
PROFILE = (
    Column("test", _plain("test"), number=False),
    Column("operator", _plain("operator"), number=False),
    Column("calls", _plain("calls")),
    Column("ms", _fixed("milliseconds", 3), style=lambda row: "bold"),
    Column("% of time", _fixed("percent_of_time", 1)),
    Column("moves", lambda row: size(row["bytes"])),
    Column("GB/s", _fixed("bytes_per_second", 2, 1e9)),
    Column("% of ceiling", _fixed("percent_of_ceiling", 0)),
    Column("GOP/s", lambda row: f"{row['operations_per_second'] / 1e9:.0f}" if row["operations_per_second"] else ""),
)


def render(rows: Sequence[Row], output: str) -> None:
    """Prints the rows of `bench`, of a comparison or of a profile to stdout.

    output: "table", "json", "markdown" or "csv".
    """
    if output == "json":
        print(json.dumps(list(rows), indent=1))
    elif output == "csv":
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    else:
        columns = PROFILE if "operator" in rows[0] else COMPARISON if "change_percent" in rows[0] else BENCH
        _markdown(rows, columns) if output == "markdown" else _table(rows, columns)


def _markdown(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    print("| " + " | ".join(column.heading for column in columns) + " |")
    print("|" + "|".join(" ---: " if column.number else " --- " for column in columns) + "|")
    for row in rows:
        print("| " + " | ".join(column.text(row) for column in columns) + " |")


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """What is the same in all rows stands above the table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    common = {name: rows[0][name] for name in ("model", "device", "threads") if len({row[name] for row in rows}) == 1}
    shown = [column for column in columns if column.heading not in common]
    title = ", ".join(str(value) + (" threads" if name == "threads" else "") for name, value in common.items())
    table = Table(title=title or None, caption=_caption(rows, columns), title_justify="left", caption_justify="left")
    for column in shown:
        table.add_column(column.heading, justify="right" if column.number else "left")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        whole = (WHOLE_STEP, ONE_KERNEL)
        ends = columns is PROFILE and (row["operator"] in whole or (after is not None and after["operator"] in whole))
        table.add_row(*(Text(column.text(row), style=column.style(row)) for column in shown), end_section=ends)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _caption(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    if columns is PROFILE:
        return f"each operator by itself, medians; read bandwidth {rows[0]['bandwidth_ceiling'] / 1e9:.1f} GB/s"
    caption = f"{rows[0]['device_name']}, {rows[0]['repetitions']} repetitions, medians"
    return caption + (" (~: within twice the standard deviation)" if columns is COMPARISON else "")


def read_rows(path: str) -> list[dict[str, Any]]:
    """What `bench -o json` printed into a file."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        known = isinstance(rows, list) and rows and all(isinstance(r, dict) and set(_NEEDED) <= set(r) for r in rows)
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise NumbaInferError(f"{path} is not what `numbainfer bench -o json` prints")
    for row in rows:
        if not isinstance(row["test"], str) or not all(_is_rate(row[name]) for name in _NEEDED[3:]):
            raise NumbaInferError(f"{path}: the row of {row['test']} has values that are no measurements")
        Test.parse(row["test"])
    return rows


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e18


def compare(rows: Sequence[Row], old: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows beside those of the same model, device and test in an older measurement.

    Adds `before` and `before_stddev` (tokens/s) and `change_percent`; None where there was none.
    """
    earlier = {(row["model"], row["device"], row["test"]): row for row in old}
    compared = []
    for row in rows:
        before = earlier.get((row["model"], row["device"], row["test"]))
        rate = before["tokens_per_second"] if before else None
        change = 100 * (row["tokens_per_second"] / rate - 1) if rate else None
        stddev = before["stddev"] if before else None
        compared.append({**row, "before": rate, "before_stddev": stddev, "change_percent": change})
    return compared


def print_facts(facts: Mapping[str, str]) -> None:
    """name: value lines, aligned."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
