"""From what a user names as MODEL to an engine that runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from numbainfer.checkpoint import Checkpoint, Weights, is_checkpoint, read_file, read_json
from numbainfer.console import detail, size
from numbainfer.converters.convert import convert
from numbainfer.converters.demo import fetch_demo
from numbainfer.converters.hub import HubId, fetch
from numbainfer.converters.source import open_source, require_path
from numbainfer.converters.source_options import NO_OPTIONS, SourceOptions
from numbainfer.converters.source_reader import SourceWeights, Target
from numbainfer.device import Device
from numbainfer.engine import DEFAULT_CTX_SIZE, Engine
from numbainfer.errors import NumbaInferError
from numbainfer.model import Model
from numbainfer.progress import Progress
from numbainfer.registry import bind
from numbainfer.sampling_params import SamplingParams
from numbainfer.specs import parameter_count
from numbainfer.tokenizer import TOKENIZER_FILES, Tokenizer

DEMO_NAME = "SmolLM2-135M-Instruct"

# How to sample where neither the user nor the model's generation_config says it.
DEFAULTS: dict[str, Any] = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass
class LoadedModel:
    """An engine, and the sampling defaults that its model came with."""

    engine: Engine
    generation_config: dict[str, Any]

    def params(self, **given: Any) -> SamplingParams:
        """What is given, then what the model's generation_config says, then DEFAULTS."""
        own = self.generation_config if self.generation_config.get("do_sample", True) else {"temperature": 0.0}
        chosen = {name: own[name] if _is_number(own.get(name)) else default for name, default in DEFAULTS.items()}
        SamplingParams(**given)
        try:
            return SamplingParams(**{**chosen, **given})
        except NumbaInferError as error:  # what was given is good
            raise NumbaInferError(f"generation_config.json: {error}; give another instead") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class OpenedModel:
    """A model's weights and files, before they are put on a device."""

    weights: Weights
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    name: str


def names_a_model(text: str) -> bool:
    """Whether a lone argument of `run` is a MODEL rather than a prompt: an existing path, something written like the
    path of a model file, or a hub id (owner/name)."""
    if not text or "\n" in text or len(text) > 4096:
        return False
    if os.path.lexists(text):  # False, not an error, for a prompt that is too long to be a path
        return True
    return re.search(r"\s", text) is None and (
        text.endswith((".gguf", ".bin")) or re.fullmatch(r"[\w.~-]*(/[\w.-]+)+/?(@[\w./-]+)?", text) is not None
    )


def require_model(text: str) -> None:
    """Refuses a MODEL that is neither there nor a hub id."""
    if not text:
        raise NumbaInferError("the model's name is empty")
    try:
        if hub_id_of(text) is None:
            require_path(Path(text))
    except OSError as error:
        raise NumbaInferError(f"cannot read {text}: {error.strerror}") from error


def hub_id_of(text: str) -> HubId | None:
    """The hub id that a MODEL is, None for a path: what begins with something that is there."""
    if os.path.lexists(text.split("/", maxsplit=1)[0]):
        return None
    return HubId.parse(text)


def fetch_source(text: str, progress: Progress | None = None) -> Path:
    """The path of a SOURCE, which is downloaded if it is a hub id."""
    hub_id = hub_id_of(text)
    return Path(text) if hub_id is None else fetch(hub_id, progress).path


def _converted_snapshot(hub_id: HubId, progress: Progress | None) -> Path:
    """A model of the hub, converted; downloaded and converted on the first call for its commit."""
    snapshot, target = fetch(hub_id, progress), Target()
    file = f"-{Path(hub_id.file).stem}" if hub_id.file else ""
    name = f"{hub_id.repository.replace('/', '--')}{file}-{snapshot.commit[:12]}"
    directory = cache_directory() / "hub" / f"{name}-{target.dtype}-{target.group_size}"
    if _is_intact(directory):
        return directory
    try:
        with open_source(snapshot.path) as source:
            convert(source, directory, target, progress=progress)
    except NumbaInferError:
        if not _is_intact(directory):  # else another process was faster
            raise
    return directory


def open_model(
    path: str | Path | None,
    *,
    source_options: SourceOptions = NO_OPTIONS,
    require_tokenizer: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> OpenedModel:
    """A converted directory mapped in place; any other source to be quantized while loading; a hub id: downloaded, and
    its conversion kept; None: the demo model."""
    hub_id = None
    if path is None:
        path = demo_directory(progress)
    else:
        require_model(str(path))
        hub_id = hub_id_of(str(path))
        path = Path(path) if hub_id is None else _converted_snapshot(hub_id, progress)
    if path.is_dir() and is_checkpoint(path):
        source_options.refuse_all("a converted model has its own")
        weights: Weights = Checkpoint(path)
        weights.name = str(hub_id or weights.name)
        files = {name: read_file(path / name) for name in TOKENIZER_FILES if (path / name).is_file()}
    else:
        source = open_source(path, source_options, require_tokenizer=require_tokenizer)
        files = {**source.tokenizer_files, "config.json": json.dumps(source.config).encode()}
        if source.generation_config is not None:
            files["generation_config.json"] = json.dumps(source.generation_config).encode()
        weights = SourceWeights(source, Target(), progress, bind(Device("cpu"), threads))
    if not require_tokenizer:
        return OpenedModel(weights, None, {}, weights.name)
    known = Tokenizer.from_files(files, weights.config.vocab_size)  # which checks the JSON files too
    generation = json.loads(files.get("generation_config.json", b"{}"))
    return OpenedModel(weights, known, generation, weights.name)


def load(
    path: str | Path | None,
    *,
    device: Device | None = None,
    ctx_size: int | None = None,
    threads: int | None = None,
    source_options: SourceOptions = NO_OPTIONS,
    chunk: int | None = None,
    sequences: int = 1,
    progress: Progress | None = None,
) -> LoadedModel:
    """An engine that runs a MODEL. ctx_size None: the model's own, up to DEFAULT_CTX_SIZE; 0: all that it has.
    sequences: how many replies it can run together."""
    start = time.perf_counter()
    ops = bind(device or Device("cpu"), threads)
    opened = open_model(path, source_options=source_options, threads=threads, progress=progress)
    assert opened.tokenizer is not None
    model = Model(
        ops,
        opened.weights,
        context_size(opened.weights, ctx_size),
        chunk=chunk,
        sequences=sequences,
        progress=progress,
    )
    describe(model, opened.weights, time.perf_counter() - start)
    return LoadedModel(Engine(model, opened.tokenizer), opened.generation_config)


def describe(model: Model, weights: Weights, seconds: float) -> None:
    """What --verbose says of a model that was loaded."""
    config, stream, cache = weights.config, model.ops.stream, model.cache
    detail(f"{weights.name}: {config.architecture}, {parameter_count(config):,} parameters, {size(weights.nbytes)}")
    held = f"{size(cache.nbytes)} of KV cache for {cache.ctx_size:,} tokens"
    detail(f"{model.ops.device}: {stream.threads} threads; {held}")
    detail(f"loaded in {seconds:.2f} s")


def context_size(weights: Weights, asked: int | None) -> int:
    """The positions to keep: as asked, but not more than the model was trained for."""
    limit = weights.config.max_positions
    if asked is None:
        return min(limit, DEFAULT_CTX_SIZE)
    if not 0 <= asked <= limit:
        raise NumbaInferError(f"--ctx-size {asked}: this model's context is {limit} at most")
    return asked or limit


def cache_directory() -> Path:
    """Where the demo model and compiled kernels are kept."""
    return Path(platformdirs.user_cache_dir("numbainfer"))


def demo_directory(progress: Progress | None = None) -> Path:
    """The demo model, converted; fetched and converted on the first call."""
    models = cache_directory() / "models"
    directory = models / DEMO_NAME
    if _is_intact(directory):
        return directory
    gguf = fetch_demo(models, progress)
    try:
        with open_source(gguf) as source:
            convert(source, directory, Target(), progress=progress)
    except NumbaInferError:
        if not _is_intact(directory):  # else another process was faster
            raise
    with suppress(OSError):  # Windows removes no file that is still mapped somewhere
        gguf.unlink()
    return directory


def _is_intact(directory: Path) -> bool:
    """Whether the demo is there and opens; what doesn't open is removed, to be made again."""
    if not directory.exists():
        return False
    try:
        Checkpoint(directory)
        if not (directory / "tokenizer.model").is_file():
            read_json(directory / "tokenizer.json")
    except NumbaInferError:
        shutil.rmtree(directory, ignore_errors=True)
        return False
    return True
