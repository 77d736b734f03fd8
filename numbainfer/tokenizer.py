"""Text to token ids and back: one face over `tokenizers` and `sentencepiece`.

A `Tokenizer` is built from the small files that lie beside a checkpoint, given as bytes, so that a
converter can make them from a GGUF as well as read them from a directory. Everything that these files
say about special tokens is settled here, once: which id starts a text, which ids end one, and which
chat template the model was trained with.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from numbainfer.errors import NumbaInferError
from numbainfer.tokenizer_backends import AddedToken, Backend, JsonBackend, SentencePieceBackend

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)


class StreamDecoder:
    """Turns ids into text one at a time, each at a cost that does not grow with the text.

    The texts that `push` returns, and what `flush` returns at the end, join to `Tokenizer.decode` of the
    same ids. Bytes that a later token may complete to a character wait; bytes that none can complete
    become U+FFFD. Get one from `Tokenizer.stream`.
    """

    def __init__(
        self, token: Callable[[int], tuple[bytes, bool]], errors: str, strip_space: bool, skip_special: bool
    ) -> None:
        self._token = token
        self._skip_special = skip_special
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """The text that is whole now that `token_id` has come: "" while a character is unfinished."""
        data, special = self._token(token_id)
        if special and self._skip_special:
            return ""
        if data and self._strip_space:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        files: the files that it was built from, as they were, without config.json (the model's own).
        vocab_size: its highest id plus one; a model may have more rows than that, never fewer.
        bos_id: the id that starts a text, or None.
        eos_ids: the ids that end one: generation_config's, then config's, then tokenizer_config's.
        add_bos: whether `encode` starts with `bos_id` unless told otherwise.
        special_tokens: "bos_token", "eos_token", ... as text, for chat templates.
        chat_template: the Jinja source, or None.
    """

    def __init__(self, files: Mapping[str, bytes], vocab_size: int | None = None) -> None:
        self._given = {name: bytes(files[name]) for name in TOKENIZER_FILES if name in files}
        self._rows = vocab_size
        self.files = {name: data for name, data in self._given.items() if name != "config.json"}
        settings = self._read_object("tokenizer_config.json")
        self._backend = self._open_backend(settings)
        self.vocab_size = self._backend.size
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise NumbaInferError(
                f"the tokenizer has ids up to {self.vocab_size - 1} and the model only {vocab_size} rows: "
                "they belong to different models; use the tokenizer that came with the weights"
            )
        config = self._read_object("config.json")
        generation = self._read_object("generation_config.json")
        self.special_tokens = self._read_special_tokens(settings)
        self.bos_id = self._find_bos(settings, generation, config)
        self.eos_ids = self._find_eos(generation, config)
        adds_bos = settings.get("add_bos_token")
        if not isinstance(adds_bos, bool):
            adds_bos = self._backend.adds_bos and self.bos_id == self._backend.bos_id
        self.add_bos = adds_bos and self.bos_id is not None
        self.chat_template = self._find_chat_template(settings)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], vocab_size: int | None = None) -> Tokenizer:
        """A tokenizer from file names (those of `TOKENIZER_FILES`; others are passed over) and contents.

        vocab_size: the rows of the model's embedding, if known. Raises NumbaInferError where the files
        are broken, contradict each other or the model, or hold neither kind of vocabulary.
        """
        return cls(files, vocab_size)

    @classmethod
    def from_directory(cls, path: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """The same from the files in a directory."""
        folder = Path(path)
        try:
            files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
        except OSError as error:
            raise NumbaInferError(f"{error.filename}: {error.strerror}") from error
        if "tokenizer.json" not in files and "tokenizer.model" not in files:
            raise NumbaInferError(f"{folder}: no tokenizer.json or tokenizer.model there; add the model's own")
        return cls(files, vocab_size)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._given, self._rows)

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """The ids of a text. Special tokens written in it ("<|im_start|>") become their ids.

        bos: whether to start with `bos_id`; None follows `add_bos`. A text that starts with it already, as
        most chat templates' output does, gets no second one. Nothing is added at the end.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair: bytes that the shell could not decode
            raise NumbaInferError("the text is not valid Unicode; give it as UTF-8") from error
        ids = self._backend.encode(text)
        if self._rows is not None and ids and max(ids) >= self._rows:
            raise NumbaInferError(f"the tokenizer gives id {max(ids)}, past the model's {self._rows} rows")
        wanted = self.add_bos if bos is None else bos
        if wanted and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, at_start: bool = True) -> str:
        """The text of some ids; bytes that are not UTF-8 show as U+FFFD, unknown ids as nothing.

        at_start: the ids start a text, so the space that sentencepiece puts there goes. Give False for
        ids that carry a text on.
        """
        stream = self.stream(skip_special=skip_special, at_start=at_start)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, skip_special: bool = True, at_start: bool = True) -> StreamDecoder:
        """A decoder for ids that come one at a time; the options are `decode`'s."""
        backend = self._backend
        return StreamDecoder(backend.token, backend.errors, at_start and backend.strips_space, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; b"" for an id that the vocabulary lacks."""
        return self._backend.token(token_id)[0]

    def is_special(self, token_id: int) -> bool:
        """Whether a token is no text but a mark, such as BOS or "<|im_end|>"."""
        return self._backend.token(token_id)[1]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it ("<|im_end|>"), or None."""
        return self._backend.id_of(token)

    def _read_json(self, name: str) -> Any:
        if name not in self._given:
            return None
        try:
            return json.loads(self._given[name])
        except (ValueError, RecursionError) as error:
            raise NumbaInferError(f"{name} is not valid JSON ({error}); fetch the file again") from error

    def _read_object(self, name: str) -> dict[str, Any]:
        content = self._read_json(name)
        if content is not None and not isinstance(content, dict):
            raise NumbaInferError(f"{name} does not hold a JSON object; fetch the file again")
        return content or {}

    def _open_backend(self, settings: Mapping[str, Any]) -> Backend:
        if "tokenizer.json" in self._given:
            return JsonBackend(self._given["tokenizer.json"])
        if "tokenizer.model" in self._given:
            legacy = settings.get("legacy") is not False
            return SentencePieceBackend(self._given["tokenizer.model"], self._added_tokens(settings), legacy)
        raise NumbaInferError("neither tokenizer.json nor tokenizer.model is there; add the model's own")

    def _added_tokens(self, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
        """The tokens that HF keeps beside a sentencepiece model."""
        try:
            added = {
                int(index): AddedToken(int(index), str(text))
                for text, index in self._read_object("added_tokens.json").items()
            }
            for key, entry in (settings.get("added_tokens_decoder") or {}).items():
                flags = {flag: bool(entry.get(flag, flag == "special")) for flag in ("special", "lstrip", "rstrip")}
                added[int(key)] = AddedToken(int(key), str(entry["content"]), **flags)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise NumbaInferError(f"tokenizer_config.json: bad added token ({error!r})") from error
        if any(index < 0 for index in added):
            raise NumbaInferError("tokenizer_config.json: an added token has a negative id")
        return added

    def _read_special_tokens(self, settings: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        merged = {**self._read_object("special_tokens_map.json"), **settings}
        for name, value in merged.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
        for name, index in (("bos_token", self._backend.bos_id), ("eos_token", self._backend.eos_id)):
            text = None if index is None or name in merged else self._backend.text_of(index)
            if text is not None:
                found[name] = text
        return found

    def _find_bos(
        self, settings: Mapping[str, Any], generation: Mapping[str, Any], config: Mapping[str, Any]
    ) -> int | None:
        text = self.special_tokens.get("bos_token")
        if text is not None:
            index = self._backend.id_of(text)
            if index is None:
                raise NumbaInferError(f"tokenizer_config.json: bos_token {text!r} is not in the vocabulary")
            return index
        if "bos_token" in settings:  # null there says that the model has none, whatever config.json says
            return None
        named = _id_list(generation, "generation_config.json", "bos_token_id")
        return next(iter(named or _id_list(config, "config.json", "bos_token_id")), None)

    def _find_eos(self, generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
        ids = _id_list(generation, "generation_config.json", "eos_token_id")
        ids += _id_list(config, "config.json", "eos_token_id")
        text = self.special_tokens.get("eos_token")
        index = None if text is None else self._backend.id_of(text)
        if index is not None:
            ids.append(index)
        return tuple(dict.fromkeys(ids))

    def _find_chat_template(self, settings: Mapping[str, Any]) -> str | None:
        if "chat_template.jinja" in self._given:
            try:
                return self._given["chat_template.jinja"].decode()
            except UnicodeDecodeError as error:
                raise NumbaInferError("chat_template.jinja is not UTF-8; fetch the file again") from error
        template = settings.get("chat_template")
        if template is None:
            template = self._read_object("chat_template.json").get("chat_template")
        if isinstance(template, list):  # several by name, as some models offer one for tools
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise NumbaInferError("tokenizer_config.json: chat_template is neither text nor a list of named texts")
        return template


def _id_list(content: Mapping[str, Any], file: str, key: str) -> list[int]:
    """A token id, a list of them or null, as HF's configurations write it."""
    value = content.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise NumbaInferError(f"{file}: {key} must be a token id or a list of them, not {value!r}")
    return list(ids)
