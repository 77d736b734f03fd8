"""A model's step of one token on a GPU that simt.py plays, for tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import simt
from simt_world import Array

from numbainfer.gpu.token_step import TokenStep, token_step
from numbainfer.kv_cache import PAGE, KVCache, Sequence
from numbainfer.model import Model
from numbainfer.quantization import QuantizedMatrix

SHARED_MEMORY = 227 << 10  # bytes of a block, on an H100
MEMORY_RATE = 12.8  # bytes a cycle for each multiprocessor, on an H100


class Emulated:
    """A model's step of one token on a GPU of so many multiprocessors. It is the stream and the pool too."""

    def __init__(self, model: Model, blocks: int, order: int | None) -> None:
        self.gpu = SimpleNamespace(
            capability=(9, 0), multiprocessors=blocks, shared_memory=SHARED_MEMORY, memory_rate=MEMORY_RATE
        )
        self.order, self.held = order, list[np.ndarray]()
        self.captured: list[Any] | None = None
        self.seconds = 0.0
        layers = [
            replace(layer, **{f.name: self._seen(getattr(layer, f.name)) for f in fields(layer)})
            for layer in model.layers
        ]
        k_pages, v_pages = (list(map(self._seen, pages)) for pages in (model.cache.k_pages, model.cache.v_pages))
        cache = SimpleNamespace(k_pages=k_pages, v_pages=v_pages, page_table=model.cache.page_table)
        others = {name: self._seen(getattr(model, name)) for name in ("embedding", "head", "norm", "cos", "sin")}
        seen = SimpleNamespace(config=model.config, layers=layers, cache=cache, **others)
        both: Any = self
        with patch.object(sys.modules[TokenStep.__module__], "SMALL", 0):  # finds no arrangement: that takes long
            made = token_step(both, both, seen)
        assert isinstance(made, TokenStep)
        self.step = made

    def _seen(self, value: Any) -> Any:
        """An array, or what has some, with pointers."""
        if isinstance(value, QuantizedMatrix):
            return replace(value, codes=self._seen(value.codes), scales=self._seen(value.scales))
        if isinstance(value, np.ndarray):
            value = value.view(Array)
            self.held.append(value)
        return value

    def launch(self, kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        """As a stream."""
        if self.captured is not None:
            self.captured.append(((kernel, grid, *arguments), options))
            return
        simt.launch(kernel, grid, *arguments, **options, order=self.order, others=self.held)

    @contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """As a stream; of launches."""
        self.captured = []
        try:
            yield self.captured
        finally:
            self.captured = None

    def time(self, programs: list[list[Any]]) -> list[float]:
        """As a stream: each time is less than the one before."""
        for launched, options in chain(*programs):
            self.launch(*launched, **options)
        self.seconds -= 1
        return [self.seconds for _ in programs]

    def empty(self, shape: Any, dtype: Any) -> Array:
        """As a pool."""
        return np.zeros(shape, dtype).view(Array)

    zeros = empty

    def release(self, array: Array) -> None:
        """As a pool: what is in it afterwards means nothing."""
        array.view(np.int8)[...] = 0x55


def filled(model: Model, text: list[int]) -> Sequence:
    """A sequence of which the cache holds a text."""
    sequence = model.cache.add_sequence()
    for start in range(0, len(text), model.chunk):
        part = text[start : start + model.chunk]
        model.cache.append(sequence, part)
        model.step(part, np.arange(start, start + len(part)), sequence.row, "none")
    return sequence


def stored(cache: KVCache, sequence: Sequence, position: int) -> np.ndarray:
    """Of all layers, the keys and values at a position."""
    page, slot = sequence.pages[position // PAGE], position % PAGE
    return np.array([pages[page, :, slot] for pages in (*cache.k_pages, *cache.v_pages)], np.float32)
