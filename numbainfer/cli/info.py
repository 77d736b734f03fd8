"""`numbainfer info`: a model, or this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from numbainfer.cli.options import (
    argument,
    command,
    ctx_size_option,
    general_options,
    not_empty,
    option,
    source_options,
)

if TYPE_CHECKING:
    from numbainfer.converters.source_options import SourceOptions


@command(
    "Show what a model is and needs, or what this machine is.",
    examples="""
numbainfer info
numbainfer info -o json | jq .missing
numbainfer info model.gguf --ctx-size 8192
""",
)
@argument("model", required=False, callback=not_empty)
@ctx_size_option
@option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)
@source_options
@general_options
def info(model: str | None, ctx_size: int | None, output: str, source_options: SourceOptions) -> None:
    """Show what MODEL is and what it needs: parameters and bytes by part, memory at a context.

    With no MODEL, show what this machine is: CPU, caches, GPUs, versions, which kernels run on it, and what is missing
    with the command that brings it.
    """
    from numbainfer import info as about_model
    from numbainfer import machine as about_machine
    from numbainfer.bench_output import print_facts

    if model is None:
        facts = about_machine.machine()
        lines = about_machine.as_text(facts)
    else:
        facts = about_model.model(model, ctx_size, source_options)
        lines = about_model.as_text(facts)
    if output == "json":
        print(json.dumps(facts, indent=1))
    else:
        print_facts(lines)
