"""How much a chat template may do: one rendering's budget, and checks of operations before they are done.

A few characters of Jinja2 can ask for a text of terabytes or for a loop without end. Every operation
that can make much out of little is therefore estimated first, and everything that is made is counted.
All failures are jinja2's SecurityError, which says what the template did.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError

MAX_TEXT = 1 << 22  # characters of one text: a million tokens, far more than any context
WORK = 1 << 27  # units for one rendering: a character that it makes is one, the rest is more
STEP = 32  # a step of a loop, a call or a filter: at most four million
ENTRY = 16  # an entry of a list, which with its object takes as much memory as this many characters
MAX_SECONDS = 5.0  # rendering a long conversation takes milliseconds
MAX_INDENT = 64  # spaces that `tojson` may indent by
MAX_BITS = 4096  # of an integer that `*` or `**` makes


class Budget:
    """What one rendering has left. It is checked between operations, never inside one."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._left = WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, amount: int = 0) -> None:
        self._left -= amount + STEP
        if self._left < 0:
            raise SecurityError("it does far more work than a prompt takes")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it ran for more than {MAX_SECONDS:g} seconds")

    def made(self, value: Any) -> Any:
        """Counts a value that an operation has made; returns it."""
        if isinstance(value, (str, bytes)):
            check_size(len(value))
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            check_size(len(value))
            self.spend(len(value) * ENTRY)
        else:
            self.spend()
        return value

    def join(self, pieces: Iterable[str]) -> str:
        """The pieces as one text, or an error before it is made."""
        parts: list[str] = []
        size = 0
        for piece in pieces:
            size += len(piece)
            check_size(size)
            parts.append(piece)
        self.spend(size)
        return "".join(parts)

    def concatenate(self, values: Iterable[Any]) -> str:
        """What `~` does."""
        return self.join(str(check_extent(value)) for value in values)

    def iterate(self, values: Any) -> Any:
        """What a `for` loop runs over, all its steps counted before the first."""
        items = values if hasattr(values, "__len__") else list(values)
        self.spend(len(items) * STEP)
        return items


def check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"it makes a text or a list of more than {MAX_TEXT} entries")


def check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError("it makes a number of more than a thousand digits")


def check_extent(value: Any) -> Any:
    """Refuses a value that is small in memory and huge once written out: lists of the same list of the
    same list. Returns it otherwise."""
    size = 0
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Mapping):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            pending += item
        size += len(item) if isinstance(item, str) else 4  # about what a number or a bracket takes
        check_size(size + len(pending))
    return value


def check_add(left: Any, right: Any) -> None:
    if hasattr(left, "__len__") and hasattr(right, "__len__"):
        check_size(len(left) + len(right))


def check_multiply(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())
    for repeated, times in ((left, right), (right, left)):
        if hasattr(repeated, "__len__") and isinstance(times, int):
            check_size(len(repeated) * times)


def check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() * right)


def check_replace(text: Any, arguments: Sequence[Any]) -> None:
    if isinstance(text, str) and len(arguments) >= 2 and all(isinstance(a, str) for a in arguments[:2]):
        check_size(len(text) + text.count(arguments[0]) * len(arguments[1]))


def check_join(items: Sequence[Any], separator: str) -> None:
    check_extent(items)
    check_size(len(items) * len(separator))


def check_format(form: Any, arguments: Sequence[Any]) -> None:
    """A field's width stands in the format itself or, for `*` and nested braces, among the arguments."""
    check_extent(arguments)
    if not isinstance(form, str):
        return
    size = sum(int(digits[:10]) for digits in re.findall(r"\d+", form))
    fields = form.count("*") + form.count("{")
    size += fields * sum(abs(item) for item in arguments if isinstance(item, int))
    # Each field may write out each of the arguments in full.
    size += (form.count("%") + fields) * sum(len(item) for item in arguments if hasattr(item, "__len__"))
    check_size(size)


def check_indent(text: str, arguments: Sequence[Any]) -> None:
    widths = [len(item) if isinstance(item, str) else int(item) for item in arguments]
    check_size(len(text) + text.count("\n") * max(widths, default=4))
