"""What every reader yields: a model as Hugging Face would have it, whatever file it came from."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from numbainfer.checkpoint import is_checkpoint
from numbainfer.converters.source_options import NO_OPTIONS, SourceOptions
from numbainfer.errors import NumbaInferError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SourceTensor:
    """A weight under its Hugging Face name, read a few rows at a time.

    dtype is "float32", "float16" or "bfloat16" and says what `rows` returns; bfloat16 comes as uint16 bits. (Within a
    reader it may be any other: the parts of a quantized matrix.)
    """

    name: str  # e.g. "model.layers.0.self_attn.q_proj.weight"
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Array] = field(repr=False)
    computed: bool = False  # rows are worked out rather than looked at: worth doing several chunks at once

    def rows(self, start: int, stop: int) -> Array:
        """Rows start..stop of the first axis, [stop - start, *shape[1:]].

        A view of the mapped file where the format allows, else computed, in memory in proportion to
        the rows asked for. IndexError outside the shape.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {self.name}, which has {self.shape[0]}")
        return self.read(start, stop)


@dataclass
class Source:
    """An opened model. RoPE layouts are Hugging Face's half-split, whatever the file has."""

    path: Path
    format: str  # "huggingface", "gguf", "llama2c", "meta" or "numbainfer"
    config: dict[str, Any]  # in the schema of Hugging Face's config.json
    generation_config: dict[str, Any] | None
    tokenizer_files: dict[str, bytes]  # file name -> content; empty where the source carries no tokenizer
    tensors: dict[str, SourceTensor]
    mappings: list[mmap.mmap] = field(default_factory=list)  # of the files

    def forget_pages(self) -> None:
        """Lets what was read of the files so far leave memory; it is read again where an earlier view is used."""
        if hasattr(mmap, "MADV_DONTNEED"):  # Unix
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the files; arrays that were handed out stay valid and keep their mapping."""
        self.tensors.clear()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_source(path: Path | str, options: SourceOptions = NO_OPTIONS, *, require_tokenizer: bool = True) -> Source:
    """Open a model in any format that can be read, told by its content.

    A directory is a Hugging Face checkpoint (config.json), Meta's (params.json) or a GGUF in a directory of its own; a
    file that starts with "GGUF" is that, PyTorch's zip a checkpoint of llama2.c's trainer, and any other file must be
    a .bin of llama2.c's lineage whose header fits its size.

    require_tokenizer: False lets a source without any tokenizer open (tokenizer_files is then empty).
    Whatever is wrong with the path or the files raises NumbaInferError.
    """
    from numbainfer.converters import tokenizer_files  # the readers import this module

    path = Path(path)
    try:
        source = _open(path, options)
        vocab_size = source.config.get("vocab_size")
        if options.tokenizer is not None:
            source.tokenizer_files = tokenizer_files.read(Path(options.tokenizer), vocab_size)
        elif source.format == "llama2c":
            source.tokenizer_files = tokenizer_files.beside(path, vocab_size)
    except OSError as error:
        raise NumbaInferError(f"cannot read {path}: {error.strerror or error}") from error
    if require_tokenizer and not source.tokenizer_files:
        where = "into it" if path.is_dir() else "(or tokenizer.bin) beside it"
        raise NumbaInferError(
            f"{path} has no tokenizer; put tokenizer.json or tokenizer.model {where}, or give --tokenizer"
        )
    return source


def require_path(path: Path) -> None:
    """Refuses a path where nothing is."""
    if not path.exists():
        problem = "a symbolic link that leads nowhere" if path.is_symlink() else "no such file or directory"
        raise NumbaInferError(f"{path}: {problem}")


def _open(path: Path, options: SourceOptions) -> Source:
    require_path(path)
    if path.is_dir():
        return _open_directory(path, options)
    if not path.is_file():
        raise NumbaInferError(f"{path} is neither a file nor a directory")
    with path.open("rb") as file:
        head = file.read(256)

    # Imported when needed: the gguf library takes a quarter of a second.
    if head[:4] == b"GGUF":
        from numbainfer.converters import gguf

        options.refuse_config("a GGUF does")
        return gguf.open_gguf(path)
    if head[:2] in (b"PK", b"\x80\x02"):
        from numbainfer.converters import meta

        return meta.open_training_checkpoint(path, options)
    from numbainfer.converters import llama2c

    if llama2c.is_plausible_header(head):
        return llama2c.open_llama2c(path, options)
    raise NumbaInferError(f"{path} is not a model that numbainfer reads: {_guess(head)}")


def _open_directory(path: Path, options: SourceOptions) -> Source:
    if is_checkpoint(path):
        from numbainfer.converters import converted

        options.refuse_config("a converted model does")
        return converted.open_converted(path)
    if (path / "config.json").is_file():
        from numbainfer.converters import huggingface

        options.refuse_config("a Hugging Face checkpoint does")
        return huggingface.open_huggingface(path)
    if (path / "params.json").is_file():
        from numbainfer.converters import meta

        return meta.open_meta(path, options)
    ggufs = sorted(path.glob("*.gguf"))
    if len({re.sub(r"-\d{5}-of-\d{5}", "", gguf.name) for gguf in ggufs}) == 1:
        return _open(ggufs[0], options)
    if ggufs:
        raise NumbaInferError(f"{path} has several GGUF models; give one of them, such as {ggufs[0]}")
    hint = "it has no config.json and no params.json" if any(path.iterdir()) else "it is empty"
    raise NumbaInferError(f"{path} is not a model directory: {hint}")


def _guess(head: bytes) -> str:
    """What a file that no reader knows may be, in words that say what to do."""
    if not head:
        return "it is empty"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "it looks like safetensors; give the directory that has it and its config.json"
    return "give a Hugging Face or Meta directory, a .gguf, or a .bin or .pt of llama2.c"


Rows = Callable[[int, int], Array]  # (start, stop) -> those rows


def half_split(rows: Rows, head_dim: int) -> Rows:
    """Rows of a q or k projection in Hugging Face's order, from those of one whose heads' rows are interleaved.

    RoPE turns pairs of a head's elements: (2j, 2j + 1) in Meta's layout, (j, j + head_dim/2) in Hugging Face's. So a
    head's evens come first and then its odds.
    """

    def read(start: int, stop: int) -> Array:
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim  # whole heads
        head, row = np.divmod(np.arange(start, stop), head_dim)
        part, pair = np.divmod(row, head_dim // 2)
        return rows(first, last)[head * head_dim + 2 * pair + part - first]

    return read


def interleaved(rows: Rows, head_dim: int) -> Rows:
    """The other way round: rows of a projection in Meta's order, from those of one in Hugging Face's."""

    def read(start: int, stop: int) -> Array:
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim  # whole heads
        head, row = np.divmod(np.arange(start, stop), head_dim)
        pair, part = np.divmod(row, 2)
        return rows(first, last)[head * head_dim + head_dim // 2 * part + pair - first]

    return read


def stacked(parts: Sequence[tuple[int, Rows]]) -> Rows:
    """Rows of matrices one below the other, each given as its number of rows and how to read them."""

    def read(start: int, stop: int) -> Array:
        found: list[Array] = []
        offset = 0
        for count, rows in parts:
            first, last = max(start - offset, 0), min(stop - offset, count)
            if first < last or (not found and first == last):
                found.append(rows(first, last))
            offset += count
        return found[0] if len(found) == 1 else np.concatenate(found)

    return read
