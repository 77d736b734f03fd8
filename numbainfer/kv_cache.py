"""The paged KV cache: keys and values in pages of 64 positions, sequences that own pages.

Pages of a layer are `[page, kv_head, 64, head_dim]`. A sequence's row of the page table says which page holds its
positions 0 to 63, 64 to 127, and so on. The page table is a plain array that kernels read when they run, so a captured
program serves every token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numbainfer.config import ModelConfig
from numbainfer.errors import NumbaInferError
from numbainfer.memory import MemoryPool

PAGE = 64  # positions of a page


class Sequence:
    """One sequence's place in the cache: its row in the page table, its tokens so far, its pages."""

    def __init__(self, row: int) -> None:
        self.row = row
        self.tokens: list[int] = []
        self.pages: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)


class KVCache:
    """Keys and values of all layers, for up to `sequences` sequences of up to `ctx_size` tokens each.

    k_pages, v_pages: per layer [pages, kv_heads, 64, head_dim] of `dtype`. page_table: int32 [sequences, pages of a
    full sequence].
    """

    def __init__(
        self,
        pool: MemoryPool,
        config: ModelConfig,
        ctx_size: int,
        *,
        dtype: Any = np.float16,
        sequences: int = 1,
    ) -> None:
        self.pool = pool
        self.ctx_size = ctx_size
        per_sequence = -(-ctx_size // PAGE)
        shape = (per_sequence * sequences, config.kv_heads, PAGE, config.head_dim)
        self.k_pages = [pool.empty(shape, dtype) for _ in range(config.layers)]
        self.v_pages = [pool.empty(shape, dtype) for _ in range(config.layers)]
        self.page_table = pool.zeros((sequences, per_sequence), np.int32)
        self._free_pages = list(range(per_sequence * sequences))[::-1]
        self._free_rows = list(range(sequences))[::-1]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.k_pages, *self.v_pages))

    def add_sequence(self) -> Sequence:
        """An empty sequence."""
        if not self._free_rows:
            raise NumbaInferError(f"the KV cache serves {len(self.page_table)} sequences, all in use")
        return Sequence(self._free_rows.pop())

    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        """Makes room for tokens at the sequence's end, whose keys and values the next step will store."""
        length = len(sequence) + len(tokens)
        if length > self.ctx_size:
            raise NumbaInferError(f"{length} tokens do not fit the context of {self.ctx_size}; raise --ctx-size")
        while len(sequence.pages) * PAGE < length:
            if not self._free_pages:
                raise NumbaInferError("the KV cache is full; raise --ctx-size or run fewer sequences")
            page = self._free_pages.pop()
            self.page_table[sequence.row, len(sequence.pages)] = page
            sequence.pages.append(page)
        sequence.tokens += tokens

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        del sequence.tokens[length:]
        keep = -(-length // PAGE)
        self._free_pages += sequence.pages[keep:][::-1]
        del sequence.pages[keep:]

    def remove(self, sequence: Sequence) -> None:
        """Gives a sequence's pages and row back; it must not be used any more."""
        if sequence.row in self._free_rows:  # the row may be another's by now
            raise ValueError("this sequence was removed before")
        self.truncate(sequence, 0)
        self._free_rows.append(sequence.row)

    def release(self) -> None:
        """Gives all memory back to the pool."""
        for array in (*self.k_pages, *self.v_pages, self.page_table):
            self.pool.release(array)
