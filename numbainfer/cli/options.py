"""What the commands share: how their help is laid out, and options and arguments that several of them take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from numbainfer import console
from numbainfer.errors import NumbaInferError

if TYPE_CHECKING:
    from numbainfer.device import Device


class Option(click.Option):
    """An option that stands under a heading of its own in --help."""

    def __init__(self, *names: Any, section: str = "Options", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section


class Sections(click.Command):
    """Help with options under headings, then examples, then further sections.

    sections: heading -> text, whose lines stay as they are.
    """

    def __init__(self, *args: Any, sections: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.sections = sections or {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, options in self.options_by_section(ctx).items():
            with formatter.section(section):
                formatter.write_dl([record for o in options if (record := o.get_help_record(ctx)) is not None])
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def options_by_section(self, ctx: click.Context) -> dict[str, list[click.Parameter]]:
        """Options that are shown, under their headings; "Options" first, "General" last."""
        found: dict[str, list[click.Parameter]] = {"Options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and parameter.get_help_record(ctx) is not None:
                found.setdefault(getattr(parameter, "section", "General"), []).append(parameter)
        found["General"] = found.pop("General", [])
        return {section: options for section, options in found.items() if options}

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, text in self.sections.items():
            with formatter.section(section):
                formatter.write_text("\b\n" + text.strip("\n"))


class Command(Sections):
    """A command of `numbainfer`."""


class Group(Sections, click.Group):
    """`numbainfer` itself. Its commands stand in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def command(summary: str, examples: str, sections: dict[str, str] | None = None) -> Callable[[Callable], Command]:
    """Decorator: a command with the line that stands for it in the list of commands, examples, and further sections."""
    return click.command(cls=Command, short_help=summary, sections={**(sections or {}), "Examples": examples})


option: Callable[..., Callable] = partial(click.option, cls=Option)


class DeviceType(click.ParamType):
    """auto, cpu, cuda or cuda:N."""

    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Device:
        from numbainfer.device import Device

        try:
            return Device.parse(value)
        except NumbaInferError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(kind) for kind in ("auto", "cpu", "cuda") if kind.startswith(incomplete)]


def not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    # As a path, "" is the current directory: surely not what a script with an unset variable means.
    if value == "":
        raise click.BadParameter("it is empty")
    return value


def complete_path(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For the shell: files and directories."""
    return [CompletionItem(incomplete, type="file")]


argument: Callable[..., Callable] = partial(click.argument, shell_complete=complete_path)

threads_option = option(
    "-t", "--threads", type=click.IntRange(1), metavar="N", help="CPU threads [default: physical cores]."
)
ctx_size_option = option(
    "--ctx-size",
    type=click.IntRange(0),
    metavar="N",
    help="Positions to keep; 0: all the model has [default: up to 4096].",
)


def source_options(function: Callable) -> Callable:
    """Decorator: what a model's files may leave unsaid; the command gets it as one SourceOptions, `source_options`."""

    @wraps(function)
    def gather(*args: Any, tokenizer: Any, config: Any, rope_layout: Any, rope_theta: Any, **rest: Any) -> Any:
        from numbainfer.converters.source_options import SourceOptions

        return function(*args, source_options=SourceOptions(tokenizer, config, rope_layout, rope_theta), **rest)

    decorated: Callable = gather
    for names, settings in (
        (
            ("--rope-theta",),
            {
                "type": click.FloatRange(0, min_open=True),
                "metavar": "X",
                "help": "RoPE's base of a .bin or .pt [default: 10000].",
            },
        ),
        (
            ("--rope-layout",),
            {
                "type": click.Choice(["interleaved", "half-split"]),
                "help": "How a .bin or .pt pairs q and k: Meta's way or Hugging Face's [default: interleaved].",
            },
        ),
        (("--config",), {"type": click.Path(), "help": "A config.json for a .bin, .pt or .pth, which have none."}),
        (("--tokenizer",), {"type": click.Path(), "help": "Tokenizer file or directory, for a model without one."}),
    ):
        decorated = option(*names, section="What the files don't say", **settings)(decorated)
    return decorated


def make_device_option(*names: str, **settings: Any) -> Callable:
    return option(*names, type=DeviceType(), metavar="auto|cpu|cuda[:N]", **settings)


device_option = make_device_option("--device", default="auto", show_default=True, help="Where to run.")


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    given = {name for name in ("quiet", "verbose") if value and param.name == name} | ctx.meta.get(__name__, set())
    if len(given) == 2:
        raise click.UsageError("--quiet and --verbose don't go together", ctx)
    ctx.meta[__name__] = given
    console.verbosity = console.QUIET if "quiet" in given else console.VERBOSE if "verbose" in given else console.NORMAL


def general_options(function: Callable) -> Callable:
    """Decorator: -q, -v and --debug, which every command has. They reach console.verbosity and main() by themselves."""
    for names, text, callback in (
        (("--debug",), "Show tracebacks.", None),
        (("-v", "--verbose"), "Say more on stderr: what runs where, and how long it took.", _set_verbosity),
        (("-q", "--quiet"), "Results and errors only: no progress, no notes, no statistics.", _set_verbosity),
    ):
        function = option(
            *names, is_flag=True, expose_value=False, callback=callback, section="General", help=text, is_eager=True
        )(function)
    return function


def read_stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise NumbaInferError(f"the prompt on stdin is not UTF-8 text: {error}") from error
    return text.removesuffix("\n")
