"""The command `numbainfer` and its subcommands, each in a file of its own."""

from __future__ import annotations

import sys

import click

from numbainfer._version import __version__
from numbainfer.cli.bench import bench
from numbainfer.cli.convert import convert
from numbainfer.cli.info import info
from numbainfer.cli.perplexity import perplexity
from numbainfer.cli.run import run


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="numbainfer")
@click.pass_context
def commands(context: click.Context) -> None:
    """Run LLaMA- and Qwen-family language models, from Python alone.

    \b
    numbainfer run "Once upon a time"             text from the demo model (fetched once)
    numbainfer convert ./Qwen2.5-0.5B qwen         int8 weights, about 60 s for 2 GB
    numbainfer run qwen "Why is the sky blue?"     an instruct model answers
    numbainfer bench qwen                          tokens per second, % of memory bandwidth
    """
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        context.exit(2)


for command in (run, convert, bench, info, perplexity):
    commands.add_command(command)
