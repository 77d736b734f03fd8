"""Where the messages of a chat come from: a terminal with line editing and a history, or lines of a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from numbainfer.console import note
from numbainfer.errors import NumbaInferError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import Output

QUOTES = '"""'  # a message that begins with these goes on over lines until they come again
Reader = Callable[[], "str | None"]


def open_reader(commands: Mapping[str, str]) -> Reader:
    """A function that gives the next message; None at the end of input, or at Ctrl-C on an empty line.

    commands: what the slash commands are and do, for completion. Without prompt_toolkit, or where input or output is
    no terminal, lines are read as they come.
    """
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr  # stdout is for replies
    if not sys.stdin.isatty() or not screen.isatty() or os.environ.get("TERM") == "dumb":
        return _read_plain
    try:
        session = _prompt_session(commands, screen)
    except ImportError:
        return _read_plain
    return lambda: _read_edited(session)


def _read_plain() -> str | None:
    """A line, or several between quotes."""
    text = _line("> ")
    if text is None or not text.lstrip().startswith(QUOTES):
        return text
    while not _is_whole(text):
        more = _line("... ")
        if more is None:
            break
        text += "\n" + more
    return _unquoted(text)


def _line(prompt: str) -> str | None:
    terminal = sys.stdin.isatty()
    if terminal and not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    try:
        return input(prompt if terminal and sys.stdout.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if terminal:
            note("")  # the shell's prompt gets a line of its own
        return None
    except UnicodeDecodeError as error:
        raise NumbaInferError(f"the input is not UTF-8 text: {error}") from error


def _is_whole(text: str) -> bool:
    """Whether the quotes that a message begins with are closed."""
    text = text.strip()
    return not text.startswith(QUOTES) or (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def _unquoted(text: str) -> str:
    text = text.strip()
    return text.removeprefix(QUOTES).removesuffix(QUOTES) if text.startswith(QUOTES) else text


def _read_edited(session: PromptSession[str]) -> str | None:
    try:
        return _unquoted(session.prompt("> "))
    except (EOFError, KeyboardInterrupt):
        return None


def _prompt_session(commands: Mapping[str, str], screen: Any) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            for name, what in commands.items():
                if text.startswith("/") and name.startswith(text):
                    yield Completion(name, start_position=-len(text), display_meta=what)

    path = Path(platformdirs.user_state_dir("numbainfer")) / "chat_history"
    history: History = InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    except OSError:  # a home that can't be written: this session's history only
        pass
    return PromptSession(
        history=history,
        completer=Commands(),
        complete_while_typing=False,
        key_bindings=_keys(),
        multiline=True,  # which leaves Enter to our own keys
        prompt_continuation="... ",
        placeholder=FormattedText([("fg:ansibrightblack", "a message, or /help")]),
        output=_output(screen),
    )


def _output(screen: Any) -> Output:
    from prompt_toolkit.output import create_output

    if os.name == "nt":
        return create_output(screen)
    from prompt_toolkit.output.vt100 import Vt100_Output

    output = Vt100_Output.from_pty(screen, term=os.environ.get("TERM"))
    output.enable_cpr = False  # some terminals never say where the cursor is, and the prompt does not need it
    return output


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if _is_whole(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def clear_or_end(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
