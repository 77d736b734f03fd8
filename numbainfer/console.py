"""What the command line shows besides results: progress bars and notes, on stderr only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from numbainfer.progress import Progress, silent

QUIET, NORMAL, VERBOSE = -1, 0, 1
verbosity = NORMAL
"""How much of what is no result and no error is shown; the options --quiet and --verbose set it."""

SECONDS_BETWEEN_LINES = 10.0
"""Of one long task, where stderr is no terminal."""

_CODES = {"red": "31", "yellow": "33", "green": "32", "dim": "2", "bold": "1"}


def note(text: str) -> None:
    """One line on stderr, unless --quiet."""
    if verbosity >= NORMAL:
        warn(text)


def detail(text: str) -> None:
    """One line on stderr with --verbose."""
    if verbosity >= VERBOSE:
        warn(paint(text, "dim", sys.stderr))


def warn(text: str) -> None:
    """One line on stderr, always."""
    print(text, file=sys.stderr, flush=True)


def has_colours(stream: TextIO) -> bool:
    """Whether to write colours: to terminals that have them, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, stream: TextIO) -> str:
    """The text in a colour ("red", "yellow", "green") or "dim" or "bold", where the stream shows it."""
    return f"\033[{_CODES[style]}m{text}\033[0m" if has_colours(stream) else text


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress callback: bars on a terminal, else one line as each task begins; nothing with --quiet."""
    if verbosity < NORMAL:
        yield silent
        return
    if not sys.stderr.isatty():
        said: dict[str, float] = {}  # when each task was last told of

        def line(description: str, done: int, total: int | None, value: str = "") -> None:
            now = time.monotonic()
            if description not in said:
                note(f"{description} ...")
            elif value and now - said[description] > SECONDS_BETWEEN_LINES:
                note(f"{description} {done}/{total}: {value}")
            else:
                return
            said[description] = now

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    value_column = TextColumn("{task.fields[value]}")
    with Progress(*columns, TimeElapsedColumn(), value_column, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}  # the one that is shown

        def bar(description: str, done: int, total: int | None, value: str = "") -> None:
            if description not in tasks:
                for task in tasks.values():
                    bars.remove_task(task)
                tasks.clear()
                tasks[description] = bars.add_task(description, total=total, value=value)
            bars.update(tasks[description], completed=done, total=total, value=value)

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


def size(nbytes: float, step: int = 1000) -> str:
    """Bytes for people: 144.3 MB; with a step of 1024, 32 KiB."""
    units = ("B", "kB", "MB", "GB") if step == 1000 else ("B", "KiB", "MiB", "GiB")
    for unit in units:
        if nbytes < step or unit == units[-1]:
            break
        nbytes /= step
    return f"{nbytes:.0f} {unit}" if unit == "B" or (step == 1024 and nbytes % 1 == 0) else f"{nbytes:.1f} {unit}"
