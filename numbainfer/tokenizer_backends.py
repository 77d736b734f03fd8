"""The two libraries behind `tokenizer.Tokenizer`, each reduced to the same few operations.

A backend turns text into ids and gives one id's bytes. Bytes, not strings, are what tokens are
made of: a character may be spread over several of them, so text exists only after a UTF-8 decoder
has seen enough bytes (`tokenizer.StreamDecoder`). The libraries load in from 20 to 40 ms and are
imported only when a tokenizer of their kind is built.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numbainfer.errors import NumbaInferError

SPACE = "\u2581"  # sentencepiece writes a space as this character
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# sentencepiece shows one U+FFFD for each byte that is not UTF-8, Python one for each broken sequence.
PER_BYTE = "numbainfer.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(PER_BYTE, _replace_each_byte)


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text as it stands, before the model sees it."""

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class Backend(Protocol):
    """What a tokenizer library must offer. Attributes:

    size: the highest id plus one. bos_id: the BOS that the file itself names, if any.
    adds_bos: whether the file says that encoding starts with it. eos_id: likewise, never added.
    errors: the codec error handler that shows broken UTF-8 as the library does.
    strips_space: whether decoding drops the space that encoding put before a text.
    """

    size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    errors: str
    strips_space: bool

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with no BOS or EOS of the library's own."""

    def token(self, index: int) -> tuple[bytes, bool]:
        """The bytes of a token, and whether it is special; b"" for an id that the vocabulary lacks."""

    def text_of(self, index: int) -> str | None:
        """The token as the vocabulary writes it."""

    def id_of(self, text: str) -> int | None:
        """The id of a token that the vocabulary writes as `text`."""


class JsonBackend:
    """tokenizer.json through `tokenizers`: byte-level BPE, or BPE in sentencepiece's manner."""

    def __init__(self, data: bytes) -> None:
        from tokenizers import Tokenizer as LibraryTokenizer

        try:
            library = LibraryTokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain ValueError or Exception
            raise NumbaInferError(f"tokenizer.json: {error}; fetch the file again") from error
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._added = library.get_added_tokens_decoder()
        self.size = self._highest_id() + 1
        self.bos_id = self._leading_special()
        self.eos_id: int | None = None
        self.adds_bos = self.bos_id is not None
        self._read_decoder()

    def _highest_id(self) -> int:
        base = self._library.get_vocab_size(with_added_tokens=False)
        highest = max(self._added, default=-1)
        # The vocabulary is a map: where its ids leave gaps, the highest one takes a look at all of them.
        # This costs 0.15 s for 150,000 tokens, so only then.
        has_gaps = self._library.id_to_token(base - 1) is None if base else False
        has_more = base not in self._added and self._library.id_to_token(base) is not None
        if has_gaps or has_more:
            return max(self._library.get_vocab().values())
        return max(highest, base - 1)

    def _leading_special(self) -> int | None:
        """The token that the post-processor puts before a text, read off its behaviour."""
        around = self._library.encode("").ids
        plain = self._library.encode("a", add_special_tokens=False).ids
        full = self._library.encode("a").ids
        if not around or full[: 1 + len(plain)] != [around[0], *plain]:
            return None
        return int(around[0])

    def _read_decoder(self) -> None:
        """Which way of writing bytes the vocabulary uses, asked of the decoder rather than of its name:
        the same behaviour goes by several names and compositions."""
        decoder = self._library.decoder
        if decoder is None:
            raise NumbaInferError("tokenizer.json names no decoder; use the file of the original model")
        self._byte_level = decoder.decode(["x\u0120y"]) == "x y"
        if not self._byte_level and decoder.decode([f"x{SPACE}y"]) != "x y":
            raise NumbaInferError("tokenizer.json: only byte-level and sentencepiece-like decoders are known")
        self._byte_fallback = decoder.decode(["x", "<0x79>"]) == "xy"
        self.strips_space = not self._byte_level and decoder.decode([f"{SPACE}x"]) == "x"
        self.errors = "replace" if self._byte_level else PER_BYTE

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def token(self, index: int) -> tuple[bytes, bool]:
        added = self._added.get(index)
        if added is not None:
            return added.content.encode(), added.special
        text = self.text_of(index)
        if text is None:
            return b"", False
        if self._byte_level:
            try:
                return bytes(map(BYTE_OF_CHARACTER.__getitem__, text)), False
            except KeyError:  # a token that is not written in the byte alphabet stands for itself
                return text.encode(), False
        if self._byte_fallback and (match := _BYTE_PIECE.fullmatch(text)):
            return bytes.fromhex(match[1]), False
        return text.replace(SPACE, " ").encode(), False

    def text_of(self, index: int) -> str | None:
        return self._library.id_to_token(index) if 0 <= index < self.size else None

    def id_of(self, text: str) -> int | None:
        return self._library.token_to_id(text)


class SentencePieceBackend:
    """tokenizer.model through `sentencepiece`.

    The library never reads a control token in a text; this class finds them first, as HF's LlamaTokenizer
    does. What follows one is encoded with the leading space of a text's start where `legacy` says so
    (HF's default, and llama.cpp's way), without it otherwise.
    """

    def __init__(self, data: bytes, added: Mapping[int, AddedToken], legacy: bool) -> None:
        self._data = data
        self._processor = self._load(data)
        self._legacy = legacy
        self._mid_text: Any = None
        pieces = self._processor.get_piece_size()
        self._tokens = {
            index: AddedToken(index, self._processor.id_to_piece(index))
            for index in range(pieces)
            if self._processor.is_control(index) or self._processor.is_unknown(index)
        }
        self._tokens.update(added)
        self.size = max(pieces, 1 + max(self._tokens, default=-1))
        self._ids = {token.content: index for index, token in self._tokens.items()}
        self._pieces = pieces
        self._pattern = _alternatives(self._tokens.values()) if self._tokens else None
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = eos if eos >= 0 else None
        self.adds_bos = True
        self.errors = PER_BYTE
        self.strips_space = self._processor.normalize("x").startswith(SPACE)

    @staticmethod
    def _load(data: bytes) -> Any:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            raise NumbaInferError(
                "tokenizer.model is a tiktoken list, not a sentencepiece model; put the model's "
                "tokenizer.json beside it"
            )
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor()
        try:
            if not data:  # the library takes it for "no model yet" and fails at the first use
                raise ValueError("the file is empty")
            processor.LoadFromSerializedProto(bytes(data))
        except Exception as error:  # a RuntimeError with the name of a C++ file, of no help to anyone
            raise NumbaInferError("tokenizer.model is not a whole sentencepiece model; fetch it again") from error
        return processor

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            ids += self._encode_plain(text[position : match.start()], at_start=position == 0)
            found = self._ids.get(match[0])
            ids.append(self._ids[match[0].strip()] if found is None else found)
            position = match.end()
        return ids + self._encode_plain(text[position:], at_start=position == 0)

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        if not text:
            return []
        if at_start or self._legacy:
            return list(self._processor.encode(text))
        if self._mid_text is None:
            # Protocol buffers merge a message that comes twice: this is `normalizer_spec` (field 3, two
            # bytes long) with `add_dummy_prefix` (field 3) false, and everything else as it was.
            self._mid_text = self._load(self._data + b"\x1a\x02\x18\x00")
        return list(self._mid_text.encode(text))

    def token(self, index: int) -> tuple[bytes, bool]:
        added = self._tokens.get(index)
        if added is not None:
            return added.content.encode(), added.special
        text = self.text_of(index)
        if text is None:
            return b"", False
        if self._processor.is_byte(index):
            return bytes.fromhex(text[3:5]), False
        return text.replace(SPACE, " ").encode(), False

    def text_of(self, index: int) -> str | None:
        if index in self._tokens:
            return self._tokens[index].content
        return self._processor.id_to_piece(index) if 0 <= index < self._pieces else None

    def id_of(self, text: str) -> int | None:
        if text in self._ids:
            return self._ids[text]
        index = self._processor.piece_to_id(text)
        return None if self._processor.is_unknown(index) else int(index)


def _alternatives(tokens: Any) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first, with the white space that they swallow."""
    ordered = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile(
        "|".join(
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for token in ordered
            if token.content
        )
    )


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where it prints in Latin-1, else the
    next one free from U+0100 on (GPT-2)."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
