"""Directories for what is not finished yet: removed in the end, even those of processes that were killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def scratch_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new directory in `parent`, which is removed at the end unless it was renamed.

    A process that is killed can't remove its own. So each holds a lock on its directory, which the system lets go
    with the process, and whoever comes next removes the directories of the same prefix that nobody has locked.
    """
    _remove_abandoned(parent, prefix)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(directory, wait=True)
        if directory.exists():  # else another process came between, and took it for abandoned
            break
        _unlock(lock)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        _unlock(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    with suppress(OSError):
        for path in parent.iterdir():
            if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink():
                lock = _lock(path, wait=False)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    _unlock(lock)


def _lock(directory: Path, *, wait: bool) -> int | None:
    """What holds the lock on a directory; None where another process does, or where there are no locks."""
    if fcntl is None:
        return None
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
