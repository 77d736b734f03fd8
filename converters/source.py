"""What every reader yields: a model as Hugging Face would have it, whatever file it came from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from numbainfer.errors import NumbaInferError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SourceTensor:
    """A weight under its Hugging Face name, read a few rows at a time.

    dtype is "float32", "float16" or "bfloat16" and says what `rows` returns; bfloat16 comes as uint16 bits.
    """

    name: str  # e.g. "model.layers.0.self_attn.q_proj.weight"
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Array] = field(repr=False)

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
    format: str  # "huggingface", "gguf" or "llama2c"
    config: dict[str, Any]  # in the schema of Hugging Face's config.json
    generation_config: dict[str, Any] | None
    tokenizer_files: dict[str, bytes]  # file name -> content; empty where the source carries no tokenizer
    tensors: dict[str, SourceTensor]

    def close(self) -> None:
        """Let go of the files; arrays that were handed out stay valid and keep their mapping."""
        self.tensors.clear()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_source(path: Path | str, *, tokenizer: Path | str | None = None, require_tokenizer: bool = True) -> Source:
    """Open a model in any format that can be read, told by its content.

    A directory with config.json is a Hugging Face checkpoint, a file that starts with "GGUF" is that, and
    any other file must be a llama2.c .bin whose header fits its size.

    tokenizer: a tokenizer file or directory to use in place of what the source carries.
    require_tokenizer: False lets a source without any tokenizer open (tokenizer_files is then empty).
    Whatever is wrong with the path or the files raises NumbaInferError.
    """
    from numbainfer.converters import tokenizer_files  # the readers import this module

    path = Path(path)
    try:
        source = _open(path)
        vocab_size = source.config.get("vocab_size")
        if tokenizer is not None:
            source.tokenizer_files = tokenizer_files.read(Path(tokenizer), vocab_size)
        elif source.format == "llama2c":
            source.tokenizer_files = tokenizer_files.beside(path, vocab_size)
    except OSError as error:
        raise NumbaInferError(f"cannot read {path}: {error.strerror or error}") from error
    if require_tokenizer and not source.tokenizer_files:
        where = "into it" if path.is_dir() else "(or tokenizer.bin) beside it"
        raise NumbaInferError(f"{path} has no tokenizer; put tokenizer.json or tokenizer.model {where}")
    return source


def require_path(path: Path) -> None:
    """Refuses a path where nothing is, with a hint if it has the form of a hub id."""
    if not path.exists():
        problem = "a symbolic link that leads nowhere" if path.is_symlink() else "no such file or directory"
        raise NumbaInferError(f"{path}: {problem}{_hub_hint(path)}")


def _open(path: Path) -> Source:
    require_path(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            from numbainfer.converters import huggingface

            return huggingface.open_huggingface(path)
        hint = "it has no config.json" if any(path.iterdir()) else "it is empty"
        raise NumbaInferError(f"{path} is not a model directory: {hint}")
    if not path.is_file():
        raise NumbaInferError(f"{path} is neither a file nor a directory")
    with path.open("rb") as file:
        head = file.read(28)

    if head[:4] == b"GGUF":
        # Imported when needed: the gguf library takes a quarter of a second.
        from numbainfer.converters import gguf

        return gguf.open_gguf(path)
    from numbainfer.converters import llama2c

    if llama2c.is_plausible_header(head):
        return llama2c.open_llama2c(path)
    raise NumbaInferError(f"{path} is not a model that numbainfer reads: {_guess(head)}")


def _hub_hint(path: Path) -> str:
    """What to do about a missing path that has the form of a Hugging Face hub id, else nothing."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path.as_posix()) or os.path.lexists(path.parent):
        return ""
    return (
        "; if it is a Hugging Face hub id: downloading is not supported yet, so download it "
        f"(hf download {path.as_posix()} --local-dir DIR) and give DIR"
    )


def _guess(head: bytes) -> str:
    """What a file that no reader knows may be, in words that say what to do."""
    if not head:
        return "it is empty"
    if head[:2] == b"PK" or head[:2] == b"\x80\x02":
        return "it looks like a PyTorch file; save the model as safetensors, and give its directory"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "it looks like safetensors; give the directory that has it and its config.json"
    if head[:4] == b"24ka":  # "ak42" little-endian, llama2.c's versions 1 and 2
        return "it is a llama2.c export of version 1 or 2; only version 0 (float32) is supported yet"
    return "give a Hugging Face directory, a .gguf or a llama2.c .bin (version 0)"


def half_split_rows(start: int, stop: int, head_dim: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where rows start..stop of a half-split q or k projection lie in its interleaved twin.

    Returns int64 [stop - start]. RoPE turns pairs of a head's elements: (2j, 2j + 1) in Meta's layout,
    (j, j + head_dim/2) in Hugging Face's.
    """
    head, row = np.divmod(np.arange(start, stop, dtype=np.int64), head_dim)
    part, pair = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * pair + part
