"""A chat in the terminal: turn after turn, and the commands that begin with a slash."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from numbainfer.chat_input import Reader, open_reader
from numbainfer.chat_session import Session, report, statistics_line
from numbainfer.console import note, warn
from numbainfer.errors import NumbaInferError
from numbainfer.generation import Generation

HELP = {
    "/help": "what there is",
    "/reset": "forget the conversation; the system message stays",
    "/system": "TEXT: set the system message; - for none; alone: show it",
    "/undo": "take back the last message and its reply",
    "/retry": "another reply to the last message",
    "/stats": "the last reply's speeds and what the context holds; on or off: after every reply",
    "/save": "FILE: write the conversation as JSON",
    "/load": "FILE: go on with a conversation that was saved",
    "/exit": "end (also Ctrl-D)",
}
KEYS = 'Alt-Enter begins a new line, and so does Enter between """ and """; Ctrl-C stops a reply or clears the line.'


class ChatLoop:
    """Reads messages and commands until the end of input. The KV cache keeps what was said."""

    def __init__(self, session: Session, *, show_statistics: bool) -> None:
        self.session = session
        self.show_statistics = show_statistics
        self._last: Generation | None = None
        self._last_text = ""
        self._retries = 0
        self._ended = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
            "/exit": self._exit,
            "/quit": self._exit,
        }

    def run(self, first: str | None) -> None:
        """All turns, the first of which may be given."""
        read: Reader = open_reader(HELP)
        note("a message, or /help; Ctrl-C stops a reply, /exit or Ctrl-D ends the chat")
        if not self.session.templated:
            note("this model has no chat template (or --raw): each message is continued as text")
        message = first if first is not None else read()
        while message is not None:
            try:
                self._handle(message.strip())
            except NumbaInferError as error:
                warn(f"error: {error}")
            message = None if self._ended else read()

    def _handle(self, message: str) -> None:
        name, _, rest = message.partition(" ")
        if name.startswith("/") and "\n" not in name:
            command = self._commands.get(name)
            if command is None:
                note(f"unknown command {name}: /help lists them")
            else:
                command(rest.strip())
        elif message:
            self._retries = 0
            self._turn(message)

    def _turn(self, text: str, seed: int | None = None) -> None:
        session, before = self.session, self.session.dropped
        self._last_text = text
        try:
            tokens = session.prompt_tokens(text)
            if session.dropped > before:
                count = session.dropped - before
                oldest = "turn is" if count == 1 else f"{count} turns are"
                note(f"the context is full: the oldest {oldest} forgotten")
            generation = session.stream(tokens, seed=seed)
        except NumbaInferError as error:
            if session.templated:
                session.conversation.undo()
            hint = "; /reset forgets the conversation" if len(session.conversation) else ""
            raise NumbaInferError(f"{error}{hint}") from error
        print(flush=True)
        if session.templated and (generation.text or generation.finish_reason != "cancelled"):
            session.conversation.assistant(generation.text)
        elif session.templated:
            session.conversation.undo()  # stopped before it said anything
        self._last = generation
        report(session, generation, self.show_statistics)

    def _help(self, rest: str) -> None:
        for name, what in HELP.items():
            note(f"  {name:<8} {what}")
        note(KEYS)

    def _reset(self, rest: str) -> None:
        self.session.conversation.clear()
        self._last, self._last_text = None, ""
        note("the conversation is forgotten")

    def _system(self, rest: str) -> None:
        self._require_template("/system")
        conversation = self.session.conversation
        if rest:
            conversation.system = None if rest == "-" else rest
        note(f"system message: {conversation.system or 'none'}")

    def _undo(self, rest: str) -> None:
        self._require_template("/undo")
        text = self.session.conversation.undo()
        note("nothing to take back" if text is None else f"taken back: {text}")

    def _retry(self, rest: str) -> None:
        session = self.session
        text = session.conversation.undo() if session.templated else self._last_text
        if not text:
            note("no message to reply to")
            return
        if session.params.temperature == 0:
            note("at temperature 0 every reply is the same: start with --temperature for others")
        self._retries += 1
        # With a seed that was given, the first of others, so that a chat can be repeated as a whole.
        seed = None if session.params.seed is None else (session.params.seed + self._retries) % 2**64
        self._turn(text, seed)

    def _stats(self, rest: str) -> None:
        if rest in ("on", "off"):
            self.show_statistics = rest == "on"
            note(f"statistics are {rest}")
            return
        if self._last is not None:
            note(statistics_line(self._last))
        held = 0 if self._last is None else len(self._last.prompt) + len(self._last.tokens)
        size, turns = self.session.engine.ctx_size, len(self.session.conversation)
        note(f"the context holds {held} of {size} tokens ({100 * held // size}%); {turns} messages")

    def _save(self, rest: str) -> None:
        self._require_template("/save")
        path = self._path(rest, "/save")
        text = json.dumps(self.session.conversation.messages(), ensure_ascii=False, indent=2)
        temporary = path.with_name(path.name + ".part")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise NumbaInferError(f"cannot write {path}: {error.strerror}") from error
        note(f"{path}: {len(self.session.conversation)} messages")

    def _load(self, rest: str) -> None:
        self._require_template("/load")
        path = self._path(rest, "/load")
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise NumbaInferError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise NumbaInferError(f"{path} is not JSON: {error}") from error
        if not isinstance(messages, list):
            raise NumbaInferError(f"{path} is not a conversation: a list of messages with role and content")
        try:
            self.session.conversation.replace(messages)
        except NumbaInferError as error:
            raise NumbaInferError(f"{path}: {error}") from error
        note(f"{path}: {len(self.session.conversation)} messages")
        for message in self.session.conversation.messages()[-2:]:  # where the conversation stands
            mark = "> " if message["role"] == "user" else ""
            print(f"{mark}{message['content']}", file=sys.stderr)

    def _exit(self, rest: str) -> None:
        self._ended = True

    def _require_template(self, command: str) -> None:
        if not self.session.templated:
            raise NumbaInferError(f"{command} needs a chat model, and no --raw")

    def _path(self, rest: str, command: str) -> Path:
        if not rest:
            raise NumbaInferError(f"{command} needs the name of a file")
        return Path(rest).expanduser()


def chat_loop(session: Session, first: str | None, *, show_statistics: bool) -> None:
    """A chat until its end."""
    ChatLoop(session, show_statistics=show_statistics).run(first)
