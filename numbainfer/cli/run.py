"""`numbainfer run`: text, one reply, or a chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from numbainfer.cli.options import (
    argument,
    command,
    complete_path,
    ctx_size_option,
    device_option,
    general_options,
    option,
    read_stdin,
    source_options,
    threads_option,
)
from numbainfer.errors import NumbaInferError

if TYPE_CHECKING:
    from numbainfer.converters.source_options import SourceOptions
    from numbainfer.device import Device


def _biases(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[int, float] | None:
    found = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not a token id, = and a number: 123=-5 or 123=-inf") from error
    return found or None


def _read(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{path} is not UTF-8 text") from error


def _schema(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A schema as it is, or from a file."""
    if value is None or value.lstrip().startswith("{"):
        return value
    if not Path(value).is_file():
        raise click.BadParameter(f"{value!r} is neither JSON that begins with {{ nor a file")
    return _read(ctx, param, value)


@command(
    "Generate text, answer a prompt, or chat.",
    examples="""
numbainfer run "Once upon a time" --temperature 0.8
numbainfer run model.gguf "Why is the sky blue?" -n 200
cat question.txt | numbainfer run ./model -
numbainfer run ./model "Name and age of Ada" --json-schema '{"type": "object"}'
numbainfer run ./model -i
""",
)
@argument("model", required=False)
@click.argument("prompt", required=False)
@device_option
@option(
    "-n",
    "--max-tokens",
    type=click.IntRange(0),
    metavar="N",
    default=512,
    show_default=True,
    help="New tokens at most.",
)
@option(
    "--temperature",
    type=click.FloatRange(0),
    metavar="X",
    help="0: always the most likely token [default: 0.7].",
    section="Sampling",
)
@option(
    "--top-k",
    type=click.IntRange(0),
    metavar="N",
    help="Only the k most likely tokens; 0: all [default: 40].",
    section="Sampling",
)
@option(
    "--top-p",
    type=float,
    metavar="X",
    help="The most likely that together reach this [default: 0.95].",
    section="Sampling",
)
@option(
    "--min-p",
    type=float,
    metavar="X",
    help="At least this times the most likely one's probability [default: 0].",
    section="Sampling",
)
@option(
    "--typical-p",
    type=float,
    metavar="X",
    help="The least surprising that together reach this [default: 1].",
    section="Sampling",
)
@option(
    "--mirostat",
    "mirostat_tau",
    type=float,
    metavar="TAU",
    help="Hold this surprise, in bits, instead of the filters above; 0: off [default: 0].",
    section="Sampling",
)
@option(
    "--repetition-penalty",
    type=float,
    metavar="X",
    help="Above 1: tokens that were there get less likely [default: 1].",
    section="Sampling",
)
@option(
    "--frequency-penalty",
    type=float,
    metavar="X",
    help="Taken off a token's logit for each time that the reply has it [default: 0].",
    section="Sampling",
)
@option(
    "--presence-penalty",
    type=float,
    metavar="X",
    help="Taken off a token's logit if the reply has it at all [default: 0].",
    section="Sampling",
)
@option(
    "--logit-bias",
    multiple=True,
    metavar="ID=X",
    callback=_biases,
    help="Added to the logit of a token id; -inf bans it (repeatable).",
    section="Sampling",
)
@option("--seed", type=click.IntRange(0), metavar="N", help="Same seed, same text.", section="Sampling")
@option(
    "--json-schema",
    metavar="JSON|FILE",
    callback=_schema,
    help="Reply with JSON that fits this schema; {} for any JSON.",
    section="Form of the reply",
)
@option("--regex", metavar="RE", help="Reply with what this matches from start to end.", section="Form of the reply")
@option(
    "--grammar",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    callback=_read,
    help="Reply with what this grammar describes, as Lark writes them.",
    section="Form of the reply",
)
@option(
    "--logprobs",
    type=click.IntRange(0),
    metavar="N",
    help="With --json: log-probabilities of each token and of the N most likely ones.",
)
@option(
    "--speculate",
    is_flag=True,
    help="Guess what the text has said before: the same reply, faster where it repeats.",
    section="Speed",
)
@option(
    "--draft",
    metavar="MODEL",
    help="Let a smaller MODEL of the same family guess: the same reply, faster if it guesses well.",
    shell_complete=complete_path,
    section="Speed",
)
@option("--system", metavar="TEXT", help="The system message of a chat model.")
@option("--stop", multiple=True, metavar="STR", help="Text that ends the reply (repeatable).")
@threads_option
@ctx_size_option
@source_options
@option("--raw", is_flag=True, help="Continue the prompt as it is: no chat template.")
@option("-i", "--interactive", is_flag=True, help="Chat over several turns; /help lists what you can do.")
@option("--no-think", is_flag=True, help="Ask a model that reasons first (Qwen3) to answer at once.")
@option("--stats/--no-stats", default=True, show_default=True, help="Speeds on stderr at the end.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@general_options
def run(
    model: str | None,
    prompt: str | None,
    device: Device,
    max_tokens: int,
    system: str | None,
    threads: int | None,
    ctx_size: int | None,
    source_options: SourceOptions,
    raw: bool,
    interactive: bool,
    no_think: bool,
    stats: bool,
    as_json: bool,
    speculate: bool,
    draft: str | None,
    stop: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Generate text: the reply of a chat model, or the continuation of PROMPT.

    MODEL is a hub id (OWNER/NAME[/FILE][@REVISION]), a converted, Hugging Face or Meta directory, a .gguf, or a .bin or
    .pt of llama2.c; without one, the
    demo model SmolLM2-135M-Instruct, fetched once. PROMPT "-", or none with a pipe on stdin, is read from stdin.
    """
    from numbainfer.chat_loop import chat_loop
    from numbainfer.chat_session import Session, reply
    from numbainfer.console import announce_compilation, progress_bars
    from numbainfer.constraints import require_library
    from numbainfer.loading import load, names_a_model, require_model
    from numbainfer.sampling import SamplingParams
    from numbainfer.speculation import DraftModel, lookup

    if model is not None and prompt is None and not names_a_model(model):
        model, prompt = None, model
    given = {name: value for name, value in sampling.items() if value is not None}
    try:
        SamplingParams(**given, max_tokens=max_tokens, stop=stop)
    except NumbaInferError as error:
        raise click.UsageError(str(error)) from error
    if given.get("logprobs") is not None and not as_json:
        raise click.UsageError("--logprobs goes with --json")
    if speculate and draft is not None:
        raise click.UsageError("--speculate and --draft are two ways to guess: give one")
    if interactive and as_json:
        raise click.UsageError("--json and --interactive don't go together")
    if given.keys() & {"json_schema", "regex", "grammar"}:
        require_library()
    if model is not None:
        require_model(model)  # before stdin is waited for
    if draft is not None:
        require_model(draft)
    if prompt is None and not interactive:
        interactive = sys.stdin.isatty() and not as_json
    if prompt == "-" or (prompt is None and not interactive):
        prompt = read_stdin()
    if prompt is not None and not prompt.strip() and not interactive:
        raise NumbaInferError("the prompt is empty: give some text")
    announce_compilation()
    with progress_bars() as progress:
        loaded = load(
            model,
            device=device,
            ctx_size=ctx_size,
            threads=threads,
            source_options=source_options,
            progress=progress,
        )
        if speculate:
            loaded.engine.drafter = lookup
        if draft is not None:
            smaller = load(draft, device=device, ctx_size=ctx_size, threads=threads, progress=progress)
            loaded.engine.drafter = DraftModel(smaller.engine, loaded.engine)
    session = Session(
        loaded,
        raw=raw,
        system=system,
        max_tokens=max_tokens,
        stop=stop,
        sampling=given,
        template={"enable_thinking": False} if no_think else {},
    )
    if interactive:
        chat_loop(session, prompt, show_statistics=stats)
    else:
        assert prompt is not None
        click.get_current_context().exit(reply(session, prompt, show_statistics=stats, as_json=as_json))
