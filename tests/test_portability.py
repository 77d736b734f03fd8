"""Windows and macOS: what only POSIX or Linux has is used where something else stands in for it.

These tests run on any system: they take away what another one lacks, and read the sources.
"""

from __future__ import annotations

import ast
import ctypes
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from command import STORIES
from test_registry import MODULES

from numbainfer import device, machine

# What Windows lacks of the modules that the package may name.
MODULES_OF_POSIX = {"fcntl", "resource", "readline", "termios", "tty", "pty", "pwd", "grp", "syslog"}
NAMES_OF_POSIX = {
    "os": {"fork", "getuid", "geteuid", "killpg", "mkfifo", "sched_getaffinity", "statvfs", "sysconf", "uname", "wait"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "alarm", "pause", "pthread_kill", "setitimer"},
    "mmap": {"MADV_DONTNEED", "MADV_SEQUENTIAL", "MAP_PRIVATE", "PROT_READ"},
    "time": {"tzset"},
}
# Where they may stand: each of these uses has another way beside it.
GUARDED = {
    ("numbainfer.device", "os.sched_getaffinity"),
    ("numbainfer.device", "resource"),
    ("numbainfer.chat_session", "readline"),
    ("numbainfer.machine", "os.sysconf"),
    ("numbainfer.safetensors_file", "mmap.MADV_DONTNEED"),
    ("numbainfer.converters.scratch", "fcntl"),
    ("numbainfer.converters.source", "mmap.MADV_DONTNEED"),
    ("numbainfer.converters.torch_file", "mmap.MADV_DONTNEED"),
}


def uses(source: str) -> set[str]:
    """What a source imports or names that only POSIX has."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES_OF_POSIX
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES_OF_POSIX:
            found.add(str(node.module))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"} if node.attr in NAMES_OF_POSIX.get(node.value.id, ()) else set()
    return found


def test_what_only_posix_has_is_guarded() -> None:
    found = {(name, use) for name, path in MODULES.items() for use in uses(path.read_text(encoding="utf-8"))}
    assert found <= GUARDED, "give it another way on Windows, then list it here"


def test_uses_sees_every_form() -> None:
    source = "import fcntl, os\nfrom pwd import getpwnam\nif os.name:\n    os.sysconf('x')\n"
    assert uses(source) == {"fcntl", "pwd", "os.sysconf"}


WITHOUT_POSIX = f"""
import importlib.abc, mmap, os, signal, sys

class NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {MODULES_OF_POSIX - {"termios", "tty"}}:
            raise ImportError(name)

for name in {MODULES_OF_POSIX - {"termios", "tty"}}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, NotHere())
for module in (os, signal, mmap):
    for name in {NAMES_OF_POSIX}.get(module.__name__, ()):
        if hasattr(module, name) and name not in ("uname", "getuid"):  # other packages take these
            delattr(module, name)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("info",),
        ("run", STORIES, "Once upon a time", "-n", "3", "--temperature", "0"),
        ("convert", STORIES, "OUT"),
        ("bench", STORIES, "-p", "4", "-n", "1", "-r", "1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_without_what_only_posix_has(arguments: tuple[Any, ...], tmp_path: Path) -> None:
    words = ["numbainfer", *(str(tmp_path / "out") if word == "OUT" else str(word) for word in arguments)]
    program = f"{WITHOUT_POSIX}\nsys.argv = {words!r}\n"
    program += "from numbainfer import cli\ncli.main()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr


# --- other systems' ways -------------------------------------------------------------------------------------------


class Sysctl:
    """The C library of a Mac, as far as it is asked."""

    VALUES: ClassVar[dict[bytes, bytes]] = {
        b"machdep.cpu.brand_string": b"Apple M4",
        b"hw.perflevel0.physicalcpu": struct.pack("i", 6),
        b"hw.memsize": struct.pack("Q", 16 << 30),
        b"hw.l1dcachesize": struct.pack("Q", 64 << 10),
        b"hw.l2cachesize": struct.pack("Q", 4 << 20),
    }

    def sysctlbyname(self, name: bytes, value: Any, length: Any, new: None, new_length: int) -> int:
        if name not in self.VALUES:
            return -1
        ctypes.memmove(value, self.VALUES[name], len(self.VALUES[name]))
        return 0


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: Sysctl())
    assert device.cpu_name() == "Apple M4"
    assert device.physical_cores() == 6
    assert machine.memory_bytes() == 16 << 30
    assert machine.cpu_caches() == {"L1d": 64 << 10, "L2": 4 << 20}
    monkeypatch.setattr(Sysctl, "VALUES", {b"hw.physicalcpu": struct.pack("i", 4)})
    assert device.physical_cores() == 4  # an Intel Mac
    assert machine.memory_bytes() is None


def test_cores_of_windows() -> None:
    """Two cores of two threads each, a cache, and a NUMA node: 32 bytes each on a 64-bit system."""
    core = [struct.pack("@Pi4x16x", 0b11 << 2 * i, 0) for i in range(2)]
    others = [struct.pack("@Pi4x16x", 0b1111, kind) for kind in (2, 1)]
    assert len(core[0]) == 32
    assert device.count_cores(b"".join([core[0], *others, core[1]])) == 2
