"""How measurements are shown: a table for people, JSON, markdown or CSV for programs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("model", "device", "threads", "test", "tok/s", "+/-", "GB/s", "ceiling GB/s", "% of ceiling")


def render(rows: Sequence[Mapping[str, Any]], output: str) -> None:
    """Prints bench's rows to stdout. output: "table", "json", "markdown" or "csv"."""
    if output == "json":
        print(json.dumps(list(rows), indent=1))
    elif output == "csv":
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    elif output == "markdown":
        print("| " + " | ".join(_COLUMNS) + " |")
        print("|" + " --- |" * len(_COLUMNS))
        for row in rows:
            print("| " + " | ".join(_cells(row)) + " |")
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(caption=f"{rows[0]['device_name']}, {rows[0]['repetitions']} repetitions, medians")
        for i, column in enumerate(_COLUMNS):
            table.add_column(column, justify="left" if i in (0, 1, 3) else "right")
        for row in rows:
            table.add_row(*_cells(row))
        Console(width=None if sys.stdout.isatty() else 120).print(table)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["model"],
        row["device"],
        str(row["threads"]),
        row["test"],
        f"{row['tokens_per_second']:.2f}",
        f"{row['stddev']:.2f}",
        f"{row['bytes_per_second'] / 1e9:.2f}",
        f"{row['bandwidth_ceiling'] / 1e9:.1f}",
        f"{row['percent_of_ceiling']:.0f}",
    ]


def print_facts(facts: Mapping[str, str]) -> None:
    """name: value lines, aligned."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
