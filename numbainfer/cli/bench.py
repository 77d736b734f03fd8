"""`numbainfer bench`: tokens per second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from numbainfer.cli.options import (
    argument,
    command,
    general_options,
    make_device_option,
    not_empty,
    option,
    threads_option,
    tokenizer_option,
)

if TYPE_CHECKING:
    from numbainfer.device import Device

ARCHITECTURES = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")


@command(
    "Measure tokens per second beside the memory bandwidth.",
    examples="""
numbainfer bench ./qwen -p 512 -n 128 -d 0 -d 4096
numbainfer bench ./qwen -p 0 -b 1 -b 4 -b 16
numbainfer bench --random llama-3.2-1b -r 3 -o json
""",
)
@argument("model", required=False, callback=not_empty)
@make_device_option("--device", "devices", multiple=True, help="Where to run (repeatable) [default: auto].")
@option(
    "-p", "--prompt-tokens", type=click.IntRange(0), metavar="N", multiple=True, help="Prompt lengths [default: 512]."
)
@option(
    "-n", "--gen-tokens", type=click.IntRange(0), metavar="N", multiple=True, help="Tokens to generate [default: 128]."
)
@option(
    "-r",
    "--repetitions",
    type=click.IntRange(1),
    metavar="N",
    default=5,
    show_default=True,
    help="Times that each test is measured.",
)
@option(
    "-d", "--depth", type=click.IntRange(0), metavar="N", multiple=True, help="Tokens before the test [default: 0]."
)
@option(
    *("-b", "--batch", "batches"),
    type=click.IntRange(1, 512),
    metavar="N",
    multiple=True,
    help="Sequences that generate together [default: 1].",
)
@option("--random", "architecture", type=click.Choice(ARCHITECTURES), help="Random int8 weights of a real shape.")
@option("-o", "--output", type=click.Choice(["table", "json", "markdown", "csv"]), default="table", show_default=True)
@threads_option
@tokenizer_option
@general_options
def bench(
    model: str | None,
    devices: tuple[Device, ...],
    prompt_tokens: tuple[int, ...],
    gen_tokens: tuple[int, ...],
    repetitions: int,
    depth: tuple[int, ...],
    batches: tuple[int, ...],
    architecture: str | None,
    output: str,
    threads: int | None,
    tokenizer: str | None,
) -> None:
    """Measure tokens per second of MODEL (default: the demo model) beside the machine's memory bandwidth.

    \b
    pp512         a prompt of 512 tokens at once
    tg128         128 tokens, one after the other
    tg128@d4096   the same after 4,096 tokens
    tg128@b8      128 tokens of each of 8 sequences, a token of each in every step
    """
    from numbainfer.bench import Bench, plan
    from numbainfer.bench_output import render
    from numbainfer.checkpoint import Weights
    from numbainfer.console import announce_compilation, progress_bars
    from numbainfer.device import Device
    from numbainfer.loading import open_model
    from numbainfer.random_weights import RandomWeights

    if model is not None and architecture is not None:
        raise click.UsageError("give MODEL or --random, not both")
    tests = plan(prompt_tokens or (512,), gen_tokens or (128,), depth or (0,), batches or (1,))
    if not tests:
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
            measurement = Bench(open_weights, device, tests, threads=threads, progress=progress)
            rows += measurement.run(repetitions)
    render(rows, output)
