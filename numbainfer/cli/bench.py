"""`numbainfer bench`: tokens per second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from numbainfer.cli.options import (
    argument,
    command,
    general_options,
    make_device_option,
    not_empty,
    option,
    source_options,
    threads_option,
)

if TYPE_CHECKING:
    from numbainfer.bench import Test
    from numbainfer.converters.source_options import SourceOptions
    from numbainfer.device import Device

ARCHITECTURES = (
    *("smollm2-135m", "smollm2-360m", "smollm2-1.7b", "smollm3-3b", "tinyllama-1.1b"),
    *("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "mistral-7b"),
    *("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"),
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b"),
)


PLOTS = (".png", ".svg", ".pdf")

TESTS = """
pp512           a prompt of 512 tokens at once
tg128           128 tokens, one after the other
tg128@d4096     the same after 4,096 tokens
tg128@b8        128 tokens of each of 8 sequences, one of each in every step
"""


def _plot_path(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and Path(value).suffix not in PLOTS:
        raise click.BadParameter(f"{value}: its name has to end in {', '.join(PLOTS)}")
    return value


def _numbers(*names: str, least: int = 0, most: int | None = None, text: str, **settings: Any) -> Any:
    return option(*names, type=click.IntRange(least, most), metavar="N", section="Tests", help=text, **settings)


@command(
    "Measure tokens per second beside the memory bandwidth.",
    examples="""
numbainfer bench ./qwen -p 512 -n 128 -d 0 -d 4096
numbainfer bench ./qwen -p 0 -b 1 -b 4 -b 16 --plot batch.svg
numbainfer bench --random llama-3.2-1b -r 3 -o json > before.json
numbainfer bench --random llama-3.2-1b -r 3 --compare before.json
numbainfer bench --from before.json --plot before.png
numbainfer bench ./qwen --profile
""",
    sections={"Names of tests": TESTS, "Shapes of --random": "\n".join(wrap(" ".join(ARCHITECTURES), 76))},
)
@argument("model", required=False, callback=not_empty)
@make_device_option("--device", "devices", multiple=True, help="Where to run (repeatable) [default: auto].")
@option(
    *("--random", "architecture"),
    type=click.Choice(ARCHITECTURES),
    metavar="SHAPE",
    help="Random int8 weights of a real model's shape, made in memory.",
)
@threads_option
@source_options
@_numbers("-p", "--prompt-tokens", "prompts", multiple=True, text="Prompt lengths (repeatable) [default: 512].")
@_numbers("-n", "--gen-tokens", "generates", multiple=True, text="Tokens to generate (repeatable) [default: 128].")
@_numbers("-d", "--depth", "depths", multiple=True, text="Tokens before the test (repeatable) [default: 0].")
@_numbers(
    *("-b", "--batch", "batches"),
    least=1,
    most=512,
    multiple=True,
    text="Sequences that generate together (repeatable) [default: 1].",
)
@_numbers("-r", "--repetitions", least=1, default=5, show_default=True, text="Times that each test is measured.")
@option(
    *("-o", "--output"),
    type=click.Choice(["table", "json", "markdown", "csv"]),
    default="table",
    show_default=True,
    section="Report",
    help="How results are printed.",
)
@option(
    "--plot",
    type=click.Path(),
    callback=_plot_path,
    section="Report",
    help="Draw rates over depth, batch and prompt length beside the roofline, as .png, .svg or .pdf.",
)
@option(
    *("--compare", "old"),
    type=click.Path(),
    section="Report",
    help="Show rates beside those of an older `bench -o json`.",
)
@option(
    *("--from", "kept"),
    type=click.Path(),
    section="Report",
    help="Measure nothing: show, plot or compare what `bench -o json` printed.",
)
@option("--profile", is_flag=True, section="Report", help="Time, bytes and bandwidth of each operator of a step.")
@general_options
def bench(
    model: str | None,
    devices: tuple[Device, ...],
    architecture: str | None,
    threads: int | None,
    source_options: SourceOptions,
    prompts: tuple[int, ...],
    generates: tuple[int, ...],
    depths: tuple[int, ...],
    batches: tuple[int, ...],
    repetitions: int,
    output: str,
    plot: str | None,
    old: str | None,
    kept: str | None,
    profile: bool,
) -> None:
    """Measure tokens per second of MODEL (default: the demo model) beside the machine's memory bandwidth.

    The read bandwidth is measured in turn with the tests; reading a model's weights and KV cache at that rate is what
    generation can reach at most. Ctrl-C prints what is measured so far.
    """
    from numbainfer.bench import plan
    from numbainfer.bench_output import compare, read_rows, render
    from numbainfer.bench_plot import check_path
    from numbainfer.bench_plot import plot as draw
    from numbainfer.console import announce_compilation, note

    if model is not None and architecture is not None:
        raise click.UsageError("give MODEL or --random, not both")
    if kept is not None and (model is not None or architecture is not None or profile):
        raise click.UsageError("--from measures nothing: no MODEL, --random or --profile goes with it")
    if profile and (plot is not None or old is not None):
        raise click.UsageError("--profile goes with neither --plot nor --compare")
    tests = plan(prompts or (512,), generates or (128,), depths or (0,), batches or (1,))
    if not tests and kept is None:
        raise click.UsageError("nothing to measure: --prompt-tokens and --gen-tokens are both 0")
    if plot is not None:
        check_path(plot)
    before = None if old is None else read_rows(old)

    rows: list[dict[str, Any]] = []
    stopped = False
    if kept is not None:
        rows = read_rows(kept)
    else:
        announce_compilation()
        try:
            for row in _measure(model, architecture, devices, tests, repetitions, threads, source_options, profile):
                rows.append(row)
        except KeyboardInterrupt:
            stopped = True
    if rows:
        render(rows if before is None else compare(rows, before), output)
        if plot is not None:
            draw(rows, plot)
            note(f"plotted to {plot}")
    if stopped:
        raise KeyboardInterrupt


def _measure(
    model: str | None,
    architecture: str | None,
    devices: Sequence[Device],
    tests: Sequence[Test],
    repetitions: int,
    threads: int | None,
    source_options: SourceOptions,
    profile: bool,
) -> Iterator[dict[str, Any]]:
    """The rows, one after the other."""
    from numbainfer.bench import Bench
    from numbainfer.bench_profile import profile as profile_test
    from numbainfer.checkpoint import Weights
    from numbainfer.console import progress_bars
    from numbainfer.device import Device
    from numbainfer.loading import open_model
    from numbainfer.machine import memory_bytes
    from numbainfer.random_weights import RandomWeights

    with progress_bars() as progress:

        def open_weights() -> Weights:
            if architecture is not None:
                weights = RandomWeights(architecture)
                if device.kind == "cpu":  # a GPU gets matrix after matrix, and says itself when it is full
                    weights.require_memory(memory_bytes())
                return weights
            return open_model(
                model, source_options=source_options, require_tokenizer=False, threads=threads, progress=progress
            ).weights

        for device in devices or (Device("cpu"),):
            measurement = Bench(open_weights, device, tests, threads=threads, progress=progress)
            if profile:
                for test in tests:
                    yield from profile_test(measurement, test, repetitions)
            else:
                yield from measurement.run(repetitions)
