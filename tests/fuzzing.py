"""Damage to files, and the guard under which damaged files are opened.

Every mutation is drawn from a seed, so that a failure can be repeated: mutations(...) gives the same for ever.
"""

from __future__ import annotations

import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from numbainfer.converters.source import open_source
from numbainfer.converters.source_reader import SourceReader, Target
from numbainfer.errors import NumbaInferError
from numbainfer.registry import Operators
from numbainfer.specs import parameter_groups
from numbainfer.tokenizer import Tokenizer

SECONDS, GIGABYTE = 10, 10**9
EXTREMES = [0, 1, 2, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
# What a value in JSON may become.
JSON_VALUES = [
    *("null", "true", "-1", "0", "1e999", "NaN", "9223372036854775808", "1" * 400, "0.5", '""', '"x"', "[]", "{}"),
    *("[" * 200 + "]" * 200, '"../../etc/passwd"', '"/etc/passwd"', '"\\u0000"', '"\\ud800"', "[1,2,3]", '{"a":1}'),
]


def mutations(data: bytes, end: int, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged versions of a file and what was done; all but truncations lie in data[:end], the structure."""
    rng = random.Random(seed)
    kinds = [_flip, _flip, _flip, _extreme, _extreme, _cut, _repeat, _insert, _zero, _truncate]
    text = data[:1] == b"{"
    for number in range(count):
        kind = _json if text and number % 3 == 0 else kinds[number % len(kinds)]
        yield kind(data, end, rng)


def _flip(data: bytes, end: int, rng: random.Random) -> tuple[str, bytes]:
    byte, bit = rng.randrange(end), rng.randrange(8)
    return f"bit {bit} of byte {byte}", data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


def _extreme(data: bytes, end: int, rng: random.Random) -> tuple[str, bytes]:
    """A count or a length that lies."""
    size = rng.choice([4, 8])
    at, value = rng.randrange(max(1, end - size + 1)), rng.choice(EXTREMES) % 2 ** (8 * size)
    return f"{value} in {size} bytes at {at}", data[:at] + struct.pack("<Q", value)[:size] + data[at + size :]


def _cut(data: bytes, end: int, rng: random.Random) -> tuple[str, bytes]:
    at, size = rng.randrange(end), rng.randrange(1, 40)
    return f"{size} bytes taken out at {at}", data[:at] + data[at + size :]


def _repeat(data: bytes, end: int, rng: random.Random) -> tuple[str, bytes]:
    at, size = rng.randrange(end), rng.randrange(1, 200)
    return f"{size} bytes at {at} twice", data[: at + size] + data[at:]


def _insert(data: bytes, end: int, rng: random.Random) -> tuple[str, bytes]:
    at, size = rng.randrange(end), rng.randrange(1, 20)
    return f"{size} bytes put in at {at}", data[:at] + rng.randbytes(size) + data[at:]


def _zero(data: bytes, end: int, rng: random.Random) -> tuple[str, bytes]:
    at, size = rng.randrange(end), rng.randrange(1, 64)
    size = min(size, end - at)
    return f"{size} zeros at {at}", data[:at] + bytes(size) + data[at + size :]


def _truncate(data: bytes, end: int, rng: random.Random) -> tuple[str, bytes]:
    size = rng.randrange(len(data))
    return f"the first {size} bytes", data[:size]


def _json(data: bytes, end: int, rng: random.Random) -> tuple[str, bytes]:
    """Another value somewhere after a colon."""
    text = data.decode()
    places = [i for i, character in enumerate(text) if character == ":"]
    at = rng.choice(places) + 1
    stop = min((i for i in (text.find(",", at), text.find("}", at)) if i >= 0), default=len(text))
    value = rng.choice(JSON_VALUES)
    return f"{value[:20]} at {at}", (text[:at] + value + text[stop:]).encode()


@contextmanager
def guarded() -> Iterator[None]:
    """Within, nothing may take a gigabyte more than is there, or SECONDS of the processor (see `attempt`)."""
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIGABYTE, before[1]))
    handler = signal.signal(signal.SIGPROF, _too_long)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def attempt(path: Path, ops: Operators) -> dict[str, np.ndarray] | str:
    """All that a conversion reads of a model, as float32 by name; or the one line that says why not."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with open_source(path, require_tokenizer=False) as source:
            reader = SourceReader(source, Target("float32"), ops)
            if source.tokenizer_files:
                Tokenizer.from_files(source.tokenizer_files, reader.config.vocab_size)
            found: dict[str, Any] = {}
            for parameter in (p for group in parameter_groups(reader.config) for p in group):
                rows = [rows.copy() for _, rows in reader.converted(source.tensors[parameter.name], "float32")]
                found[parameter.name] = np.concatenate(rows)
            return found
    except NumbaInferError as error:
        return str(error)
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
