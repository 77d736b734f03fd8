"""The command line: parsing and printing only.

Results go to stdout, everything else to stderr. Exit codes: 0; 1 for a failure, with one line "error: ..."; 2 for wrong
usage; 130 after Ctrl-C (128 and the signal's number, as shells have it).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from numbainfer._version import __version__
from numbainfer.errors import NumbaInferError

if TYPE_CHECKING:
    from numbainfer.device import Device

ARCHITECTURES = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")


def main() -> None:
    """Entry point of the `numbainfer` command."""
    debug = "--debug" in sys.argv
    _prepare_streams()
    try:
        with _signals_that_unwind():
            code = _run(sys.argv[1:])
            sys.stdout.flush()  # here, where a full disk or a reader that left can still be told
    except click.ClickException as error:
        context = getattr(error, "ctx", None)  # usage errors know the command
        hint = f" (see {context.command_path} --help)" if context else ""
        code = _fail(error.format_message().removesuffix(".") + hint, 2)
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except BrokenPipeError:
        code = 0  # the reader of our output went away (| head): not an error
    except NumbaInferError as error:
        if debug:
            raise
        code = _fail(str(error), 1)
    except MemoryError:
        if debug:
            raise
        code = _fail("out of memory: lower --ctx-size or take a smaller model", 1)
    except OSError as error:
        if debug:
            raise
        code = _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except Exception as error:
        if debug:
            raise
        code = _fail(f"internal: {type(error).__name__}: {error} (run again with --debug and report what it shows)", 1)
    try:
        sys.stdout.flush()
    except OSError:  # said above, or the reader is gone: keep Python from trying again, and complaining, at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """The exit code of one command. (click's own main would make 1 of a broken pipe.)"""
    try:
        with commands.make_context("numbainfer", arguments) as context:
            commands.invoke(context)
    except click.exceptions.Exit as finished:
        return finished.exit_code
    return 0


def _prepare_streams() -> None:
    """Makes sure that all three streams are there (a shell can close them), and that any text can be printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open till the end)
    for stream in (sys.stdout, sys.stderr):
        # Models write any character; a terminal or a locale may lack it. Windows gives a file or a pipe the
        # encoding of its region, which lacks most.
        encoding = "utf-8" if os.name == "nt" and not stream.isatty() else stream.encoding
        stream.reconfigure(encoding=encoding, errors="replace")  # type: ignore[union-attr]


@contextmanager
def _signals_that_unwind() -> Iterator[None]:
    """Within, `kill` and a closed terminal end the process as Ctrl-C does: what is half-written is removed."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # One that is ignored stays so: nohup does that.
    changed = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        changed[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, before in changed.items():
            signal.signal(number, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: KeyboardInterrupt, but a moment later where Python would print and forget it: in finalizers, and in
    the callback that importing a module leaves behind."""
    inner = frame
    while inner is not None:
        code = inner.f_code
        if code.co_name == "__del__" or (code.co_name == "cb" and "importlib" in code.co_filename):
            threading.Timer(0.01, signal.raise_signal, (number,)).start()
            return
        inner = inner.f_back
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code


class _DeviceType(click.ParamType):
    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Device:
        from numbainfer.device import Device

        try:
            return Device.parse(value)
        except NumbaInferError as error:
            self.fail(str(error), param, ctx)


def _not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    # As a path, "" is the current directory: surely not what a script with an unset variable means.
    if value == "":
        raise click.BadParameter("it is empty")
    return value


_threads = click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads [default: physical cores].")
_ctx_size = click.option(
    "--ctx-size", type=click.IntRange(0), help="Positions to keep; 0: all the model has [default: up to 4096]."
)
_tokenizer = click.option("--tokenizer", type=click.Path(), help="Tokenizer file or directory, for a .bin without one.")
_debug = click.option("--debug", is_flag=True, help="Show tracebacks.")


def _device_option(*names: str, **settings: Any) -> Callable:
    return click.option(*names, type=_DeviceType(), metavar="auto|cpu|cuda[:N]", **settings)


_device = _device_option("--device", default="auto", show_default=True, help="Where to run.")


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


@commands.command()
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@_device
@click.option("-n", "--max-tokens", type=click.IntRange(0), default=512, show_default=True, help="New tokens at most.")
@click.option("--temperature", type=click.FloatRange(0), help="0: always the most likely token [default: 0.7].")
@click.option("--top-k", type=click.IntRange(0), help="Only the k most likely tokens; 0: all [default: 40].")
@click.option("--top-p", type=float, help="The most likely that together reach this [default: 0.95].")
@click.option("--min-p", type=float, help="At least this times the most likely one's probability [default: 0].")
@click.option("--repetition-penalty", type=float, help="Above 1: tokens that were there get less likely [default: 1].")
@click.option("--seed", type=click.IntRange(0), help="Same seed, same text.")
@click.option("--system", metavar="TEXT", help="The system message of a chat model.")
@click.option("--stop", multiple=True, metavar="STR", help="Text that ends the reply (repeatable).")
@_threads
@_ctx_size
@_tokenizer
@click.option("--raw", is_flag=True, help="Continue the prompt as it is: no chat template.")
@click.option("-i", "--interactive", is_flag=True, help="Chat over several turns; /reset forgets, /exit ends.")
@click.option("--stats/--no-stats", default=True, show_default=True, help="Speeds on stderr at the end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@_debug
def run(
    model: str | None,
    prompt: str | None,
    device: Device,
    max_tokens: int,
    system: str | None,
    threads: int | None,
    ctx_size: int | None,
    tokenizer: str | None,
    raw: bool,
    interactive: bool,
    stats: bool,
    as_json: bool,
    debug: bool,
    stop: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Generate text: the reply of a chat model, or the continuation of PROMPT.

    MODEL is a converted directory, a Hugging Face checkpoint directory, a .gguf or a llama2.c .bin; without one, the
    demo model SmolLM2-135M-Instruct, fetched once. PROMPT "-", or none with a pipe on stdin, is read from stdin.

    \b
    numbainfer run "Once upon a time" --temperature 0.8
    numbainfer run model.gguf "Why is the sky blue?" -n 200
    cat question.txt | numbainfer run ./model -
    numbainfer run ./model -i
    """
    from numbainfer.chat_session import Session, chat_loop, reply
    from numbainfer.console import announce_compilation, progress_bars
    from numbainfer.loading import load, names_a_model, require_model
    from numbainfer.sampling import SamplingParams

    if model is not None and prompt is None and not names_a_model(model):
        model, prompt = None, model
    given = {name: value for name, value in sampling.items() if value is not None}
    try:
        SamplingParams(**given, max_tokens=max_tokens, stop=stop)
    except NumbaInferError as error:
        raise click.UsageError(str(error)) from error
    if interactive and as_json:
        raise click.UsageError("--json and --interactive don't go together")
    if model is not None:
        require_model(model)  # before stdin is waited for
    if prompt is None and not interactive:
        interactive = sys.stdin.isatty() and not as_json
    if prompt == "-" or (prompt is None and not interactive):
        prompt = _read_stdin()
    if prompt is not None and not prompt.strip() and not interactive:
        raise NumbaInferError("the prompt is empty: give some text")
    announce_compilation()
    with progress_bars() as progress:
        loaded = load(
            model,
            device=device,
            ctx_size=ctx_size,
            threads=threads,
            tokenizer=tokenizer,
            progress=progress,
        )
    session = Session(loaded, raw=raw, system=system, max_tokens=max_tokens, stop=stop, sampling=given)
    if interactive:
        chat_loop(session, prompt, show_statistics=stats)
    else:
        assert prompt is not None
        click.get_current_context().exit(reply(session, prompt, show_statistics=stats, as_json=as_json))


def _read_stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise NumbaInferError(f"the prompt on stdin is not UTF-8 text: {error}") from error
    return text.removesuffix("\n")


@commands.command()
@click.argument("source", callback=_not_empty)
@click.argument("out", callback=_not_empty)
@click.option(
    "--dtype",
    type=click.Choice(["int8", "float16", "bfloat16", "float32"]),
    default="int8",
    show_default=True,
    help="What matrices become.",
)
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128"]), default="64", show_default=True, help="Values per scale."
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a converted model.")
@_tokenizer
@_debug
def convert(
    source: str, out: str, dtype: str, group_size: str, force: bool, tokenizer: str | None, debug: bool
) -> None:
    """Convert SOURCE to numbainfer's format in the new directory OUT.

    SOURCE is a Hugging Face checkpoint directory (safetensors), a .gguf or a llama2.c .bin. OUT appears when all of it
    is on the disk; an interrupted conversion leaves nothing there.

    \b
    numbainfer convert ./Qwen2.5-0.5B qwen
    numbainfer convert stories15M.bin stories --dtype float32 --tokenizer tokenizer.bin
    """
    from numbainfer.console import announce_compilation, note, progress_bars, size
    from numbainfer.converters import convert as converter
    from numbainfer.converters.source import open_source

    target = converter.Target(dtype, int(group_size))
    announce_compilation()
    with open_source(source, tokenizer=tokenizer) as opened, progress_bars() as progress:
        summary = converter.convert(opened, Path(out), target, force=force, progress=progress)
    note(f"{out}: {summary.parameters:,} parameters, {size(summary.nbytes)} as {dtype}")
    if summary.floating:
        shown = ", ".join(summary.floating[:2]) + (", ..." if len(summary.floating) > 2 else "")
        note(f"{len(summary.floating)} matrices stay float16, no group divides their width: {shown}")


@commands.command()
@click.argument("model", required=False, callback=_not_empty)
@_device_option("--device", "devices", multiple=True, help="Where to run (repeatable) [default: auto].")
@click.option("-p", "--prompt-tokens", type=click.IntRange(0), multiple=True, help="Prompt lengths [default: 512].")
@click.option("-n", "--gen-tokens", type=click.IntRange(0), multiple=True, help="Tokens to generate [default: 128].")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("-d", "--depth", type=click.IntRange(0), multiple=True, help="Tokens before the test [default: 0].")
@click.option("--random", "architecture", type=click.Choice(ARCHITECTURES), help="Random int8 weights of a real shape.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json", "markdown", "csv"]), default="table", show_default=True
)
@_threads
@_tokenizer
@_debug
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


@commands.command()
@click.argument("model", required=False, callback=_not_empty)
@_ctx_size
@_tokenizer
@_debug
def info(model: str | None, ctx_size: int | None, tokenizer: str | None, debug: bool) -> None:
    """Show what MODEL is and what it needs; with no MODEL, what this machine is.

    \b
    numbainfer info
    numbainfer info model.gguf --ctx-size 8192
    """
    from numbainfer import info as facts
    from numbainfer.bench_output import print_facts

    print_facts(facts.machine() if model is None else facts.model(model, ctx_size, tokenizer))


@commands.command()
@click.argument("model", callback=_not_empty)
@click.argument("file", callback=_not_empty)
@click.option("--ctx-size", type=click.IntRange(4), default=512, show_default=True, help="Tokens of a chunk.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@_device
@_threads
@_tokenizer
@_debug
def perplexity(
    model: str,
    file: str,
    ctx_size: int,
    output: str,
    device: Device,
    threads: int | None,
    tokenizer: str | None,
    debug: bool,
) -> None:
    """Measure how well MODEL predicts the text in FILE ("-": stdin), as llama.cpp defines it.

    \b
    numbainfer perplexity ./qwen text.txt
    numbainfer perplexity ./qwen text.txt --ctx-size 2048 -o json
    """
    from numbainfer.bench_output import print_facts
    from numbainfer.console import announce_compilation, progress_bars
    from numbainfer.loading import load
    from numbainfer.perplexity import perplexity as measure

    try:
        text = _read_stdin() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NumbaInferError(f"{file} is not UTF-8 text: {error}") from error
    announce_compilation()
    with progress_bars() as progress:
        loaded = load(
            model,
            device=device,
            ctx_size=ctx_size,
            threads=threads,
            tokenizer=tokenizer,
            chunk=128,  # logits of all tokens of a chunk are kept at once: 78 MB at a vocabulary of 150,000
            progress=progress,
        )
        result = measure(loaded.engine, text, ctx_size, progress)
    if output == "json":
        print(json.dumps(result.__dict__))
    else:
        print_facts({k: f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in result.__dict__.items()})


if __name__ == "__main__":
    main()
