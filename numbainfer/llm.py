"""The Python API: a model as an object.

from numbainfer import LLM, SamplingParams

with LLM("./qwen") as llm:
    print(llm.chat([{"role": "user", "content": "Why is the sky blue?"}]).text)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, cast, overload

import numpy as np

from numbainfer import chat
from numbainfer.converters.source_options import SourceOptions
from numbainfer.device import Device
from numbainfer.engine import Engine
from numbainfer.errors import NumbaInferError
from numbainfer.generation import Generation, Reply
from numbainfer.loading import LoadedModel, load
from numbainfer.progress import Progress
from numbainfer.sampling_params import SamplingParams
from numbainfer.speculation import DraftModel, lookup

Prompt: TypeAlias = "str | Sequence[int]"
Messages: TypeAlias = "Sequence[Mapping[str, Any]]"

# One model computes at a time, whichever thread asks: the CPU's worker threads are one team for the whole process.
_COMPUTING = threading.RLock()


class LLM:
    """A model with its tokenizer, ready to generate.

    Args:
        model: what the command line takes as MODEL: a converted directory, a Hugging Face checkpoint directory, a
            .gguf, a llama2.c .bin or a hub id; None for the demo model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        ctx_size: tokens that a prompt and its reply may have together; None for what the model was trained for, up to
            4096; 0 for all of it.
        batch_size: how many prompts are computed together at most. Each has room for ctx_size tokens in the KV cache;
            on the CPU, room that is not used takes no memory.
        threads: CPU threads; None for one per physical core.
        tokenizer: a tokenizer's file or directory, for a llama2.c .bin that has none beside it.
        speculate: guess what the text has said before and let the model check several tokens at once: the same text,
            faster where it repeats itself (code that is edited, quotations). Where one prompt runs alone.
        draft: let a smaller model with the same vocabulary guess instead: what `model` can be.
        progress: called with (what is going on, how much is done, of how much) while the model is opened.

    Methods may be called from several threads; they take turns. All errors that a user can do something about are
    NumbaInferError, and leave the object as usable as before.

    Where no SamplingParams are given, the model's own generation_config counts, then what the command line has:
    temperature 0.7, top_k 40, top_p 0.95.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        ctx_size: int | None = None,
        batch_size: int = 16,
        threads: int | None = None,
        tokenizer: str | Path | None = None,
        speculate: bool = False,
        draft: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        if batch_size < 1:
            raise NumbaInferError(f"batch_size must be 1 or more, not {batch_size}")
        run_on, options = Device.parse(device), SourceOptions(tokenizer=tokenizer)
        self._loaded: LoadedModel | None = None
        self._draft: LoadedModel | None = None
        with _COMPUTING:
            self._loaded = load(
                model,
                device=run_on,
                ctx_size=ctx_size,
                threads=threads,
                source_options=options,
                sequences=batch_size,
                progress=progress,
            )
            engine = self._loaded.engine
            engine.drafter = lookup if speculate else None
            if draft is not None:
                self._draft = load(draft, device=run_on, ctx_size=ctx_size, threads=threads, progress=progress)
                engine.drafter = DraftModel(self._draft.engine, engine)

    @property
    def engine(self) -> Engine:
        """The engine below, for loops of one's own: `prefill` and `decode` give logits. It knows nothing of threads."""
        return self._open().engine

    @property
    def ctx_size(self) -> int:
        """How many tokens a prompt and its reply may have together."""
        return self.engine.ctx_size

    def default_params(self, **changes: Any) -> SamplingParams:
        """The parameters that count where none are given, with some of them changed."""
        return self._open().params(**changes)

    @overload  # a text is a sequence of texts too: the first form comes first
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: SamplingParams | None = None
    ) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generation | list[Generation]:
        """Continues a prompt, or each of several, which are computed together: batch_size of them in every step.

        prompts: text or token ids, as they are, without a chat template. params: for all, or one for each.
        Returns a Generation (text, tokens, finish_reason, logprobs, statistics) for one prompt, a list for a list.
        """
        one = _is_one(prompts)
        several = cast("Sequence[Prompt]", [prompts] if one else prompts)
        each = [params] * len(several) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(several):
            raise NumbaInferError(
                f"{len(each)} parameters for {len(several)} prompts: give one for all or one for each"
            )
        generations = self._run(list(zip(several, each, strict=True)))
        return generations[0] if one else generations

    def chat(self, messages: Messages, params: SamplingParams | None = None, **template: Any) -> Generation:
        """The reply to a conversation: messages are dictionaries with "role" and "content", as OpenAI's API has them.

        A conversation that goes on from an earlier one is computed from where they part. template: variables for the
        model's chat template, such as `enable_thinking=False` for Qwen3.
        """
        return self._run([(self._render(messages, template), params)], continues=False)[0]

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None, **template: Any) -> Stream:
        """The same piece by piece, for a prompt or for a conversation: iterate over the result."""
        conversation = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        text = self._render(prompt, template) if conversation else prompt  # type: ignore[arg-type]
        with _COMPUTING:
            engine = self.engine
            reply = self._reply(text, params, continues=not conversation)  # type: ignore[arg-type]
            return Stream(self, engine.run([reply]), reply.generation)

    def logits(self, text: Prompt) -> np.ndarray:
        """What the model says about each next token of a text: float32 [tokens, vocabulary].

        Row i is what follows token i of `tokenize(text)`. A vocabulary of 150,000 takes 0.6 MB a token.
        """
        with _COMPUTING:
            engine = self.engine
            tokens = self._tokens(text)
            self._reply(tokens, SamplingParams(max_tokens=0))  # which checks the tokens
            return np.concatenate([part.copy() for _, part in engine.logits(tokens)])

    def tokenize(self, text: str, *, bos: bool | None = None) -> list[int]:
        """The token ids of a text. bos: whether to begin with the token that begins texts; None as the model wants."""
        return self.engine.tokenizer.encode(text, bos=bos)

    def detokenize(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids."""
        return self.engine.tokenizer.decode(tokens, skip_special=skip_special)

    def close(self) -> None:
        """Gives the memory back. A second call does nothing; every other method then raises NumbaInferError."""
        with _COMPUTING:
            for loaded in (self._loaded, self._draft):
                if loaded is not None:
                    loaded.engine.model.release()
                    loaded.engine.model.ops.pool.trim()
            self._loaded = self._draft = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> LoadedModel:
        if self._loaded is None:
            raise NumbaInferError("this LLM is closed")
        return self._loaded

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]

    def _render(self, messages: Messages, template: dict[str, Any]) -> str:
        if not all(isinstance(message, Mapping) for message in messages):
            raise NumbaInferError('messages are dictionaries: {"role": "user", "content": "..."}')
        return chat.render(self.engine.tokenizer, messages, **template)

    def _reply(self, prompt: Prompt, params: SamplingParams | None, *, continues: bool = True) -> Reply:
        params = self.default_params() if params is None else params
        return self.engine.reply(self._tokens(prompt), params, continues=continues)

    def _run(
        self, requests: Sequence[tuple[Prompt, SamplingParams | None]], *, continues: bool = True
    ) -> list[Generation]:
        with _COMPUTING:
            replies = [self._reply(prompt, params, continues=continues) for prompt, params in requests]
            for _ in self.engine.run(replies):
                pass
        return [reply.generation for reply in replies]


class Stream:
    """The pieces of a reply as they come: an iterator of texts. `generation` has what is there so far.

    Break off whenever you like: `close`, or leaving a `with` block, ends the reply with finish_reason "cancelled".
    Several may be open at a time, each with a place of its own in the KV cache, batch_size of them at most.
    """

    def __init__(self, llm: LLM, pieces: Iterator[tuple[Reply, str]], generation: Generation) -> None:
        self.generation = generation
        self._llm = llm
        self._pieces = pieces

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with _COMPUTING:
            self._llm._open()
            return next(self._pieces)[1]

    def close(self) -> None:
        """Ends the reply."""
        with _COMPUTING:
            self._pieces.close()  # type: ignore[attr-defined]
        self.generation.finish_reason = self.generation.finish_reason or "cancelled"

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt: a text, or token ids."""
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(one, (int, np.integer)) for one in prompts))
