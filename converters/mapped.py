"""A file mapped into memory, read-only."""

from __future__ import annotations

import mmap
import stat
from pathlib import Path

import numpy as np

from numbainfer.errors import NumbaInferError


class MappedFile:
    """`mapping` is the file's bytes, `size` their number. Raises NumbaInferError where it can't be read or is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
                raise NumbaInferError(f"cannot read {path}: it is not a regular file")
            if status.st_size == 0:
                raise NumbaInferError(f"{path} is empty")
            with path.open("rb") as file:
                self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise NumbaInferError(f"cannot read {path}: {error.strerror or error}") from error
        self.size = len(self.mapping)

    def array(self, dtype: str, count: int, start: int) -> np.ndarray:
        """`count` numbers from byte `start` on, a view of the mapping that keeps it alive."""
        return np.frombuffer(self.mapping, dtype, count, start)
