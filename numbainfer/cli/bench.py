"""`numbainfer bench`: tokens per second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from numbainfer.cli.options import debug_option, make_device_option, not_empty, threads_option, tokenizer_option

if TYPE_CHECKING:
    from numbainfer.device import Device

ARCHITECTURES = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")


@click.command()
@click.argument("model", required=False, callback=not_empty)
@make_device_option("--device", "devices", multiple=True, help="Where to run (repeatable) [default: auto].")
@click.option("-p", "--prompt-tokens", type=click.IntRange(0), multiple=True, help="Prompt lengths [default: 512].")
@click.option("-n", "--gen-tokens", type=click.IntRange(0), multiple=True, help="Tokens to generate [default: 128].")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("-d", "--depth", type=click.IntRange(0), multiple=True, help="Tokens before the test [default: 0].")
@click.option("--random", "architecture", type=click.Choice(ARCHITECTURES), help="Random int8 weights of a real shape.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json", "markdown", "csv"]), default="table", show_default=True
)
@threads_option
@tokenizer_option
@debug_option
def bench(
    model: str | None,
    devices: tuple[Device, ...],
    prompt_tokens: tuple[int, ...],
    gen_tokens: tuple[int, ...],
    repetitions: int,
    depth: tuple[int, ...],
    architecture: str | None,
    output: str,
    threads: int | None,
    tokenizer: str | None,
    debug: bool,
) -> None:
    """Measure tokens per second of MODEL (default: the demo model) beside the machine's memory bandwidth.

    \b
    pp512         a prompt of 512 tokens at once
    tg128         128 tokens, one after the other
    tg128@d4096   the same after 4,096 tokens

    \b
    numbainfer bench ./qwen -p 512 -n 128 -d 0 -d 4096
    numbainfer bench --random llama-3.2-1b -r 3 -o json
    """
    from numbainfer.bench import RandomWeights
    from numbainfer.bench import bench as measure
    from numbainfer.bench_output import render
    from numbainfer.checkpoint import Weights
    from numbainfer.console import announce_compilation, progress_bars
    from numbainfer.device import Device
    from numbainfer.loading import open_model

    if model is not None and architecture is not None:
        raise click.UsageError("give MODEL or --random, not both")
    prompts, generates = prompt_tokens or (512,), gen_tokens or (128,)
    if not any((*prompts, *generates)):
        raise click.UsageError("nothing to measure: --prompt-tokens and --gen-tokens are both 0")
    announce_compilation()
    rows = []
    with progress_bars() as progress:

        def open_weights() -> Weights:
            if architecture is not None:
                return RandomWeights(architecture)
            return open_model(
                model, tokenizer=tokenizer, require_tokenizer=False, threads=threads, progress=progress
            ).weights

        for device in devices or (Device("cpu"),):
            rows += measure(
                open_weights,
                device,
                prompts=prompts,
                generates=generates,
                depths=depth or (0,),
                repetitions=repetitions,
                threads=threads,
                progress=progress,
            )
    render(rows, output)
