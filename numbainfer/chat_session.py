"""What `numbainfer run` does with a loaded model: one reply, or a conversation."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

from numbainfer import chat
from numbainfer.console import note, warn
from numbainfer.errors import NumbaInferError
from numbainfer.generation import Generation
from numbainfer.loading import LoadedModel


class Session:
    """A loaded model with the options of one command. An instruct model's template is applied unless `raw`."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        raw: bool,
        system: str | None,
        max_tokens: int,
        stop: tuple[str, ...],
        sampling: dict[str, Any],
    ) -> None:
        self.engine = loaded.engine
        self.tokenizer = loaded.engine.tokenizer
        self.templated = not raw and self.tokenizer.chat_template is not None
        if system is not None and not self.templated:
            raise NumbaInferError("--system needs a chat model, and no --raw")
        self.conversation = chat.Conversation(system)
        self.params = loaded.params(**sampling, max_tokens=max_tokens, stop=stop)

    def prompt_tokens(self, text: str) -> list[int]:
        """The tokens that ask for a reply to `text`, after the conversation so far."""
        if not self.templated:
            return self.tokenizer.encode(text)
        self.conversation.user(text)
        return self.tokenizer.encode(chat.render(self.tokenizer, self.conversation.messages()))

    def stream(self, tokens: list[int], *, echo: bool = True) -> Generation:
        """Generates, printing pieces to stdout as they come. Ctrl-C ends the reply: finish_reason "cancelled"."""
        generation, pieces = self.engine.generate(tokens, self.params, continues=not self.templated)
        try:
            for piece in pieces:
                if echo:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            generation.finish_reason = "cancelled"
        return generation


def reply(session: Session, prompt: str, *, show_statistics: bool, as_json: bool) -> int:
    """One reply to stdout; returns the exit code."""
    generation = session.stream(session.prompt_tokens(prompt), echo=not as_json)
    if as_json:
        print(json.dumps(_as_dict(session, generation), ensure_ascii=False))
    else:
        print(flush=True)
    _report(session, generation, show_statistics)
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


def chat_loop(session: Session, first: str | None, *, show_statistics: bool) -> None:
    """Turn after turn until /exit or the end of input. The KV cache keeps what was said."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and a history)
    note("/reset forgets the conversation, /exit (or Ctrl-D) ends it; Ctrl-C stops a reply")
    if not session.templated:
        note("this model has no chat template (or --raw): each line is continued as text")
    pending = first
    while True:
        if pending is None:
            pending = _read_line()
            if pending is None:
                return
        text, pending = pending.strip(), None
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            session.conversation.clear()
        elif text.startswith("/"):
            note(f"unknown command {text.split()[0]}: /reset and /exit are known")
        elif text:
            _turn(session, text, show_statistics)


def _read_line() -> str | None:
    """What the user types next; None at the end of input, or at Ctrl-C."""
    terminal = sys.stdin.isatty()
    if terminal and not sys.stdout.isatty():
        print("> ", end="", file=sys.stderr, flush=True)  # stdout is for replies
    try:
        return input("> " if terminal and sys.stdout.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if terminal:
            note("")  # the shell's prompt gets a line of its own
        return None
    except UnicodeDecodeError as error:
        raise NumbaInferError(f"the input is not UTF-8 text: {error}") from error


def _turn(session: Session, text: str, show_statistics: bool) -> None:
    try:
        generation = session.stream(session.prompt_tokens(text))
    except NumbaInferError as error:
        if session.templated:
            session.conversation.undo()
        hint = "; /reset forgets the conversation" if len(session.conversation) else ""
        warn(f"error: {error}{hint}")
        return
    print(flush=True)
    if session.templated:
        session.conversation.assistant(generation.text)
    _report(session, generation, show_statistics)


def _report(session: Session, generation: Generation, show_statistics: bool) -> None:
    if generation.context_full:
        note(f"the context of {session.engine.ctx_size} tokens is full; --ctx-size gives more")
    if not show_statistics:
        return
    s = generation.statistics
    cached = f", {s.cached_tokens} of them cached" if s.cached_tokens else ""
    note(
        f"[prompt {s.prompt_tokens} tokens{cached}, {s.prompt_tokens_per_second:.1f} tok/s | "
        f"reply {s.tokens} tokens, {s.decode_tokens_per_second:.1f} tok/s | "
        f"first token {s.time_to_first_token:.2f} s | seed {s.seed} | {generation.finish_reason}]"
    )
