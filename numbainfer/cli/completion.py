"""`numbainfer completion`: what a shell needs to complete the command line with Tab."""

from __future__ import annotations

import os

import click
from click.shell_completion import get_completion_class, shell_complete

from numbainfer.cli.options import command, general_options

VARIABLE = "_NUMBAINFER_COMPLETE"  # by which the scripts ask for completions; click's name for it


@command(
    "Print the script for a shell's Tab completion.",
    examples="""
echo 'eval "$(numbainfer completion bash)"' >> ~/.bashrc
echo 'eval "$(numbainfer completion zsh)"' >> ~/.zshrc
numbainfer completion fish > ~/.config/fish/completions/numbainfer.fish
""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@general_options
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that lets SHELL complete commands, options, their values and file names.

    It works from the next shell on. bash needs version 4.4 (macOS brings 3.2; its zsh will do).
    """
    kind = get_completion_class(shell)
    assert kind is not None
    # not source(), which asks the bash on the PATH for its version: the script may be for another machine's
    print(kind.source_template % kind(context.find_root().command, {}, "numbainfer", VARIABLE).source_vars())


def answer(commands: click.Command) -> int:
    """Prints completions for a shell that asks for them through the environment; the exit code."""
    instruction = os.environ[VARIABLE]
    return shell_complete(commands, {}, "numbainfer", VARIABLE, instruction)
