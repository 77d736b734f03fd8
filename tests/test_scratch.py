"""Scratch directories: removed in the end, taken over from the dead, never from the living."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from numbainfer.converters import scratch
from numbainfer.converters.scratch import scratch_directory

needs_locks = pytest.mark.skipif(scratch.fcntl is None, reason="needs POSIX locks")


def test_it_goes_in_the_end(tmp_path: Path) -> None:
    with scratch_directory(tmp_path, ".x-") as directory:
        (directory / "file").touch()
        assert directory.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), scratch_directory(tmp_path, ".x-"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_it_stays_under_a_new_name(tmp_path: Path) -> None:
    with scratch_directory(tmp_path, ".x-") as directory:
        (directory / "file").touch()
        directory.rename(tmp_path / "done")
    assert (tmp_path / "done" / "file").exists()


@needs_locks
def test_what_nobody_holds_is_removed(tmp_path: Path) -> None:
    """And nothing else: not what another process works in, not other names, not files or links of that name."""
    (tmp_path / ".x-dead").mkdir()
    (tmp_path / ".x-dead" / "file").touch()
    (tmp_path / ".y-other").mkdir()
    (tmp_path / ".x-file").touch()
    (tmp_path / ".x-link").symlink_to(tmp_path / ".y-other")
    hold = (
        "import sys; from pathlib import Path; from numbainfer.converters.scratch import scratch_directory\n"
        "with scratch_directory(Path(sys.argv[1]), '.x-') as d: print(d, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        living = Path(process.stdout.readline().strip())
        assert not (tmp_path / ".x-dead").exists()
        with scratch_directory(tmp_path, ".x-") as ours:
            assert living.exists()
        assert not ours.exists()
        process.kill()
        process.wait()
        assert living.exists()
    with scratch_directory(tmp_path, ".x-"):
        assert not living.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x-file", ".x-link", ".y-other"]


@needs_locks
def test_one_that_is_taken_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may come between mkdtemp and the lock, and find it abandoned."""
    lock, calls = scratch._lock, 0

    def late(directory: Path, *, wait: bool) -> int | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            directory.rmdir()
        return lock(directory, wait=wait)

    monkeypatch.setattr(scratch, "_lock", late)
    with scratch_directory(tmp_path, ".x-") as directory:
        assert directory.exists()
    assert calls == 2
