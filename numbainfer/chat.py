"""Conversations, and the chat templates that turn them into a prompt.

A chat template is a Jinja2 program that comes with a model, so it is code from a stranger: it runs in
`chat_sandbox`, which lets it neither reach the machine nor use it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from numbainfer.errors import NumbaInferError

if TYPE_CHECKING:  # Jinja2 takes 50 ms to import, and only models with a template need it
    from numbainfer.chat_sandbox import SandboxedTemplate

Message = Mapping[str, Any]


class _HasTemplate(Protocol):
    """What `render` needs of a tokenizer."""

    @property
    def chat_template(self) -> str | None: ...

    @property
    def special_tokens(self) -> Mapping[str, str]: ...


def render(
    tokenizer: _HasTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **kwargs: Any,
) -> str:
    """The prompt that the model's own chat template makes of a conversation.

    messages: dictionaries with "role" and "content", as Hugging Face and OpenAI write them.
    add_generation_prompt: end with the opening of the assistant's turn.
    kwargs: more variables for the template, such as `tools`, or `enable_thinking=False` for Qwen3.

    The text holds the special tokens as text, BOS among them; `Tokenizer.encode` reads them and adds no
    second BOS. Raises NumbaInferError, with one line, where the model has no template, where the template
    is broken or refuses the conversation, and where it goes past a bound of `chat_sandbox`.
    """
    if tokenizer.chat_template is None:
        raise NumbaInferError("the model has no chat template; use --raw to give it the text as it is")
    variables = {"tools": None, "documents": None, **tokenizer.special_tokens, **kwargs}
    return _compile(tokenizer.chat_template).render(
        {**variables, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
    )


@lru_cache(maxsize=8)
def _compile(source: str) -> SandboxedTemplate:
    from numbainfer.chat_sandbox import SandboxedTemplate

    return SandboxedTemplate(source)


class Conversation:
    """The turns of a chat: a system message if there is one, then user and assistant in turn."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[dict[str, str]] = []

    def __len__(self) -> int:
        """How many turns there are, the system message not counted."""
        return len(self._turns)

    def user(self, text: str) -> None:
        """Adds what the user says. It must be the user's turn."""
        self._add("user", text, after=("assistant", None))

    def assistant(self, text: str) -> None:
        """Adds the model's reply. It must be the assistant's turn."""
        self._add("assistant", text, after=("user",))

    def undo(self) -> str | None:
        """Takes back the last thing that the user said and all that followed; returns it, or None."""
        while self._turns:
            turn = self._turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    def drop_oldest(self) -> int:
        """Forgets the first turn of the user and its reply; returns how many characters they had, 0 where only the
        last of the user's is left."""
        if len(self._turns) <= 2:
            return 0
        dropped, self._turns = self._turns[:2], self._turns[2:]
        return max(1, sum(len(turn["content"]) for turn in dropped))

    def replace(self, messages: Sequence[Message]) -> None:
        """Takes over a conversation as `messages` gives it; NumbaInferError where it is none, and nothing changed."""
        new = Conversation()
        for message in messages:
            role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
            if not isinstance(content, str) or role not in ("system", "user", "assistant"):
                raise NumbaInferError("it is not a conversation: a list of messages with role and content")
            if role != "system":
                new._add(role, content, after=("user",) if role == "assistant" else ("assistant", None))
            elif len(new) or new.system is not None:
                raise NumbaInferError("a system message can only come first")
            else:
                new.system = content
        self.system, self._turns = new.system, new._turns

    def clear(self) -> None:
        """Forgets all turns and keeps the system message."""
        self._turns.clear()

    def messages(self) -> list[dict[str, str]]:
        """The conversation as `render` takes it; a copy, which later turns do not change."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [dict(turn) for turn in self._turns]

    def _add(self, role: str, text: str, after: tuple[str | None, ...]) -> None:
        last = self._turns[-1]["role"] if self._turns else None
        if last not in after:
            raise NumbaInferError(f"a turn of the {role} cannot follow {last or 'the start'}")
        self._turns.append({"role": role, "content": text})
