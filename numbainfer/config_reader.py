"""Typed reads from a config.json, each naming its key when it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numbainfer.errors import NumbaInferError


class Reader:
    """A JSON object's keys by type. `where` names the file in errors."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def error(self, text: str) -> NumbaInferError:
        return NumbaInferError(f"{self.where}: {text}")

    def size(self, key: str, limit: int, default: int | None = None, *, least: int = 1) -> int:
        """A whole number from `least` to `limit`; `default`, if there is one, where the key is missing or null."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= limit:
            raise self.error(f"{key} must be a whole number from {least} to {limit}, not {shown(value)}")
        return value

    def number(self, key: str, low: float, high: float, values: Mapping[str, Any] | None = None) -> float:
        """A number above `low`, up to `high`, from `values` if given."""
        value: Any = (self.raw if values is None else values).get(key)
        if type(value) not in (int, float) or not low < value <= high:
            raise self.error(f"{key} must be a number above {low:g}, not {shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool, values: Mapping[str, Any] | None = None) -> bool:
        """true or false."""
        value = (self.raw if values is None else values).get(key, default)
        if type(value) is not bool:
            raise self.error(f"{key} must be true or false, not {shown(value)}")
        return value

    def whole_numbers(self, key: str, low: int, high: int) -> list[int] | None:
        """A list of whole numbers from `low` to `high`; None where the key is missing or null."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(n) is not int or not low <= n <= high for n in value):
            raise self.error(f"{key} must be a list of numbers from {low} to {high}, not {shown(value)}")
        return value


def shown_key(key: str) -> str:
    """A key of a file: as it is, unless it would spoil the line."""
    return key if key.isprintable() and len(key) <= 60 else shown(key)


def shown(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
