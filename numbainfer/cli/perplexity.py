"""`numbainfer perplexity`: how well a model predicts a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from numbainfer.cli.options import (
    argument,
    command,
    device_option,
    general_options,
    not_empty,
    option,
    read_stdin,
    source_options,
    threads_option,
)
from numbainfer.errors import NumbaInferError

if TYPE_CHECKING:
    from numbainfer.converters.source_options import SourceOptions
    from numbainfer.device import Device


@command(
    "Measure how well a model predicts a text.",
    examples="""
numbainfer perplexity ./qwen text.txt
numbainfer perplexity ./qwen text.txt --ctx-size 2048 -o json
""",
)
@argument("model", callback=not_empty)
@argument("file", callback=not_empty)
@option("--ctx-size", type=click.IntRange(4), metavar="N", default=512, show_default=True, help="Tokens of a chunk.")
@option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)
@device_option
@threads_option
@source_options
@general_options
def perplexity(
    model: str,
    file: str,
    ctx_size: int,
    output: str,
    device: Device,
    threads: int | None,
    source_options: SourceOptions,
) -> None:
    """Measure how well MODEL predicts the text in FILE ("-": stdin), as llama.cpp defines it.

    Lower is better: e to the mean negative log likelihood of a token, over the second half of every chunk of --ctx-size
    tokens. Compare only numbers of the same text, tokenizer and chunk size. Ctrl-C prints the value so far.
    """
    from numbainfer.bench_output import print_facts
    from numbainfer.console import announce_compilation, progress_bars
    from numbainfer.loading import load
    from numbainfer.perplexity import Score
    from numbainfer.perplexity import perplexity as measure

    try:
        text = read_stdin() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NumbaInferError(f"{file} is not UTF-8 text: {error}") from error
    announce_compilation()
    with progress_bars() as progress:
        loaded = load(
            model,
            device=device,
            ctx_size=ctx_size,
            threads=threads,
            source_options=source_options,
            chunk=128,  # logits of all tokens of a chunk are kept at once: 78 MB at a vocabulary of 150,000
            progress=progress,
        )
        score, stopped = Score(), False
        try:
            result = measure(loaded.engine, text, ctx_size, progress, score)
        except KeyboardInterrupt:
            if not score.chunks:
                raise
            result, stopped = score.result(), True
    if output == "json":
        print(json.dumps(result.__dict__))
    else:
        lines = {k: f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in result.__dict__.items()}
        print_facts({**lines, "perplexity": f"{lines['perplexity']} +/- {score.uncertainty:.4f}"})
    if stopped:
        raise KeyboardInterrupt
