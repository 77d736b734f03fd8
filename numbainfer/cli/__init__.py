"""The command line: parsing and printing only. Here: one process, from its streams to its exit code.

Results go to stdout, everything else to stderr. Exit codes: 0; 1 for a failure, with one line "error: ..."; 2 for wrong
usage; 130 after Ctrl-C (128 and the signal's number, as shells have it).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from numbainfer.cli import completion
from numbainfer.cli.group import commands
from numbainfer.console import paint
from numbainfer.errors import NumbaInferError


def main() -> None:
    """Entry point of the `numbainfer` command."""
    debug = "--debug" in sys.argv
    _prepare_streams()
    if completion.VARIABLE in os.environ:
        sys.exit(completion.answer(commands))
    try:
        with _signals_that_unwind():
            code = _run(sys.argv[1:])
            sys.stdout.flush()  # here, where a full disk or a reader that left can still be told
    except click.ClickException as error:
        context = getattr(error, "ctx", None)  # usage errors know the command
        hint = f" (see {context.command_path} --help)" if context else ""
        code = _fail(error.format_message().removesuffix(".") + hint, 2)
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except BrokenPipeError:
        code = 0  # the reader of our output went away (| head): not an error
    except NumbaInferError as error:
        if debug:
            raise
        code = _fail(str(error), 1)
    except MemoryError:
        if debug:
            raise
        code = _fail("out of memory: lower --ctx-size or take a smaller model", 1)
    except OSError as error:
        if debug:
            raise
        if os.name == "nt" and error.errno == errno.EINVAL and error.filename is None:
            sys.exit(0)  # how Windows says that the reader went away
        code = _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except Exception as error:
        if debug:
            raise
        code = _fail(f"internal: {type(error).__name__}: {error} (run again with --debug and report what it shows)", 1)
    try:
        sys.stdout.flush()
    except OSError:  # said above, or the reader is gone: keep Python from trying again, and complaining, at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """The exit code of one command. (click's own main would make 1 of a broken pipe.)"""
    try:
        with commands.make_context("numbainfer", arguments) as context:
            commands.invoke(context)
    except click.exceptions.Exit as finished:
        return finished.exit_code
    return 0


def _prepare_streams() -> None:
    """Makes sure that all three streams are there (a shell can close them), and that any text can be printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open till the end)
    for stream in (sys.stdout, sys.stderr):
        # Models write any character; a terminal or a locale may lack it. Windows gives a file or a pipe the
        # encoding of its region, which lacks most.
        encoding = "utf-8" if os.name == "nt" and not stream.isatty() else stream.encoding
        stream.reconfigure(encoding=encoding, errors="replace")  # type: ignore[union-attr]


@contextmanager
def _signals_that_unwind() -> Iterator[None]:
    """Within, `kill` and a closed terminal end the process as Ctrl-C does: what is half-written is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        if not _postponed(number, frame):
            raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # One that is ignored stays so: nohup does that.
    changed = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        changed[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    usual, sys.unraisablehook = sys.unraisablehook, _hear_again
    try:
        yield
    finally:
        if time.monotonic() - _interrupted_at > 1:  # else the process ends, and what unwinds may be finalized still
            sys.unraisablehook = usual
        for number, before in changed.items():
            signal.signal(number, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C."""
    if _postponed(number, frame):
        return
    global _interrupted_at  # noqa: PLW0603
    _interrupted_at = time.monotonic()
    raise KeyboardInterrupt


def _postponed(number: int, frame: FrameType | None) -> bool:
    """Whether an exception that comes from nowhere would do harm here: the signal then comes again a moment later. In
    an import, modules written in C print it, or make it an ImportError. In llvmlite, what LLVM has taken over may not
    be marked as taken yet: it would be freed twice."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name == "<frozen importlib._bootstrap>" or f"{os.sep}llvmlite{os.sep}" in name:
            _raise_later(number)
            return True
        frame = frame.f_back
    return False


_interrupted_at = -1.0
"""When Ctrl-C last unwound something: what was half made then fails to be finalized, which tells no one anything."""


def _raise_later(number: int) -> None:
    threading.Timer(0.01, signal.raise_signal, (number,)).start()


def _hear_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Python prints and forgets what is raised in finalizers, in callbacks of weak references (importing a module
    leaves some behind) and in those from C. Ctrl-C and `kill` that fell there are heard a moment later instead."""
    error = unraisable.exc_value
    number: int | None = None
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        number = error.code - 128
    if number is not None:
        _raise_later(number)
    elif time.monotonic() - _interrupted_at > 1:
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int) -> int:
    print(paint("error:", "red", sys.stderr), " ".join(message.split()), file=sys.stderr, flush=True)
    return code
