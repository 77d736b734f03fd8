"""What `numbainfer run` does with a loaded model: prompts of a conversation, replies on the screen."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from numbainfer import chat
from numbainfer.console import has_colours, note, paint
from numbainfer.errors import NumbaInferError
from numbainfer.generation import Generation
from numbainfer.loading import LoadedModel
from numbainfer.reasoning import ReasoningSplitter

_DIM, _PLAIN = "\033[2m", "\033[0m"


class Session:
    """A loaded model with the options of one command. An instruct model's template is applied unless `raw`.

    template: variables for the chat template.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        raw: bool,
        system: str | None,
        max_tokens: int,
        stop: tuple[str, ...],
        sampling: dict[str, Any],
        template: dict[str, Any] | None = None,
    ) -> None:
        self.engine = loaded.engine
        self.tokenizer = loaded.engine.tokenizer
        self.templated = not raw and self.tokenizer.chat_template is not None
        if system is not None and not self.templated:
            raise NumbaInferError("--system needs a chat model, and no --raw")
        self.conversation = chat.Conversation(system)
        self.dropped = 0  # turns that the context had no room for
        self.params = loaded.params(**sampling, max_tokens=max_tokens, stop=stop)
        self._template = template or {}
        self._prompt_text = ""
        self._known: tuple[str, list[int]] = ("", [])  # the text of the last turn and its tokens

    def prompt_tokens(self, text: str) -> list[int]:
        """The tokens that ask for a reply to `text`, after the conversation so far.

        Where a quarter of the context would not be left for the reply, the oldest turns are dropped, so many that half
        of it is free: the prompt has to be computed anew then, which should not happen at every turn.
        """
        if not self.templated:
            self._prompt_text = text
            return self.tokenizer.encode(text)
        self.conversation.user(text)
        size = self.engine.ctx_size
        tokens = self._render()
        if len(tokens) + min(self.params.max_tokens, size // 4) > size:
            while len(tokens) > size // 2 and self._drop(1 - size // 2 / len(tokens)):
                tokens = self._render()
        return tokens

    def _drop(self, share: float) -> bool:
        """Drops the oldest turns that have that share of all characters, one at least; False where none can go."""
        left = share * sum(len(message["content"]) for message in self.conversation.messages())
        before = self.dropped
        while (characters := self.conversation.drop_oldest()) > 0:
            self.dropped += 1
            left -= characters
            if left <= 0:
                break
        return self.dropped > before

    def _render(self) -> list[int]:
        """The conversation's tokens. What was generated stays as the tokens that it was: encoding its text could give
        others, and the KV cache would have to be computed anew from there."""
        text = chat.render(self.tokenizer, self.conversation.messages(), **self._template)
        self._prompt_text = text
        known_text, known_tokens = self._known
        if known_tokens and text.startswith(known_text):
            rest = self.tokenizer.encode(text[len(known_text) :], bos=False)
            if rest and self.tokenizer.is_special(rest[0]):  # anything else might join with what stands before it
                return known_tokens + rest
        return self.tokenizer.encode(text)

    def stream(self, tokens: list[int], *, echo: bool = True, seed: int | None = None) -> Generation:
        """Generates, printing pieces to stdout as they come. Ctrl-C ends the reply: finish_reason "cancelled"."""
        params = self.params if seed is None else replace(self.params, seed=seed)
        generation, pieces = self.engine.generate(tokens, params, continues=not self.templated)
        screen = Screen(self._prompt_text if self.templated else None)
        try:
            for piece in pieces:
                if echo:
                    screen.show(piece)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            generation.finish_reason = "cancelled"
        finally:
            if echo:
                screen.end()
        if self.templated and self.tokenizer.decode(generation.tokens) == generation.text:  # no stop text cut off
            self._known = (self._prompt_text + generation.text, generation.prompt + generation.tokens)
        return generation


class Screen:
    """Writes a reply to stdout as it comes; reasoning dimmed, where stdout is a terminal. prompt_text None: no chat,
    so no reasoning."""

    def __init__(self, prompt_text: str | None) -> None:
        self._splitter = None
        if prompt_text is not None and has_colours(sys.stdout):
            self._splitter = ReasoningSplitter(prompt_text)
        self._dim = False

    def show(self, piece: str) -> None:
        """Writes what can be written."""
        self._write(self._splitter.push(piece) if self._splitter else [(piece, False)])

    def end(self) -> None:
        """Writes the rest, and leaves the terminal as it was."""
        self._write([*(self._splitter.flush() if self._splitter else []), ("", False)])

    def _write(self, parts: list[tuple[str, bool]]) -> None:
        for text, reasoning in parts:
            if reasoning != self._dim:
                sys.stdout.write(_DIM if reasoning else _PLAIN)
                self._dim = reasoning
            sys.stdout.write(text)
        sys.stdout.flush()


def reply(session: Session, prompt: str, *, show_statistics: bool, as_json: bool) -> int:
    """One reply to stdout; returns the exit code."""
    generation = session.stream(session.prompt_tokens(prompt), echo=not as_json)
    if as_json:
        print(json.dumps(_as_dict(session, generation), ensure_ascii=False))
    else:
        print(flush=True)
    report(session, generation, show_statistics)
    return 130 if generation.finish_reason == "cancelled" else 0


def _as_dict(session: Session, generation: Generation) -> dict[str, Any]:
    """What `run --json` prints."""

    def named(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": session.tokenizer.decode([token], at_start=False), "logprob": round(logprob, 6)}

    told: dict[str, Any] = {
        "prompt_tokens": generation.prompt,
        "tokens": generation.tokens,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "stats": generation.statistics.as_dict(),
    }
    if session.params.logprobs is not None:
        told["logprobs"] = [
            {**named(one.token, one.logprob), "top": [named(*pair) for pair in one.top]} for one in generation.logprobs
        ]
    return told


def report(session: Session, generation: Generation, show_statistics: bool) -> None:
    """Says on stderr how a reply went."""
    if generation.context_full:
        note(f"the context of {session.engine.ctx_size} tokens is full; --ctx-size gives more")
    if show_statistics:
        note(paint(statistics_line(generation), "dim", sys.stderr))


def statistics_line(generation: Generation) -> str:
    """Counts and speeds of a reply."""
    s = generation.statistics
    cached = f", {s.cached_tokens} of them cached" if s.cached_tokens else ""
    guessed = f", {s.accepted_tokens} of {s.drafted_tokens} guesses right" if s.drafted_tokens else ""
    return (
        f"[prompt {s.prompt_tokens} tokens{cached}, {s.prompt_tokens_per_second:.1f} tok/s | "
        f"reply {s.tokens} tokens{guessed}, {s.decode_tokens_per_second:.1f} tok/s | "
        f"first token {s.time_to_first_token:.2f} s | seed {s.seed} | {generation.finish_reason}]"
    )
