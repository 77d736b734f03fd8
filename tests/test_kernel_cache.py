"""The on-disk cache of compiled kernels: read by other processes, healed when damaged, done without when it must."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numbainfer
from numbainfer.cpu import compile
from numbainfer.cpu.compile import Kernel
from numbainfer.cpu.launch import Stream

# A process that runs operators, checks them, and prints the seconds that it spent compiling.
ADD = """
import numpy as np
from numbainfer.cpu import compile
from numbainfer.device import Device
from numbainfer.registry import bind

ops = bind(Device("cpu"), 2)
x = np.arange(99, dtype=np.float32).reshape(3, 33)
out = np.empty_like(x)
ops.add(x, x, out)
assert (out == 2 * x).all()
print(compile.compiled_seconds)
"""
# int8 GEMV with groups of the sizes given: kernels of one name that differ in a constant. With all values 1 and
# scales 1, each output is the width.
LINEAR = """
import sys
import numpy as np
from numbainfer.cpu import compile
from numbainfer.device import Device
from numbainfer.quantization import QuantizedMatrix, QuantizedRows
from numbainfer.registry import bind

ops = bind(Device("cpu"), 1)
for group in map(int, sys.argv[1:]):
    weight = QuantizedMatrix(np.ones((5, 256), np.int8), np.ones((5, 256 // group), np.float16), group)
    x = QuantizedRows.empty(ops.pool, 1, 256, group, planes=1)
    x.codes[0, :256], x.scales[0], x.sums[0] = 1, 1, group
    out = np.empty((1, 5), np.float32)
    ops.linear(x, weight, None, None, out)
    assert (out == 256).all(), (group, out)
print(compile.compiled_seconds)
"""


def start(program: str, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    # Each system's own variable for its cache directory; see platformdirs.
    places = {"XDG_CACHE_HOME": str(cache), "HOME": str(cache), "LOCALAPPDATA": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | places,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def compiled_seconds(process: subprocess.Popen[str]) -> float:
    """What the process says that it spent compiling."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return float(out)


def run(program: str, cache: Path, *arguments: str) -> float:
    return compiled_seconds(start(program, cache, *arguments))


def entries(cache: Path) -> dict[Path, bytes]:
    """Every file below the cache directory, hidden ones too."""
    return {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what ADD needs, written by a process that had to compile it."""
    cache = tmp_path_factory.mktemp("warm")
    assert run(ADD, cache) > 0
    return cache


def copy(cache: Path, target: Path) -> dict[Path, bytes]:
    for path, content in entries(cache).items():
        place = target / path.relative_to(cache)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return entries(target)


def test_a_second_process_compiles_nothing(warm: Path) -> None:
    before = entries(warm)
    assert {path.name.split("-")[0] for path in before} == {"_add", "_replay"}
    assert run(ADD, warm) == 0
    assert entries(warm) == before


DAMAGE = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:20],
    "cut after the header": lambda content: content[: content.index(b"\n") + 1],
    "cut in the code": lambda content: content[:-100],
    "a flipped bit in the code": lambda content: content[:-500] + bytes([content[-500] ^ 1]) + content[-499:],
    "another symbol": lambda content: content.replace(b"cfunc", b"cfumc", 1),
    "no JSON": lambda content: b"\xff\xfe" + content,
    "JSON of another kind": lambda content: b"null\n" + content,
    "a missing fact": lambda content: b"{}\n" + content.split(b"\n", 1)[1],
    "something else": lambda content: os.urandom(5000),
}


def _double(task, worker, x):  # type: ignore[no-untyped-def]
    x[task] = x[task] + x[task]


_double.__module__ = "numbainfer.test"  # others' kernels are not kept


def doubles() -> float:
    """Launches _double as a process does that has not yet loaded it; returns the seconds that it spent compiling."""
    before = compile.compiled_seconds
    x = np.arange(5, dtype=np.float32)
    Stream(1).launch(Kernel(_double), 5, x)
    assert x.tolist() == [0, 2, 4, 6, 8]
    return compile.compiled_seconds - before


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_entries_are_recompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    Stream(1).launch(Kernel(_double), 0, np.empty(0, np.float32))  # loads the launcher itself from the usual cache
    monkeypatch.setattr(compile, "cache_directory", lambda: tmp_path)
    assert doubles() > 0
    assert doubles() == 0
    (path, content), *_ = entries(tmp_path).items()
    broken = DAMAGE[damage](content)
    assert broken != content
    path.write_bytes(broken)
    assert doubles() > 0
    assert doubles() == 0
    assert list(entries(tmp_path)) == [path]  # and no temporary file stays behind


def test_kernels_from_elsewhere_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's key does not see their sources: a kernel that somebody edits would stay what it was."""
    Stream(1).launch(Kernel(_double), 0, np.empty(0, np.float32))
    monkeypatch.setattr(compile, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(_double, "__module__", "__main__")
    assert doubles() > 0
    assert doubles() > 0
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_healed_for_other_processes(warm: Path, tmp_path: Path) -> None:
    intact = copy(warm, tmp_path)
    for path, content in intact.items():
        path.write_bytes(content[:-100])
    assert run(ADD, tmp_path) > 0
    assert run(ADD, tmp_path) == 0
    assert entries(tmp_path).keys() == intact.keys()


def test_a_directory_in_an_entrys_place(warm: Path, tmp_path: Path) -> None:
    for path in copy(warm, tmp_path):
        path.unlink()
        path.mkdir()
    assert run(ADD, tmp_path) > 0
    assert entries(tmp_path) == {}


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """Below a file there can be no directory, whoever asks: a superuser may write into read-only ones."""
    file = tmp_path / "file"
    file.write_text("not a directory")
    assert run(ADD, file / "cache") > 0
    assert file.read_text() == "not a directory"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_cache(warm: Path, tmp_path: Path) -> None:
    copy(warm, tmp_path)
    for path in [*entries(tmp_path)]:
        path.unlink()
        path.parent.chmod(0o500)
    assert run(ADD, tmp_path) > 0


def test_processes_that_start_cold_together(tmp_path: Path) -> None:
    together = [start(ADD, tmp_path) for _ in range(2)]
    assert max([compiled_seconds(process) for process in together]) > 0
    assert {path.name.split("-")[0] for path in entries(tmp_path)} == {"_add", "_replay"}
    assert run(ADD, tmp_path) == 0


def test_entries_of_different_processes_do_not_mix(tmp_path: Path) -> None:
    """Numba numbers symbols in order of compilation, so each of these processes uses the same names."""
    for group in ("32", "64", "128"):
        assert run(LINEAR, tmp_path, group) > 0
    assert run(LINEAR, tmp_path, "32", "64", "128") == 0
    assert run(LINEAR, tmp_path, "128", "64", "32") == 0


def test_another_source_is_another_cache(warm: Path, tmp_path: Path) -> None:
    """The directory's name covers the package's own code: a changed kernel is never served from before."""
    copy(warm, tmp_path / "cache")
    package = tmp_path / "edited" / "numbainfer"
    shutil.copytree(Path(numbainfer.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    simd = package / "cpu" / "simd.py"
    simd.write_text(simd.read_text() + "\n# changed\n")
    program = f"import sys\nsys.path.insert(0, {str(package.parent)!r})\n" + ADD
    assert run(program, tmp_path / "cache") > 0
    assert len(entries(tmp_path / "cache")) == 4
