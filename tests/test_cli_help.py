"""What surrounds the commands: help, completion, how much is said, colours."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import STORIES, numbainfer, succeed

from numbainfer import console
from numbainfer.cli.group import commands

COMMANDS = list(commands.commands)


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_sections_of_a_manual(command: str) -> None:
    text = succeed(command, "--help").out
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[-1] == "Examples:"
    assert "General:" in headings
    assert all(
        f"{option} " in text or f"{option}\n" in text for option in ("--quiet", "--verbose", "--debug", "--help")
    )
    assert max(map(len, text.splitlines())) <= 100


def test_every_option_says_what_it_does() -> None:
    for name, command in commands.commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), f"{name} {parameter.opts[0]}"


def test_the_list_of_commands() -> None:
    text = succeed("--help").out
    shown = [line.split()[0] for line in text.split("Commands:")[1].split("Examples:")[0].splitlines() if line.strip()]
    assert shown == COMMANDS
    assert "..." not in text.split("Commands:")[1].split("Examples:")[0]  # no summary was cut short


# --- completion ----------------------------------------------------------------------------------------------------


def complete(words: str, shell: str = "bash") -> list[str]:
    """What the command answers a shell that asks how the line goes on."""
    count = len(words.split(" ")) - 1
    environment = {**os.environ, "_NUMBAINFER_COMPLETE": f"{shell}_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(count) if shell != "fish" else words.rsplit(" ", maxsplit=1)[-1]
    done = subprocess.run(
        [sys.executable, "-m", "numbainfer"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_completion_of_commands_options_and_values() -> None:
    assert complete("numbainfer be") == ["plain,bench"]
    assert complete("numbainfer bench --ran") == ["plain,--random"]
    assert "plain,llama-3.2-1b" in complete("numbainfer bench --random ")
    assert complete("numbainfer run --device c") == ["plain,cpu", "plain,cuda"]
    assert complete("numbainfer run ./mod") == ["file,./mod"]
    assert complete("numbainfer be", "zsh")[:2] == ["plain", "bench"]
    assert complete("numbainfer be", "fish")[0].startswith("plain,bench")


def test_completing_imports_nothing_slow() -> None:
    program = "import sys, numbainfer.cli.group; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"numba", "llvmlite", "numpy", "rich", "tokenizers", "jinja2"} & set(done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_programs_of_their_shell(shell: str) -> None:
    script = succeed("completion", shell).out
    assert f"_NUMBAINFER_COMPLETE={shell}_complete" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    checked = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_completion_of_another_shell() -> None:
    assert numbainfer("completion", "tcsh").code == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed here")
def test_bash_completes() -> None:
    """The script's own function, called as bash does when Tab is pressed."""
    script = succeed("completion", "bash").out.replace("$1)", f"{sys.executable} -m numbainfer)")
    program = f"""{script}
COMP_WORDS=(numbainfer bench --random smollm2-13) COMP_CWORD=3
_numbainfer_completion numbainfer
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "smollm2-135m\n"


# --- how much is said ----------------------------------------------------------------------------------------------


def test_quiet_leaves_only_results() -> None:
    options = (STORIES, "Once", "-n", 3, "--temperature", 0)
    loud, quiet = succeed("run", *options), succeed("run", *options, "--quiet")
    assert quiet.out == loud.out
    assert quiet.err == ""
    assert "tok/s" in loud.err
    assert succeed("bench", STORIES, "-p", 4, "-n", 1, "-r", 1, "-q").err == ""


def test_verbose_says_what_runs_where() -> None:
    for arguments in (("run", STORIES, "Once", "-n", 1), ("bench", STORIES, "-p", 4, "-n", 1, "-r", 1)):
        err = succeed(*arguments, "-v").err
        assert "stories260K.bin: LlamaForCausalLM, 260,032 parameters" in err
        assert re.search(r"^cpu: \d+ threads; [\d.]+ [kM]B of KV cache for [\d,]+ tokens$", err, re.MULTILINE)
        assert re.search(r"^loaded in [\d.]+ s$", err, re.MULTILINE)
        assert "KV cache" not in succeed(*arguments).err


def test_verbose_conversions_tell_their_speed(tmp_path: Path) -> None:
    err = succeed("convert", STORIES, tmp_path / "out", "-v").err
    assert re.search(r"^[\d.]+ s, [\d.]+ [kMG]?B written a second$", err, re.MULTILINE)


def test_quiet_still_says_what_went_wrong() -> None:
    result = numbainfer("run", STORIES, "x", "--ctx-size", 99999, "-q")
    assert result.code == 1
    assert "this model's context is 512 at most" in result.error


def test_quiet_and_verbose() -> None:
    result = numbainfer("info", "-q", "-v")
    assert result.code == 2
    assert result.error == "--quiet and --verbose don't go together (see numbainfer info --help)"


# --- colours -------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.paint("error", "red", Terminal()) == "\033[31merror\033[0m"
    assert console.paint("error", "red", io.StringIO()) == "error"
    monkeypatch.setenv("TERM", "dumb")
    assert console.paint("error", "red", Terminal()) == "error"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("error", "red", Terminal()) == "error"
    monkeypatch.setenv("NO_COLOR", "")  # no-color.org: only when it is not empty
    assert console.has_colours(Terminal())
