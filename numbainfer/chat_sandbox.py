"""Runs a chat template, which is a stranger's program, within bounds.

Jinja2's immutable sandbox keeps a template from Python's internals, from files and from changing what
it is given. It does not keep one from running for ever or from taking all memory, so here:

- the template is at most MAX_TEMPLATE characters;
- any text that it makes, output or intermediate, is at most `chat_bounds.MAX_TEXT` characters;
- loops, calls, filters and what they make are counted against one budget, and between them the clock is
  looked at (`chat_bounds.WORK`, `MAX_SECONDS`);
- `range` has at most 100,000 numbers (Jinja2's own bound); `*`, `**`, `%`, `~`, formats, replacements and
  the like are refused where they would make something huge; what pads a text to any width is not there.

What is left: one comparison of lists that hold the same list many times over runs to its end before the
clock is looked at. No template written in good faith comes near any bound.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from numbainfer import chat_bounds as bounds
from numbainfer.errors import NumbaInferError

MAX_TEMPLATE = 1 << 17  # characters; the longest of known models has 20,000

# Filters and methods that pad or wrap to any width, or whose cost nothing here estimates. No chat template
# is known to use one.
_DROPPED_FILTERS = (
    "batch", "center", "filesizeformat", "pprint", "random", "slice", "striptags", "urlencode", "urlize",
    "wordcount", "wordwrap", "xmlattr",
)  # fmt: skip
_DROPPED_METHODS = ("center", "expandtabs", "format_map", "ljust", "rjust", "to_bytes", "translate", "zfill")
# Filters that write out whatever value they get.
_WRITING_FILTERS = (
    "capitalize",
    "e",
    "escape",
    "forceescape",
    "lower",
    "string",
    "title",
    "trim",
    "truncate",
    "upper",
)


class SandboxedTemplate:
    """A compiled chat template. Raises NumbaInferError where it does not compile."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise NumbaInferError(f"the chat template is longer than {MAX_TEMPLATE} characters; use --raw")
        self._lock = threading.Lock()  # the environment counts one rendering at a time
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            where = f"at line {error.lineno}: {_one_line(error)}"
            raise NumbaInferError(f"the chat template is broken {where}; use --raw") from error
        except Exception as error:  # nested too deeply for Python's compiler, which has several ways to say so
            raise NumbaInferError(f"the chat template does not compile: {_one_line(error)}; use --raw") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text for these variables. Raises NumbaInferError with one line."""
        with self._lock:
            self._environment.budget.restart()
            try:
                return self._environment.budget.join(self._template.generate(**variables))
            except SecurityError as error:
                raise NumbaInferError(f"the chat template was stopped: {_one_line(error)}; use --raw") from error
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
            finalize=bounds.check_extent,  # called on every value that is put out
        )
        self.code_generator_class = _GuardingCodeGenerator
        self.budget = bounds.Budget()
        # Jinja2 joins what macros, blocks and block assignments put out with this function.
        self.concat = self.budget.join  # type: ignore[method-assign]
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _to_json
        for name, function in self.filters.items():
            self.filters[name] = self._guarded(name, function)
        self.filters[_ITERATE] = self.budget.iterate
        self.filters[_CONCATENATE] = self.budget.concatenate
        self.filters[_MADE] = self.budget.made

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that checks its arguments and counts its result."""
        own = 1 if hasattr(function, "jinja_pass_arg") else 0  # some take the environment first

        @functools.wraps(function)  # with that mark
        def guarded(*args: Any, **kwargs: Any) -> Any:
            value = args[own] if len(args) > own else None
            rest = [*args[own + 1 :], *kwargs.values()]
            if name in _WRITING_FILTERS:
                bounds.check_extent(value)
            elif name == "replace":
                bounds.check_replace(str(bounds.check_extent(value)), rest)
            elif name == "format":
                bounds.check_format(value, rest)
            elif name == "indent":
                bounds.check_indent(str(bounds.check_extent(value)), rest)
            elif name == "join" and value is not None:
                value = list(value)  # a generator could not be looked at twice
                bounds.check_join(value, next((item for item in rest if isinstance(item, str)), ""))
                args = (*args[:own], value, *args[own + 1 :])
            elif name == "sum" and any(isinstance(item, (list, tuple)) for item in rest):
                raise SecurityError("it sums lists")
            return self.budget.made(function(*args, **kwargs))

        return guarded

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes comes through here, its own macros' too."""
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            rest = [*args, *kwargs.values()]
            if method.__name__ == "format":
                bounds.check_format(text, rest)
            elif method.__name__ == "replace":
                bounds.check_replace(text, rest)
            elif method.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
                bounds.check_join(args[0], text)
        elif isinstance(obj, LoopContext) and args:  # a recursive loop
            args = (self.budget.iterate(args[0]), *args[1:])
        self.budget.spend()
        return self.budget.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators of `intercepted_binops`, estimated before they are done."""
        if operator == "+":
            bounds.check_add(left, right)
        elif operator == "*":
            bounds.check_multiply(left, right)
        elif operator == "**":
            bounds.check_power(left, right)
        elif isinstance(left, str):
            bounds.check_format(left, right if isinstance(right, tuple) else (right,))
        return self.budget.made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes, int)) and attr in _DROPPED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


# Names of filters that the code generator puts in; the spaces keep templates from calling them.
_ITERATE, _CONCATENATE, _MADE = "guard iterate", "guard concatenate", "guard made"


class _GuardingCodeGenerator(CodeGenerator):
    """Compiles a template after loops, `~` and slices, which the sandbox has no hook for, got one."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        _Guards().visit(node)
        super().visit_Template(node, frame)


class _Guards(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), _ITERATE)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return _filtered(parts, _CONCATENATE)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; a prompt takes them as they are."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as prompts have it: Jinja2's own filter escapes <, >, & and ' for HTML."""
    if any(len(text) > bounds.MAX_INDENT for text in separators or ()) or int(indent or 0) > bounds.MAX_INDENT:
        raise SecurityError("it spreads JSON too far")
    return json.dumps(
        bounds.check_extent(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
