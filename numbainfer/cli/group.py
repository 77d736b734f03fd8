"""The command `numbainfer` and its subcommands, each in a file of its own."""

from __future__ import annotations

import sys

import click

from numbainfer._version import __version__
from numbainfer.cli.bench import bench
from numbainfer.cli.completion import completion
from numbainfer.cli.convert import convert
from numbainfer.cli.info import info
from numbainfer.cli.options import Group
from numbainfer.cli.perplexity import perplexity
from numbainfer.cli.run import run

SECTIONS = {
    "Examples": """
numbainfer run "Once upon a time"             text from the demo model (fetched once)
numbainfer convert ./Qwen2.5-0.5B qwen        int8 weights, about 20 s for 1 GB
numbainfer run qwen "Why is the sky blue?"    an instruct model answers
numbainfer run qwen -i                        a chat
numbainfer bench qwen                         tokens per second, % of memory bandwidth
numbainfer info                               this machine, and what is missing on it
""",
    "Output": """
Results go to stdout, everything else to stderr, so output pipes. Colours and progress bars
appear on terminals only; NO_COLOR=1 turns colours off.
""",
    "Exit codes": """
0    done
1    a failure: one line "error: ..." on stderr says what to do
2    wrong usage
130  Ctrl-C
""",
}


@click.group(
    cls=Group,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
)
@click.version_option(__version__, "-V", "--version", prog_name="numbainfer")
@click.pass_context
def commands(context: click.Context) -> None:
    """Run LLaMA- and Qwen-family language models, from Python alone.

    `numbainfer COMMAND --help` explains each command.
    """
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        context.exit(2)


for command in (run, convert, bench, info, perplexity, completion):
    commands.add_command(command)
