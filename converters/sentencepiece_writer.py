"""Writes sentencepiece models (tokenizer.model) from a list of pieces, scores and types.

The format is a protocol buffer of two dozen fields in all, of which a model needs half: thirty lines
write it, and no dependency is needed.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from enum import IntEnum

from numbainfer.errors import NumbaInferError


class TokenType(IntEnum):
    """The kinds of tokens, numbered as both GGUF and sentencepiece number them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def guess_type(token: str) -> int:
    """The kind of a token in a vocabulary that does not say: all that shows is a byte."""
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else TokenType.NORMAL


def sentencepiece_model(
    pieces: Sequence[tuple[str, float, int]],
    *,
    unk: int = 0,
    bos: int | None = None,
    eos: int | None = None,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """A sentencepiece BPE model in its own file format.

    pieces: text, score and `TokenType` of each id. The numbers below are the fields of
    sentencepiece_model.proto: ModelProto, its trainer_spec (2) and its normalizer_spec (3).
    """
    names = [text for text, _, _ in pieces]
    if len(set(names)) != len(names) or "" in names:
        raise NumbaInferError("the vocabulary has an empty token or the same one twice")
    if any(math.isnan(score) for _, score, _ in pieces):
        raise NumbaInferError("the vocabulary has a score that is not a number")
    byte_pieces = sum(kind == TokenType.BYTE for _, _, kind in pieces)
    if byte_pieces not in (0, 256):
        raise NumbaInferError(f"the vocabulary has {byte_pieces} of the 256 byte tokens")
    model = b"".join(
        _field(1, _field(1, text.encode()) + _field(2, float(score)) + _field(3, int(kind)))
        for text, score, kind in pieces
    )
    trainer = _field(3, 2) + _field(4, len(pieces)) + _field(35, int(byte_pieces > 0))  # model_type 2: BPE
    # An id of -1 means "none"; the library finds BOS and EOS by their texts (46, 47).
    trainer += _field(40, unk) + _field(45, names[unk].encode()) + _field(43, -1)
    for id_field, name_field, index in ((41, 46, bos), (42, 47, eos)):
        trainer += _field(id_field, -1 if index is None else index)
        trainer += _field(name_field, b"" if index is None else names[index].encode())
    normalizer = _field(1, b"identity") + _field(3, int(add_dummy_prefix))
    normalizer += _field(4, int(remove_extra_whitespaces)) + _field(5, 1)
    return model + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field in protocol buffers' wire format: a varint, a float32 or a run of bytes, by its type."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, low ones first; a negative number as its 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
