"""The command as a process of its own: pipes that close, signals, a terminal."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import ENDLESS, GREEDY, STORIES, numbainfer, succeed, write_chat_model, write_model

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and terminals")
COMMAND = [sys.executable, "-m", "numbainfer"]
ENDLESSLY = (*GREEDY, "-n", 50_000, "--ctx-size", 0)  # minutes


@pytest.fixture(scope="module", autouse=True)
def usual_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that answer within a second, their kernels being compiled, and that are started as a shell would.

    A test run in the background or under nohup hands down that Ctrl-C and a closed terminal are ignored.
    """
    succeed("run", STORIES, "Once", "-n", 2, *GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))  # where the chat keeps its history
        patch.delenv("PYTHONUNBUFFERED", raising=False)  # else a failure to write shows at once, and not at the end
        usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
        if os.name == "posix":
            usual[signal.SIGHUP] = signal.SIG_DFL
        before = {number: signal.signal(number, handler) for number, handler in usual.items()}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that never ends a reply."""
    model = write_chat_model(tmp_path_factory.mktemp("endless") / "model", **ENDLESS)
    succeed("run", model, "hi", "-n", 2, *GREEDY)
    return model


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **{**pipes, **options})


def start_with(preparation: str, *arguments: object) -> subprocess.Popen[bytes]:
    """The same after some statements of the test's own."""
    program = f"import sys; from numbainfer import cli\n{preparation}\ncli.main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line for the shell, in which $CLI is the command."""
    environment = {**os.environ, "CLI": f"{sys.executable} -m numbainfer"}
    command = ["bash", "-c", line]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)


def test_a_process(tmp_path: Path) -> None:
    with start("run", STORIES, "Once upon a time", "-n", 10, *GREEDY) as process:
        out, err = process.communicate()
    assert process.returncode == 0
    assert out.decode() == succeed("run", STORIES, "Once upon a time", "-n", 10, *GREEDY).out
    assert err.decode().count("\n") == 2  # what it does, and the statistics
    with start("run", tmp_path / "missing.gguf") as process:
        out, err = process.communicate()
    assert process.returncode == 1
    assert (out, err.decode()) == (b"", f"error: {tmp_path / 'missing.gguf'}: no such file or directory\n")


@posix
def test_a_reader_that_leaves_is_no_error(endless: Path) -> None:
    run = f"$CLI run {endless} hi {' '.join(map(str, ENDLESSLY))}"
    for command, reader, length in (
        (f"{run} --no-stats", "head -c 10", 10),
        ("$CLI info", "true", 0),
        (f"$CLI bench {endless} -p 4 -n 0 -r 1 -o json", "true", 0),
    ):
        result = shell(f"{command} | {reader}; code=${{PIPESTATUS[0]}}; echo; echo $code")
        text, code = result.stdout.split("\n")[:2]
        assert (len(text), code) == (length, "0")
        assert re.fullmatch(r"(\S[^:]* \.\.\.\n)*", result.stderr)  # progress, and no complaint


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_on_stdout() -> None:
    for line in ("$CLI info >/dev/full", f"$CLI run {STORIES} Once -n 2 --no-stats >/dev/full"):
        result = shell(line)
        assert result.returncode == 1
        assert result.stderr.endswith("error: input/output: No space left on device\n")
        assert "Exception" not in result.stderr


@posix
def test_closed_streams() -> None:
    run = f"$CLI run {STORIES} Once -n 2 --temperature 0"
    wanted = succeed("run", STORIES, "Once", "-n", 2, *GREEDY).out
    for line, out in ((f"{run} <&-", wanted), (f"{run} >&-", ""), (f"{run} 2>&-", wanted)):
        result = shell(line)
        assert (result.returncode, result.stdout) == (0, out)
    empty = shell(f"$CLI run {STORIES} <&-")
    assert (empty.returncode, empty.stderr) == (1, "error: the prompt is empty: give some text\n")


# --- signals -------------------------------------------------------------------------------------------------------


def interrupted(process: subprocess.Popen[bytes], number: int, after: bytes) -> tuple[int, str, str]:
    """Sends a signal once `after` is in the text; exit code, stdout and stderr."""
    assert process.stdout is not None
    seen = b""
    while after not in seen:
        piece = os.read(process.stdout.fileno(), 1000)
        assert piece, process.communicate()
        seen += piece
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, (seen + out).decode(), err.decode()


@posix
def test_ctrl_c_keeps_the_text_so_far(endless: Path) -> None:
    whole = succeed("run", endless, "hi", "-n", 20, "--no-stats", *GREEDY).out.strip()
    code, out, err = interrupted(start("run", endless, "hi", *ENDLESSLY), signal.SIGINT, after=whole[:10].encode())
    assert code == 130
    assert out.startswith(whole[:10])
    assert out.endswith("\n")
    assert err.splitlines()[-1].endswith("| cancelled]")
    assert "Traceback" not in err
    assert "error" not in err


TELL_TOKENS = """
from numbainfer.model import Model
step = Model.step
Model.step = lambda self, *arguments: print("token", file=sys.stderr, flush=True) or step(self, *arguments)
"""


@posix
def test_ctrl_c_with_json(endless: Path) -> None:
    process = start_with(TELL_TOKENS, "run", endless, "hi", "--json", *ENDLESSLY)
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(20)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    told = json.loads(out)
    assert list(told) == ["prompt_tokens", "tokens", "text", "finish_reason", "stats"]
    assert told["finish_reason"] == "cancelled"
    assert lines.count(b"token\n") - 1 <= len(told["tokens"]) < 50_000  # the last step may have been stopped
    assert told["text"]
    assert b"Traceback" not in err


@posix
def test_ctrl_c_at_any_moment(endless: Path) -> None:
    """While it imports, loads, computes the prompt or generates: never a traceback."""
    for step in range(8):
        process = start_with("print('ready', flush=True)", "run", endless, "hi" * 500, *ENDLESSLY)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.005 + 0.1 * step)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130, err.decode()
        assert not re.search("Traceback|Exception|error", err.decode()), err.decode()


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_llvm_takes_a_module(number: int, code: int, endless: Path) -> None:
    """The module would be freed twice if the exception came before it is marked as taken."""
    preparation = f"""
import signal
from llvmlite.binding.executionengine import ExecutionEngine
mark = ExecutionEngine.__init__
def interrupted(*arguments, **named):
    signal.raise_signal({int(number)})
    mark(*arguments, **named)
ExecutionEngine.__init__ = interrupted
"""
    process = start_with(preparation, "run", endless, "hi", *ENDLESSLY)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err.decode()
    assert not re.search("Traceback|Exception|error", err.decode()), err.decode()


@posix
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_conversion_that_is_stopped(number: int, code: int, tmp_path: Path) -> None:
    """SIGKILL leaves a hidden directory, which the next conversion removes."""
    source, outputs = write_model(tmp_path / "model"), tmp_path / "outputs"
    outputs.mkdir()
    wait = """
import time
from numbainfer.converters import convert
write = convert._write_shard
convert._write_shard = lambda *arguments: (write(*arguments), print("written", flush=True), time.sleep(60))
"""
    process = start_with(wait, "convert", source, outputs / "out")
    found, _, err = interrupted(process, number, after=b"written")
    assert found == code
    assert "Traceback" not in err
    left = [p.name for p in outputs.iterdir()]
    assert len(left) == (number == signal.SIGKILL)
    assert all(name.startswith(".out-partial-") for name in left)
    assert numbainfer("convert", source, outputs / "out").code == 0
    assert [p.name for p in outputs.iterdir()] == ["out"]


# --- a terminal ----------------------------------------------------------------------------------------------------


ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")  # colours, cursor movements


class Terminal:
    """The command in a terminal of its own, as a person has it. `stdout`: a file that it is redirected to."""

    kind = "xterm"

    def __init__(self, *arguments: object, stdout: Any = None) -> None:
        import pty

        self._master, slave = pty.openpty()
        streams = {"stdin": slave, "stdout": stdout or slave, "stderr": slave}
        self.process = start(*arguments, **streams, env={**os.environ, "TERM": self.kind}, start_new_session=True)
        os.close(slave)
        self._text = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, pattern: str, seconds: float = 30, *, raw: bool = False) -> str:
        """What appears up to something, as far as it was not asked for before. raw: with colours and the like."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self._text if raw else ESCAPES.sub("", self._text))) is None:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self._text!r}"
            try:
                piece = os.read(self._master, 4096)
            except OSError:  # the other end is closed
                piece = b""
            assert piece, f"no {pattern!r} before the end of {self._text!r}"
            self._text += piece.decode("utf-8", "replace")
        text = match.string
        found, self._text = text[: match.end()], text[match.end() :]
        return found

    def end(self) -> int:
        """The exit code, once the process has ended by itself."""
        code = self.process.wait(timeout=30)
        self.close()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1


@pytest.fixture
def terminal(endless: Path) -> Iterator[Terminal]:
    """A chat with the endless model, at its first prompt."""
    terminal = Terminal("run", endless, "--ctx-size", 0, "-n", 50_000, *GREEDY)  # a terminal: no need of -i
    terminal.until("> ")
    yield terminal
    terminal.close()


@posix
def test_ctrl_c_stops_a_reply_and_not_the_chat(terminal: Terminal) -> None:
    for turn in range(2):
        terminal.type("hi\n")
        terminal.until(r"hi\s+[!-~]")  # the line and a letter of the reply
        terminal.process.send_signal(signal.SIGINT)
        assert "Traceback" not in terminal.until(r"cancelled\]")
        terminal.until("> ")
        assert terminal.process.poll() is None, turn
    terminal.type("/exit\n")
    assert terminal.end() == 0


@posix
def test_reset_in_a_terminal(endless: Path) -> None:
    terminal = Terminal("run", endless, "-n", 3, *GREEDY)
    terminal.until("> ")
    sizes = []
    for line, answer in (("hi", r"length\]"), ("hi", r"length\]"), ("/reset", "forgotten"), ("hi", r"length\]")):
        terminal.type(line + "\n")
        text = terminal.until(answer)
        terminal.until("> ")
        sizes += re.findall(r"prompt (\d+) tokens", text)
    first, second, third = map(int, sizes)
    assert first == third < second
    terminal.type("\x04")
    assert terminal.end() == 0


@posix
@pytest.mark.parametrize("key", ["ctrl-d", "ctrl-c"])
def test_ways_out(key: str, terminal: Terminal) -> None:
    if key == "ctrl-d":
        terminal.type("\x04")
    else:
        time.sleep(0.5)  # a signal between the prompt and its wait may be missed; no person is so quick
        terminal.process.send_signal(signal.SIGINT)
    terminal.until("\r\n")  # the shell's prompt gets a line of its own
    assert terminal.end() == 0


@posix
def test_progress_in_a_terminal() -> None:
    terminal = Terminal("bench", STORIES, "-p", 8, "-n", 4, "-r", 1, "-o", "markdown")
    text = terminal.until("tg4")  # the bar
    text += terminal.until(r"\| .* \| tg4 \|")  # the row
    assert "pp8" in text
    assert terminal.end() == 0


@posix
def test_replies_go_to_stdout_when_only_that_is_redirected(endless: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        terminal = Terminal("run", endless, "-i", "-n", 5, "--no-stats", *GREEDY, stdout=out)
        terminal.until("> ")
        terminal.type("hi\n")
        terminal.until("hi\\s+> ")
        terminal.type("/exit\n")
        assert terminal.end() == 0
    reply = succeed("run", endless, "hi", "-n", 5, *GREEDY).out
    assert (tmp_path / "out").read_text() == reply


@posix
def test_editing_a_line(endless: Path) -> None:
    """Backspace, the history, a second line, Ctrl-C on a line, completion of commands, quotes."""
    terminal = Terminal("run", endless, "-n", 2, *GREEDY)
    terminal.until("> ")

    def sent(keys: str) -> int:
        """The tokens of the prompt that these keys end up in, in a conversation that has only begun."""
        for text, answer in ((keys, r"length\]"), ("/reset\r", "forgotten")):
            terminal.type(text)
            told = terminal.until(answer)
            terminal.until("> ")
            if text == keys:
                size = re.findall(r"prompt (\d+) tokens", told)[-1]
        return int(size) - len("[user]>")

    assert sent("hello\r") == 5
    assert sent("hellooo\x7f\x7f!\r") == 6
    assert sent("\x1b[A\x1b[A\r") == 6  # up over "/reset"
    assert sent("ab\x1b\rcd\r") == 4  # the letters' tokenizer has no token for a line end
    assert sent("thrown away\x03abc\r") == 3
    assert sent('"""ab\rcd\ref"""\r') == 6
    assert sent("\x1b[200~several\nlines\x1b[201~\r") == 12  # pasted
    terminal.type("/he\t")
    terminal.until("/help")
    time.sleep(0.2)
    terminal.type("\r")
    terminal.until("another reply to the last message")
    terminal.until("> ")  # before, the end of input would meet no one
    terminal.type("\x04")
    assert terminal.end() == 0
    again = Terminal("run", endless, "-n", 2, *GREEDY)  # the history is still there
    again.until("> ")
    again.type("\x1b[A\x1b[A\x1b[A\r")
    again.until("several")
    again.until(r"length\]")
    again.close()


@posix
def test_reasoning_is_dimmed(endless: Path) -> None:
    arguments = ("--regex", "<think>[a-c]{3}</think>[d-f]{3}", *GREEDY)
    pytest.importorskip("llguidance", reason="an optional dependency")
    terminal = Terminal("run", endless, "hi", *arguments)
    assert re.search("\x1b\\[2m<think>[a-c]{3}</think>\x1b\\[0m[d-f]{3}\r\n", terminal.until("stop", raw=True))
    assert terminal.end() == 0
    plain = succeed("run", endless, "hi", *arguments).out
    assert re.fullmatch("<think>[a-c]{3}</think>[d-f]{3}\n", plain)


@posix
def test_a_terminal_that_can_do_nothing(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "kind", "dumb")
    terminal = Terminal("run", endless, "-n", 2, *GREEDY)
    terminal.until("> ")
    terminal.type("hi\n")
    assert "\x1b" not in terminal.until(r"length\]", raw=True)
    terminal.until("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
