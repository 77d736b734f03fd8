"""Reads the pickles in PyTorch's files without Python's pickle: nothing in them can be run.

A pickle is a program for a small stack machine (https://docs.python.org/3/library/pickletools.html). This one knows
the instructions that build dicts, lists, numbers, strings and tensors, and no other; what calls anything else is
refused by name. Every length is held against the bytes that are there, and the work and memory are bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from numbainfer.errors import NumbaInferError
from numbainfer.safetensors_file import shown

_MAX_BYTES = 16 << 20  # the pickle of a model with 10,000 tensors has 3 MB
_MAX_STEPS = 2_000_000  # bounds the time (about 2 s) and the objects that exist
_MARK = object()


class Global:
    """A name that a pickle may use, and what calling it does here."""

    def __init__(self, name: str, call: Callable[..., Any] | None) -> None:
        self.name, self.call = name, call


class PickleReader:
    """The machine. `names` maps "module name" to what it stands for; `load` turns a persistent id into an object."""

    def __init__(self, names: Mapping[str, Global], load: Callable[[Any], Any]) -> None:
        self.names, self.load = names, load

    def read(self, data: bytes, start: int = 0) -> tuple[Any, int]:
        """The object that the pickle at data[start:] makes, and where the pickle ends. Raises NumbaInferError."""
        self.data, self.position = data, start
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        end = min(len(data), start + _MAX_BYTES)
        self.end = end
        try:
            for _ in range(_MAX_STEPS):
                code = self.take(1)[0]
                if code == 0x2E:  # STOP
                    (value,) = self.stack
                    return value, self.position
                step = _STEPS.get(code)
                if step is None:
                    raise NumbaInferError(f"its pickle has the instruction {code:#04x}, which no model needs")
                step(self)
        except (IndexError, KeyError, ValueError, TypeError, struct.error, AttributeError, OverflowError) as error:
            raise NumbaInferError(f"its pickle is damaged at byte {self.position}") from error
        raise NumbaInferError("its pickle is too long for a model's")

    def take(self, count: int) -> bytes:
        if count > self.end - self.position:
            raise NumbaInferError("its pickle is cut off")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def line(self) -> str:
        stop = self.data.index(b"\n", self.position, min(self.end, self.position + 256))
        text = self.data[self.position : stop].decode("utf-8")
        self.position = stop + 1
        return text

    def since_mark(self) -> list[Any]:
        """The objects above the topmost mark, which goes too."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("no mark")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def find(self, module: Any, name: Any) -> None:
        found = self.names.get(f"{module} {name}")
        if found is None:
            raise NumbaInferError(
                f"refused: its pickle would run {shown(f'{module}.{name}')}, which no model's weights need; nothing "
                "was run. If you trust the file, load it with PyTorch and save the state dict as safetensors"
            )
        self.push(found)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or function.call is None or not isinstance(arguments, tuple):
            raise ValueError("not a call")
        self.push(function.call(*arguments))

    def build(self) -> None:
        """The state of an OrderedDict: a state dict's _metadata, which says nothing of its tensors."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("state of what has none")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise ValueError("a key that is neither text nor a number")
            target[key] = value

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("not a list")
        target.extend(items)

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def skip_protocol(self) -> None:
        version = self.number("B")
        if version > 5:
            raise NumbaInferError(f"its pickle has protocol {version}, which is not known")


def _text(reader: PickleReader, code: str) -> None:
    reader.push(reader.take(reader.number(code)).decode("utf-8", "surrogatepass"))


def _pairs(reader: PickleReader) -> None:
    value, key = reader.pop(), reader.pop()
    reader.set_items([key, value])


# The instructions by their bytes, named as in Python's pickletools.
_STEPS: dict[int, Callable[[PickleReader], None]] = {
    0x80: PickleReader.skip_protocol,  # PROTO
    0x95: lambda r: r.number("Q"),  # FRAME: how much to read at once
    ord("("): lambda r: r.push(_MARK),  # MARK
    ord("N"): lambda r: r.push(None),  # NONE
    0x88: lambda r: r.push(True),  # NEWTRUE
    0x89: lambda r: r.push(False),  # NEWFALSE
    ord("J"): lambda r: r.push(r.number("i")),  # BININT
    ord("K"): lambda r: r.push(r.number("B")),  # BININT1
    ord("M"): lambda r: r.push(r.number("H")),  # BININT2
    0x8A: lambda r: r.push(int.from_bytes(r.take(r.number("B")), "little", signed=True)),  # LONG1
    ord("G"): lambda r: r.push(struct.unpack(">d", r.take(8))[0]),  # BINFLOAT
    ord("X"): lambda r: _text(r, "I"),  # BINUNICODE
    0x8C: lambda r: _text(r, "B"),  # SHORT_BINUNICODE
    0x8D: lambda r: _text(r, "Q"),  # BINUNICODE8
    ord("U"): lambda r: _text(r, "B"),  # SHORT_BINSTRING, Python 2's
    ord("T"): lambda r: _text(r, "I"),  # BINSTRING
    ord("}"): lambda r: r.push({}),  # EMPTY_DICT
    ord("]"): lambda r: r.push([]),  # EMPTY_LIST
    ord(")"): lambda r: r.push(()),  # EMPTY_TUPLE
    ord("t"): lambda r: r.push(tuple(r.since_mark())),  # TUPLE
    0x85: lambda r: r.tuple_of(1),  # TUPLE1
    0x86: lambda r: r.tuple_of(2),  # TUPLE2
    0x87: lambda r: r.tuple_of(3),  # TUPLE3
    ord("s"): _pairs,  # SETITEM
    ord("u"): lambda r: r.set_items(r.since_mark()),  # SETITEMS
    ord("a"): lambda r: r.append_items([r.pop()]),  # APPEND
    ord("e"): lambda r: r.append_items(r.since_mark()),  # APPENDS
    ord("q"): lambda r: r.memoize(r.number("B")),  # BINPUT
    ord("r"): lambda r: r.memoize(r.number("I")),  # LONG_BINPUT
    0x94: lambda r: r.memoize(len(r.memo)),  # MEMOIZE
    ord("h"): lambda r: r.push(r.memo[r.number("B")]),  # BINGET
    ord("j"): lambda r: r.push(r.memo[r.number("I")]),  # LONG_BINGET
    ord("c"): lambda r: r.find(r.line(), r.line()),  # GLOBAL
    0x93: lambda r: r.find(*reversed((r.pop(), r.pop()))),  # STACK_GLOBAL
    ord("R"): PickleReader.reduce,  # REDUCE
    ord("b"): PickleReader.build,  # BUILD
    ord("Q"): lambda r: r.push(r.load(r.pop())),  # BINPERSID
}
