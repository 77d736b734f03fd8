"""What the command line shows besides results: progress bars and notes, on stderr only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from numbainfer.progress import Progress


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress callback (description, done, total): bars on a terminal, else one line as each task begins."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def line(description: str, done: int, total: int | None) -> None:
            if description not in seen:
                seen.add(description)
                note(f"{description} ...")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}  # the one that is shown

        def bar(description: str, done: int, total: int | None) -> None:
            if description not in tasks:
                for task in tasks.values():
                    bars.remove_task(task)
                tasks.clear()
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total)

        yield bar


def announce_compilation() -> None:
    """Says, once, that kernels are being compiled: the only long wait that a warm cache does not have."""
    from numbainfer.cpu import compile

    def announce() -> None:
        directory = compile.cache_directory()
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
        kept = "kept for later runs" if os.access(directory, os.W_OK) else f"not kept: {directory} can't be written"
        note(f"compiling kernels for this CPU ({kept}) ...")

    compile.on_first_compile = announce


def size(nbytes: float) -> str:
    """Bytes for people: 144.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
