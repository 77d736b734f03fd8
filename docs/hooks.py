"""For mkdocs: puts the command line's own help into cli.md, so that the page can't differ from the program."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent.parent))
from numbainfer.cli.group import commands
from numbainfer.cli.options import Sections

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Called by mkdocs for every page."""
    return (
        markdown.replace(MARK, "\n\n".join(_command(name) for name in commands.commands))
        if MARK in markdown
        else markdown
    )


def _command(name: str) -> str:
    command = commands.commands[name]
    assert isinstance(command, Sections)
    context = click.Context(command, info_name=name, parent=click.Context(commands, info_name="numbainfer"))
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"## {name}", f"```text\nnumbainfer {name} {usage}\n```", _paragraphs(command.help or "")]
    for section, options in command.options_by_section(context).items():
        rows = [record for option in options if (record := option.get_help_record(context)) is not None]
        table = ["| option | |", "|---|---|", *(f"| `{left}` | {_escape(right)} |" for left, right in rows)]
        parts += [f"**{section}**", "\n".join(table)]
    for section, text in command.sections.items():
        parts += [f"**{section}**", f"```text\n{text.strip()}\n```"]
    return "\n\n".join(parts)


def _paragraphs(help_text: str) -> str:
    """click's help as markdown: paragraphs after a \\b keep their lines."""
    blocks = []
    for block in inspect.cleandoc(help_text).split("\n\n"):
        lines = block.splitlines()
        blocks.append("```text\n" + "\n".join(lines[1:]) + "\n```" if lines[0] == "\b" else _escape(block))
    return "\n\n".join(blocks)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[").replace("]", "\\]")
