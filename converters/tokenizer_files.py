"""Finds and reads a tokenizer's files: in a checkpoint, beside a .bin, or where the user says."""

from __future__ import annotations

from pathlib import Path

from numbainfer.checkpoint import read_file
from numbainfer.converters.tiktoken_ranks import is_ranks, ranks_metadata
from numbainfer.converters.vocabulary import gguf_tokenizer_files, llama2c_tokenizer_files
from numbainfer.errors import NumbaInferError

# Everything that the ecosystem writes about a tokenizer; a converted model keeps them as they were.
NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def from_directory(directory: Path, vocab_size: object) -> dict[str, bytes]:
    """The tokenizer's files of a checkpoint's directory; empty if they hold no vocabulary.

    A tokenizer.model that is a list of tiktoken ranks becomes a tokenizer.json. vocab_size: see `read`.
    """
    files = {name: read_file(directory / name) for name in NAMES if (directory / name).is_file()}
    if "tokenizer.json" not in files and is_ranks(files.get("tokenizer.model", b"")):
        files = _from_ranks(directory / "tokenizer.model", files.pop("tokenizer.model"), vocab_size) | files
    has_vocabulary = files.keys() & {"tokenizer.json", "tokenizer.model"} or files.keys() >= {
        "vocab.json",
        "merges.txt",
    }
    return files if has_vocabulary else {}


def read(path: Path, vocab_size: object) -> dict[str, bytes]:
    """The tokenizer at `path`: a directory, a tokenizer.json, a sentencepiece or tiktoken .model or a tokenizer.bin.

    vocab_size: the model's, as its config has it; a tokenizer.bin does not say its own. Raises
    NumbaInferError if there is no tokenizer.
    """
    if path.is_dir():
        files = from_directory(path, vocab_size) or beside(path / "model", vocab_size)
        if not files:
            raise NumbaInferError(f"{path} has none of tokenizer.json, tokenizer.model, tokenizer.bin")
        return files
    data = read_file(path)
    if data.lstrip()[:1] == b"{":
        return {"tokenizer.json": data}
    if is_ranks(data):
        return _from_ranks(path, data, vocab_size)
    # A sentencepiece model begins with its first piece, as protobuf has it: tag 0x0a, then a length, never
    # 0. A tokenizer.bin begins with an int32 that is small, so that its second byte is 0.
    if data[:1] == b"\n" and data[1:2] != b"\0":
        return {"tokenizer.model": data}
    if not isinstance(vocab_size, int):
        raise NumbaInferError(f"{path}: the model's config has no vocab_size, which a tokenizer.bin needs")
    try:
        return llama2c_tokenizer_files(data, vocab_size)
    except NumbaInferError as error:
        raise NumbaInferError(f"{path}: {error}") from error


def _from_ranks(path: Path, data: bytes, vocab_size: object) -> dict[str, bytes]:
    try:
        return gguf_tokenizer_files(ranks_metadata(data, vocab_size))
    except NumbaInferError as error:
        raise NumbaInferError(f"{path}: {error}") from error


def beside(model: Path, vocab_size: object) -> dict[str, bytes]:
    """The tokenizer that lies beside the file `model`; empty if none does.

    llama2.c's trainer names its tokenizers by vocabulary size, so that name comes first.
    """
    for name in (f"tok{vocab_size}.bin", "tokenizer.bin", "tokenizer.model", "tokenizer.json"):
        path = model.with_name(name)
        if path.is_file():
            return read(path, vocab_size)
    return {}
