"""How long work says how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then with what is going on, how much of it is done, of how much (None: not known), and what has
    come out so far."""

    def __call__(self, description: str, done: int, total: int | None, value: str = "") -> None: ...


def silent(description: str, done: int, total: int | None, value: str = "") -> None:
    """A Progress that shows nothing."""
