"""`numbainfer info`: a model, or this machine."""

from __future__ import annotations

from numbainfer.cli.options import (
    argument,
    command,
    ctx_size_option,
    general_options,
    not_empty,
    tokenizer_option,
)


@command(
    "Show what a model is and needs, or what this machine is.",
    examples="""
numbainfer info
numbainfer info model.gguf --ctx-size 8192
""",
)
@argument("model", required=False, callback=not_empty)
@ctx_size_option
@tokenizer_option
@general_options
def info(model: str | None, ctx_size: int | None, tokenizer: str | None) -> None:
    """Show what MODEL is and what it needs; with no MODEL, what this machine is."""
    from numbainfer import info as facts
    from numbainfer.bench_output import print_facts

    print_facts(facts.machine() if model is None else facts.model(model, ctx_size, tokenizer))
