"""The contracts, both sides of the operator pair against them, and which module may import which."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import numbainfer
import numbainfer.converters
from numbainfer import registry
from numbainfer.device import Device
from numbainfer.errors import NumbaInferError
from numbainfer.registry import CONTRACTS, bind, parameters

PACKAGE = Path(numbainfer.__file__).parent
ROOTS = {
    "numbainfer": PACKAGE,
    "numbainfer.converters": Path(numbainfer.converters.__file__).parent,  # another directory in a checkout
}


# --- the operator pair ------------------------------------------------------------------------------------------


def implementation(package: str) -> ModuleType:
    """A backend; skips while it defines no operator at all."""
    module = importlib.import_module(package)
    if not any(callable(getattr(module, name, None)) for name in CONTRACTS):  # `quantize` is a submodule's name too
        pytest.skip(f"{package} defines no operator yet")
    return module


@pytest.mark.parametrize("package", ["numbainfer.cpu", "numbainfer.gpu"])
def test_backends_keep_the_contracts(package: str) -> None:
    """By name, order and defaults of parameters: what a call through the registry relies on."""
    module = implementation(package)
    for name, contract in CONTRACTS.items():
        function = getattr(module, name, None)
        if function is None and name in registry.MIXTURE and package != "numbainfer.cpu":
            continue
        assert function is not None, f"{package} lacks {name}"
        assert parameters(function) == parameters(contract), f"{package}.{name}"
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, f"{package}.{name}"
        assert f"registry.{name}" in (function.__doc__ or ""), f"{package}.{name} names its contract"
    for name in ("open_stream", "open_allocator", "BandwidthProbe"):
        assert hasattr(module, name), f"{package} lacks {name}"


def test_every_operator_has_a_contract() -> None:
    assert len(CONTRACTS) >= 12
    for name, contract in CONTRACTS.items():
        assert parameters(contract)[0] == "stream", name
        assert len(contract.__doc__ or "") > 30, f"{name} has no contract"
        assert contract.__module__ == registry.__name__


def test_bind_gives_every_operator_of_the_device() -> None:
    ops = bind(Device("cpu"), 1)
    for name in CONTRACTS:
        assert getattr(ops, name).args == (ops.stream,)
    assert ops.device == Device("cpu")
    assert ops.stream.threads == 1
    with pytest.raises(AttributeError):
        _ = ops.no_such_operator


def test_a_backend_that_is_incomplete_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTRACTS, "no_such_operator", lambda stream: None)
    with pytest.raises(NumbaInferError, match="cpu does not run in this version"):
        bind(Device("cpu"), 1)


def test_a_backend_may_lack_mixtures_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("numbainfer.cpu.route")
    ops = bind(Device("cpu"), 1)
    with pytest.raises(NumbaInferError, match="cpu does not run mixtures of experts"):
        ops.route(None, 0, None, None)


# --- importing ---------------------------------------------------------------------------------------------------

WITHOUT_CUDA = """
import importlib.abc
import sys

class NoCuda(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cuda", "numba_cuda") or name.startswith("numba.cuda"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, NoCuda())
"""


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import numbainfer", ("numba", "llvmlite", "numpy", "numbainfer.gpu", "numbainfer.cpu")),
        ("import numbainfer.registry", ("numba", "llvmlite", "numbainfer.gpu", "numbainfer.cpu")),
        (
            "from numbainfer.registry import bind; from numbainfer.device import Device; bind(Device('cpu'), 1)",
            ("numbainfer.gpu", "cuda", "numba_cuda"),
        ),
    ],
)
def test_importing_needs_no_gpu(statement: str, unwanted: tuple[str, ...]) -> None:
    """With CUDA's packages blocked; and imports stay as light as they are, or the command line starts slowly."""
    program = f"{WITHOUT_CUDA}\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & set(unwanted)


# --- floors ------------------------------------------------------------------------------------------------------

# A module imports only from its own floor and those below. cpu/, gpu/ and converters/ stand as wholes.
FLOORS = [
    ["_version", "errors", "progress", "device", "memory", "quantization", "kernel_files"],
    ["cpu", "gpu"],
    ["registry"],
    ["config", "config_reader", "families", "rope_scaling", "specs", "safetensors_file", "checkpoint", "kv_cache"],
    ["model", "layers", "mixture"],
    [
        "sampling_params",
        "sampling",
        "generation",
        "reasoning",
        "tokenizer",
        "tokenizer_backends",
        "chat",
        "chat_bounds",
        "chat_sandbox",
        "constraints",
        "speculation",
        "engine",
    ],
    [
        "converters",
        "loading",
        "console",
        "info",
        "machine",
        "bench",
        "bench_output",
        "bench_plot",
        "bench_profile",
        "random_weights",
        "chat_session",
        "chat_input",
        "chat_loop",
        "llm",
        "perplexity",
        "cli",
        "__main__",
    ],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package by its full name, without numbainfer/__init__.py, which may import anything."""
    found: dict[str, Path] = {}
    for root, directory in ROOTS.items():
        for path in sorted(directory.rglob("*.py")):
            parts = [root, *path.relative_to(directory).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    del found["numbainfer"]
    return found


MODULES = modules()


def imported(name: str, source: str, *, is_package: bool, known: set[str]) -> set[str]:
    """The modules of the package that a source imports, at its top or inside functions.

    `from package import module` counts as the module, `import package.module` as that module alone. Imports for the
    type checker count too: they are what a reader follows.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*above, base]).rstrip(".")
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= members & known
            if members - known:
                found.add(base)
    return {module for module in found if module == "numbainfer" or module.startswith("numbainfer.")} - {name}


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return imported(name, path.read_text(), is_package=path.name == "__init__.py", known=set(MODULES))


def part(name: str) -> str:
    """The name that FLOORS has for a module: numbainfer.cpu.simd stands with cpu."""
    return name.split(".")[1]


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_from_their_floor_and_below(name: str) -> None:
    assert part(name) in FLOOR, f"{name} is new: give it a floor (FLOORS in {Path(__file__).name})"
    for other in imports_of(name) - {"numbainfer"}:
        assert part(other) in FLOOR, f"{other}, which {name} imports, is new: give it a floor"
        assert FLOOR[part(other)] <= FLOOR[part(name)], f"{name} imports {other}, which stands above it"
        assert {part(name), part(other)} != {"cpu", "gpu"}, f"{name} imports {other}: the backends are apart"


def test_every_floor_is_of_a_module_that_exists() -> None:
    assert {part(name) for name in MODULES} >= set(FLOOR)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of the graph; empty if it has none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_cycles() -> None:
    """Anywhere but in converters/, whose source.py opens readers that derive from its classes."""
    graph = {name: imports_of(name) for name in MODULES if part(name) != "converters"}
    assert cycle(graph) == []


def test_cycle_finds_cycles() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a", "c"}}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_imported_sees_every_form() -> None:
    known = {"numbainfer.cpu", "numbainfer.cpu.simd", "numbainfer.cpu.isa", "numbainfer.memory", "numbainfer.errors"}
    source = """
import os, numbainfer.memory
from numbainfer import errors, __version__
def late():
    from . import simd
    from .isa import detect
    from ..memory import MemoryPool
"""
    expected = {"numbainfer", "numbainfer.memory", "numbainfer.errors", "numbainfer.cpu.simd", "numbainfer.cpu.isa"}
    assert imported("numbainfer.cpu.launch", source, is_package=False, known=known) == expected
    assert imported("numbainfer.cpu", "from .simd import load", is_package=True, known=known) == {"numbainfer.cpu.simd"}
