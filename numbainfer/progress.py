"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called now and then with what is going on, how much of it is done, and of how much (None: not known)."""


def silent(description: str, done: int, total: int | None) -> None:
    """A Progress that shows nothing."""
