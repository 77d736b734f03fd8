"""`numbainfer convert`: a model in numbainfer's own format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from numbainfer.cli.options import argument, command, general_options, not_empty, option, source_options

if TYPE_CHECKING:
    from numbainfer.converters.source_options import SourceOptions


@command(
    "Write a model as int8 (or float16, bfloat16, float32), once.",
    examples="""
numbainfer convert ./Qwen2.5-0.5B qwen
numbainfer convert Qwen/Qwen3-0.6B qwen3 --group-size 32
numbainfer convert stories15M.bin stories --dtype float32 --tokenizer tokenizer.bin
""",
)
@argument("source", callback=not_empty)
@argument("out", callback=not_empty)
@option(
    "--dtype",
    type=click.Choice(["int8", "float16", "bfloat16", "float32"]),
    default="int8",
    show_default=True,
    help="What matrices become.",
)
@option(
    "--group-size", type=click.Choice(["32", "64", "128"]), default="64", show_default=True, help="Values per scale."
)
@option("--force", is_flag=True, help="Replace OUT if it is a converted model.")
@source_options
@general_options
def convert(source: str, out: str, dtype: str, group_size: str, force: bool, source_options: SourceOptions) -> None:
    """Convert SOURCE to numbainfer's format in the new directory OUT.

    SOURCE is a hub id (OWNER/NAME[/FILE][@REVISION]), a Hugging Face or Meta directory, a .gguf, a .bin or .pt of
    llama2.c, or a converted model. OUT appears when all of it is on the disk; an interrupted conversion leaves nothing
    there.
    """
    from numbainfer.console import announce_compilation, note, progress_bars, size
    from numbainfer.converters import convert as converter
    from numbainfer.converters.source import open_source
    from numbainfer.loading import fetch_source

    target = converter.Target(dtype, int(group_size))
    announce_compilation()
    with progress_bars() as progress, open_source(fetch_source(source, progress), source_options) as opened:
        summary = converter.convert(opened, Path(out), target, force=force, progress=progress)
    note(f"{out}: {summary.parameters:,} parameters, {size(summary.nbytes)} as {dtype}")
    if summary.floating:
        shown = ", ".join(summary.floating[:2]) + (", ..." if len(summary.floating) > 2 else "")
        note(f"{len(summary.floating)} matrices stay float16, no group divides their width: {shown}")
