"""`numbainfer info`: a model, or this machine."""

from __future__ import annotations

import click

from numbainfer.cli.options import ctx_size_option, debug_option, not_empty, tokenizer_option


@click.command()
@click.argument("model", required=False, callback=not_empty)
@ctx_size_option
@tokenizer_option
@debug_option
def info(model: str | None, ctx_size: int | None, tokenizer: str | None, debug: bool) -> None:
    """Show what MODEL is and what it needs; with no MODEL, what this machine is.

    \b
    numbainfer info
    numbainfer info model.gguf --ctx-size 8192
    """
    from numbainfer import info as facts
    from numbainfer.bench_output import print_facts

    print_facts(facts.machine() if model is None else facts.model(model, ctx_size, tokenizer))
