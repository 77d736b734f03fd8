"""Downloads models from the Hugging Face hub through huggingface_hub: only the files that are needed.

huggingface_hub does what its users know: it resumes what was cut off, keeps files in its own cache (HF_HOME) for all
programs, and takes HF_ENDPOINT, HF_TOKEN (or the token of `hf auth login`) and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import inspect
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numbainfer.converters import tokenizer_files
from numbainfer.errors import NumbaInferError
from numbainfer.progress import Progress, silent

_TIMEOUT = 10  # seconds for the hub to answer
_CONFIGS = ("config.json", "generation_config.json", *tokenizer_files.NAMES)
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", r"model-\d+-of-\d+\.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", r"pytorch_model-\d+-of-\d+\.bin"),
)
_FILES = (".gguf", ".bin", ".pt", ".pth", ".safetensors")  # OWNER/NAME that ends so is the path of a file
_ADVICE = "or download it elsewhere and give its directory"


@dataclass(frozen=True)
class HubId:
    """OWNER/NAME, optionally the path of a file in it, optionally @REVISION (a branch, a tag or a commit)."""

    repository: str
    file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """None for a text that is no hub id."""
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)((?:/[\w.-]+)*)(?:@([\w./-]+))?", text, re.ASCII)
        if match is None or ".." in text or (not match[2] and match[1].endswith(_FILES)):
            return None
        return cls(match[1], match[2][1:] or None, match[3])

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return self.repository + file + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Snapshot:
    """What lies in huggingface_hub's cache: the model's path, and the commit that it is of."""

    path: Path
    commit: str


def fetch(hub_id: HubId, progress: Progress | None = None) -> Snapshot:
    """The model's files, downloaded where they are not there yet. Whatever goes wrong raises NumbaInferError."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as library_logging

    library_logging.set_verbosity_error()  # its warnings would stand between ours
    disable_progress_bars()
    if constants.HF_HUB_OFFLINE:
        return _from_cache(hub_id, "HF_HUB_OFFLINE is set")
    try:
        info = huggingface_hub.HfApi().model_info(
            hub_id.repository, revision=hub_id.revision, timeout=_TIMEOUT, files_metadata=True
        )
    except Exception as error:
        problem = _explained(hub_id, error)
        if problem is None:  # no answer: a model that is here already does without
            return _from_cache(hub_id, f"the hub can't be reached ({_first_line(error)})")
        raise NumbaInferError(problem) from error
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    names = needed_files(hub_id, list(sizes))
    known = [sizes[name] for name in names]
    total = None if any(size is None for size in known) else sum(size or 0 for size in known)
    paths = _download(hub_id, names, total, progress or silent)
    return _snapshot(hub_id, paths[0], names)


def needed_files(hub_id: HubId, names: Sequence[str]) -> list[str]:
    """Of a repository's files those that a model needs, the one that leads to the others first."""
    if hub_id.file is not None:
        if hub_id.file not in names:
            raise NumbaInferError(f"{hub_id}: the repository {hub_id.repository} has no file {hub_id.file}")
        split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", hub_id.file)
        parts = [f"{split[1]}-{i + 1:05}-of-{split[2]}.gguf" for i in range(int(split[2]))] if split else []
        return [hub_id.file, *(part for part in parts if part in names and part != hub_id.file)]
    if "config.json" in names:
        for single, index, shards in _WEIGHTS:
            weights = [single] if single in names else [name for name in names if re.fullmatch(shards, name)]
            if weights:
                others = [name for name in (index,) if single not in names and name in names]
                return [name for name in _CONFIGS if name in names] + others + weights
    ggufs = [name for name in names if name.endswith(".gguf")]
    models = sorted({re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-00001-of-\1.gguf", name) for name in ggufs})
    if len(models) == 1:
        return needed_files(HubId(hub_id.repository, models[0], hub_id.revision), names)
    if models:
        shown = ", ".join(models[:6]) + (", ..." if len(models) > 6 else "")
        raise NumbaInferError(
            f"{hub_id} has {len(models)} GGUF files; name one, as {hub_id.repository}/{models[0]} ({shown})"
        )
    raise NumbaInferError(f"{hub_id} has no weights that numbainfer reads: safetensors, pytorch_model.bin or GGUF")


def _download(hub_id: HubId, names: Sequence[str], total: int | None, report: Progress) -> list[Path]:
    import huggingface_hub
    from tqdm.std import tqdm  # which huggingface_hub needs itself

    description, done = f"downloading {hub_id.repository}", 0

    class Bar(tqdm):
        """Tells our progress instead of drawing its own."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)
            super().__init__(*args, **{**settings, "disable": False, "leave": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            result = super().update(n)
            report(description, done + int(self.n), total)
            return result

        def display(self, *args: Any, **settings: Any) -> bool:
            return True

    # Older versions have no such parameter, and show nothing.
    has_bar = "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters
    extra: dict[str, Any] = {"tqdm_class": Bar} if has_bar else {}
    paths = []
    for name in names:
        try:
            path = Path(
                huggingface_hub.hf_hub_download(
                    hub_id.repository, name, revision=hub_id.revision, etag_timeout=_TIMEOUT, **extra
                )
            )
        except Exception as error:
            problem = _explained(hub_id, error) or (
                f"downloading {name} of {hub_id} broke off ({_first_line(error)}); run it again, which goes on where "
                f"this stopped, {_ADVICE}"
            )
            raise NumbaInferError(problem) from error
        done += path.stat().st_size
        report(description, done, total)
        paths.append(path)
    return paths


def _from_cache(hub_id: HubId, reason: str) -> Snapshot:
    """What was downloaded before."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + hub_id.repository.replace("/", "--"))
    revision = hub_id.revision or "main"
    try:
        reference = folder / "refs" / revision
        commit = reference.read_text().strip() if reference.is_file() else revision
        snapshot = folder / "snapshots" / commit
        names = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
    except OSError:
        names = []
    if not names:
        raise NumbaInferError(
            f"{hub_id}: no such file or directory, and as a hub id it was not downloaded before and {reason}; check "
            f"the network, {_ADVICE}"
        )
    chosen = needed_files(hub_id, names)
    return _snapshot(hub_id, snapshot / chosen[0], chosen)


def _snapshot(hub_id: HubId, first: Path, names: Sequence[str]) -> Snapshot:
    """first: the path of names[0] in the cache, .../snapshots/COMMIT/NAME."""
    directory = first.parents[names[0].count("/")]
    return Snapshot(first if names[0].endswith(".gguf") else directory, directory.name)


def _explained(hub_id: HubId, error: Exception) -> str | None:
    """What a failure means for the user; None where the network broke."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{hub_id.repository}"
    if isinstance(error, errors.GatedRepoError):
        return f"{hub_id} is gated: accept its terms at {page}, then log in (hf auth login) or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub_id}: no such file or directory, and no such model on the hub; if it is private, log in "
            "(hf auth login) or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id.repository} has no revision {hub_id.revision}; see {page}/tree/main"
    if isinstance(error, errors.HFValidationError):
        return f"{hub_id} is no hub id: {_first_line(error)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        return f"cannot keep {hub_id} in huggingface_hub's cache: {error.strerror}; HF_HOME can name another place"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HfHubHTTPError) and status is not None and status < 500:
        return f"the hub refuses {hub_id}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
