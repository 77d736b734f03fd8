"""`numbainfer convert`: a model in numbainfer's own format, or as GGUF."""

from __future__ import annotations

import time
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
numbainfer convert qwen qwen.gguf --to gguf
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
    help="What matrices become; int8 is Q8_0 in a GGUF.",
)
@option("--group-size", type=click.Choice(["32", "64", "128"]), help="Values per scale [default: 64; in a GGUF 32].")
@option(
    "--to",
    "format",
    type=click.Choice(["numbainfer", "gguf"]),
    default="numbainfer",
    show_default=True,
    help="What OUT becomes: a directory of numbainfer's, or a GGUF file for llama.cpp.",
)
@option("--force", is_flag=True, help="Replace OUT if it is a converted model, or a GGUF.")
@source_options
@general_options
def convert(
    source: str,
    out: str,
    dtype: str,
    group_size: str | None,
    format: str,
    force: bool,
    source_options: SourceOptions,
) -> None:
    """Convert SOURCE to numbainfer's format in the new directory OUT, or to the GGUF file OUT.

    SOURCE is a hub id (OWNER/NAME[/FILE][@REVISION]), a Hugging Face or Meta directory, a .gguf, a .bin or .pt of
    llama2.c, or a converted model. OUT appears when all of it is on the disk; an interrupted conversion leaves nothing
    there.
    """
    from numbainfer.console import announce_compilation, detail, note, progress_bars, size
    from numbainfer.converters import convert as converter
    from numbainfer.converters.source import open_source
    from numbainfer.loading import fetch_source

    if format == "gguf" and group_size not in (None, "32"):
        raise click.UsageError("--group-size: a GGUF's Q8_0 has groups of 32")
    if format != "gguf" and out.endswith(".gguf"):
        raise click.UsageError("OUT is named like a GGUF file: say --to gguf, or give a directory's name")
    announce_compilation()
    start = time.perf_counter()
    with progress_bars() as progress, open_source(fetch_source(source, progress), source_options) as opened:
        if format == "gguf":
            from numbainfer.converters.gguf_writer import write_gguf

            summary = write_gguf(opened, Path(out), dtype, force=force, progress=progress)
        else:
            target = converter.Target(dtype, int(group_size or 64))
            summary = converter.convert(opened, Path(out), target, force=force, progress=progress)
    note(f"{out}: {summary.parameters:,} parameters, {size(summary.nbytes)} as {dtype}")
    seconds = time.perf_counter() - start
    detail(f"{seconds:.1f} s, {size(summary.nbytes / seconds)} written a second")
    if summary.floating:
        shown = ", ".join(summary.floating[:2]) + (", ..." if len(summary.floating) > 2 else "")
        note(f"{len(summary.floating)} matrices stay float16, no group divides their width: {shown}")
