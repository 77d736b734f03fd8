"""Runs a chat template, which is a stranger's program, within bounds.

Jinja2's immutable sandbox keeps a template from Python's internals, from files and from changing what
it is given. It does not keep one from running for ever or from taking all memory, so this module adds:

- the template is at most MAX_TEMPLATE characters;
- a text that it makes, whether output or intermediate, is at most MAX_TEXT characters;
- loops, calls, filters and the texts and lists that they make are counted against one budget (WORK),
  and between them the clock is checked (MAX_SECONDS);
- `range` has at most 100,000 numbers (Jinja2's own bound), `*`, `**` and `%` cannot make huge values
  out of small ones, and the few functions that pad text to any width are not there.

What is left: a single comparison of values nested in one another many times over runs to its end before
the clock is looked at. No template that is written in good faith comes near any bound.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from numbainfer.errors import NumbaInferError

MAX_TEMPLATE = 1 << 20  # characters; the longest of known models is under 20,000
MAX_TEXT = 1 << 22  # characters: about a million tokens, eight times the longest context that we run
WORK = 1 << 27  # characters and list entries made in one rendering, and STEP for every loop or call
STEP = 32  # a million loop steps or calls in all
MAX_SECONDS = 5.0  # rendering a long conversation takes milliseconds
MAX_INDENT = 64  # spaces; beyond it `indent` and `tojson` would blow a text up
MAX_POWER_BITS = 4096  # of an integer that `*` or `**` makes

# Filters that pad or wrap to a width that the template names, or that import nothing but trouble here.
_DROPPED_FILTERS = ("center", "wordwrap", "urlize", "xmlattr", "pprint", "batch", "slice", "filesizeformat")
_DROPPED_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format_map", "to_bytes")


class SandboxedTemplate:
    """A compiled chat template. Raises NumbaInferError where it does not compile."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise NumbaInferError(f"the chat template is longer than {MAX_TEMPLATE} characters; use --raw")
        self._lock = threading.Lock()  # the environment keeps one rendering's count
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise NumbaInferError(
                f"the chat template is broken at line {error.lineno}: {_one_line(error)}; use --raw"
            ) from error
        except (
            Exception
        ) as error:  # deep nesting: RecursionError, SyntaxError or MemoryError of Python's parser
            raise NumbaInferError(
                f"the chat template does not compile: {_one_line(error)}; use --raw"
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text for these variables. Raises NumbaInferError with one line."""
        with self._lock:
            self._environment.start_counting()
            try:
                return self._environment.concat(self._template.generate(**variables))
            except SecurityError as error:
                raise NumbaInferError(
                    f"the chat template was stopped: {_one_line(error)}; use --raw"
                ) from error
            except TemplateError as error:
                raise NumbaInferError(f"the chat template: {_one_line(error)}") from error
            except Exception as error:  # a template can make any of Python's operations fail
                raise NumbaInferError(f"the chat template failed: {_one_line(error)}; use --raw") from error


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with Hugging Face's conventions for templates, and the bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _GenerationTag],
            finalize=self._check_nesting,
        )
        self.code_generator_class = _CountingCodeGenerator
        # Jinja2 joins the pieces of its output, of macros and of block assignments with this function.
        self.concat = self._join  # type: ignore[assignment]
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = self._to_json
        for name, function in self.filters.items():
            self.filters[name] = self._counted(name, function)
        self.filters["_iterated"] = self._iterated
        self.filters["_concatenated"] = self._concatenated
        self.filters["_made"] = self._made
        self.start_counting()

    def start_counting(self) -> None:
        """Gives the next rendering its budget and its time."""
        self._left = WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def _spend(self, amount: int) -> None:
        self._left -= amount + STEP
        if self._left < 0:
            raise SecurityError("it does far more work than a prompt takes")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it runs longer than {MAX_SECONDS:g} seconds")

    def _made(self, value: Any) -> Any:
        """Counts a value that an operation has made, by its length."""
        size = len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0
        _check_size(size)
        self._spend(size)
        return value

    def _join(self, pieces: Iterable[str]) -> str:
        parts: list[str] = []
        size = 0
        for piece in pieces:
            size += len(piece)
            _check_size(size)
            parts.append(piece)
        self._spend(size)
        return "".join(parts)

    def _concatenated(self, values: Iterable[Any]) -> str:
        """The `~` operator."""
        return self._join(str(self._check_nesting(value)) for value in values)

    def _iterated(self, values: Any) -> Any:
        """What a `for` loop runs over, counted before it starts."""
        items = values if hasattr(values, "__len__") else list(values)
        self._spend(len(items) * STEP)
        return items

    def _check_nesting(self, value: Any) -> Any:
        """Refuses to write out a value that is small in memory and huge in text, being nested in itself."""
        left = MAX_TEXT
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, Mapping):
                pending += item.keys()
                pending += item.values()
            elif isinstance(item, (list, tuple)):
                pending += item
            left -= 1
            if left < len(pending):
                raise SecurityError("it writes out a value with too many parts")
        return value

    def _to_json(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        """JSON as a prompt wants it: Jinja2's own filter escapes <, >, & and ' for HTML."""
        if isinstance(indent, str) or (indent or 0) > MAX_INDENT:
            raise SecurityError("it indents JSON too far")
        return json.dumps(
            self._check_nesting(value),
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys,
        )  # fmt: skip

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with its arguments checked and its result counted."""

        @functools.wraps(function)  # keeps the marks that say whether it takes the environment first
        def guarded(*args: Any, **kwargs: Any) -> Any:
            own = args[1:] if hasattr(function, "jinja_pass_arg") else args
            value, rest = (own[0], [*own[1:], *kwargs.values()]) if own else (None, [])
            if name == "replace":
                _check_replacement(str(value), [str(item) for item in rest])
            elif name == "join":
                value = list(value)
                _check_size(len(value) * sum(len(str(item)) for item in rest))
                args = tuple(value if item is own[0] else item for item in args)
                self._check_nesting(value)
            elif name == "indent":
                _check_size(str(value).count("\n") * max((_width(item) for item in rest), default=4))
            elif name == "format":
                _check_format(str(value), rest)
            elif name == "sum" and any(isinstance(item, (list, tuple)) for item in rest):
                raise SecurityError("it sums lists")
            elif name in (
                "string",
                "upper",
                "lower",
                "trim",
                "e",
                "escape",
                "forceescape",
                "title",
                "capitalize",
            ):
                self._check_nesting(value)
            return self._made(function(*args, **kwargs))

        return guarded

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Every call that a template makes comes through here."""
        method = getattr(obj, "__wrapped__", obj)  # str.format comes wrapped by the sandbox
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            rest = [*args, *kwargs.values()]
            if method.__name__ == "format":
                _check_format(text, rest)
            elif method.__name__ == "replace":
                _check_replacement(text, [str(item) for item in rest])
            elif method.__name__ == "join" and args:
                items = list(args[0])
                _check_size(len(items) * len(text) + sum(map(len, items)))
                args = (items, *args[1:])
        if isinstance(obj, LoopContext) and args:
            args = (self._iterated(args[0]), *args[1:])
        self._spend(0)
        return self._made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators of `intercepted_binops`, checked before they are done."""
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else [right])
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if hasattr(text, "__len__") and isinstance(times, int):
                    _check_size(len(text) * times)
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        return self._made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes, int)) and attr in _DROPPED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


class _CountingCodeGenerator(CodeGenerator):
    """Compiles a template after loops, `~` and slices, which the sandbox has no hook for, got one."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        _Guards().visit(node)
        super().visit_Template(node, frame)


class _Guards(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_iterated")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return _filtered(parts, "_concatenated")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, "_made") if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; a prompt takes them as they are."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    """What templates call where they refuse a conversation."""
    raise TemplateError(message)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text or type(error).__name__


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"it makes a text or list of more than {MAX_TEXT} entries")


def _check_bits(bits: int) -> None:
    if bits > MAX_POWER_BITS:
        raise SecurityError("it makes a number of thousands of digits")


def _check_replacement(text: str, rest: list[str]) -> None:
    if len(rest) >= 2:
        _check_size(len(text) + text.count(rest[0]) * len(rest[1]))


def _check_format(form: str, rest: Iterable[Any]) -> None:
    """Widths may stand in the format itself or, for each of its fields, among the arguments."""
    size = sum(int(digits[:10]) for digits in re.findall(r"\d+", form))
    if "*" in form or "{" in form:
        fields = form.count("*") + form.count("{")
        size += fields * sum(abs(item) for item in rest if isinstance(item, int))
    _check_size(size)


def _width(value: Any) -> int:
    return len(value) if isinstance(value, str) else int(value)
