"""Options and arguments that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from numbainfer.errors import NumbaInferError

if TYPE_CHECKING:
    from numbainfer.device import Device


class DeviceType(click.ParamType):
    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Device:
        from numbainfer.device import Device

        try:
            return Device.parse(value)
        except NumbaInferError as error:
            self.fail(str(error), param, ctx)


def not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    # As a path, "" is the current directory: surely not what a script with an unset variable means.
    if value == "":
        raise click.BadParameter("it is empty")
    return value


threads_option = click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads [default: physical cores].")
ctx_size_option = click.option(
    "--ctx-size", type=click.IntRange(0), help="Positions to keep; 0: all the model has [default: up to 4096]."
)
tokenizer_option = click.option(
    "--tokenizer", type=click.Path(), help="Tokenizer file or directory, for a .bin without one."
)
debug_option = click.option("--debug", is_flag=True, help="Show tracebacks.")


def make_device_option(*names: str, **settings: Any) -> Callable:
    return click.option(*names, type=DeviceType(), metavar="auto|cpu|cuda[:N]", **settings)


device_option = make_device_option("--device", default="auto", show_default=True, help="Where to run.")


def read_stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise NumbaInferError(f"the prompt on stdin is not UTF-8 text: {error}") from error
    return text.removesuffix("\n")
