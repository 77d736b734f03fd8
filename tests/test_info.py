"""`info`: what a model is and needs, what the machine is and lacks; and perplexity's running value."""

from __future__ import annotations

import configparser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from building import DATA
from command import STORIES, numbainfer, succeed, write_model

from numbainfer import __version__, console, machine, perplexity
from numbainfer.info import workspace_bytes
from numbainfer.loading import load
from numbainfer.perplexity import Score
from numbainfer.safetensors_file import SafetensorsFile

STORY_TEXT = DATA / "story_text.txt"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    succeed("convert", write_model(folder / "hf"), folder / "converted")
    return {"hf": folder / "hf", "converted": folder / "converted"}


# --- a model -------------------------------------------------------------------------------------------------------


def test_info_of_a_model(models: dict[str, Path]) -> None:
    loaded, converted = (succeed("info", models[kind], "--ctx-size", 100).out for kind in ("hf", "converted"))
    assert loaded.splitlines()[1:] == converted.splitlines()[1:]  # the first line is the name
    facts = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in converted.splitlines())
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == "279,296"
    assert facts["context"] == "256"
    assert facts["weights"].endswith("int8 (group 64)")
    assert facts["kv cache at 100"] == "65.5 kB, 512 B a token"  # 2 x 2 layers x 2 heads x 32 in float16; 2 pages
    assert "float16, int8 (group 64)" in succeed("info", STORIES).out


def test_parts_add_up_to_the_file(models: dict[str, Path]) -> None:
    facts = succeed("info", models["converted"], "-o", "json").json
    tensors = SafetensorsFile(models["converted"] / "model.safetensors").tensors.values()
    assert facts["weight_bytes"] == sum(part["bytes"] for part in facts["parts"].values())
    assert facts["weight_bytes"] == sum(entry.stop - entry.start for entry in tensors)
    assert facts["parameters"] == sum(part["parameters"] for part in facts["parts"].values()) == 279_296
    assert list(facts["parts"]) == ["embedding", "norms and biases", "attention", "mlp"]
    assert facts["parts"]["embedding"] == {"parameters": 257 * 128, "bytes": 257 * 132, "stored": ["int8 (group 64)"]}


def test_memory_is_about_what_a_model_takes(models: dict[str, Path]) -> None:
    """The estimate beside what the pool hands out: cache and workspace."""
    facts = succeed("info", models["converted"], "--ctx-size", 200, "-o", "json").json
    model = load(models["converted"], ctx_size=200).engine.model
    assert facts["kv_cache_bytes"] == model.cache.nbytes
    workspace = model.ops.pool.statistics.in_use - model.cache.nbytes
    assert 0.5 < workspace_bytes(model.config, 200) / workspace < 2
    assert facts["memory_bytes"] == sum(facts[f"{part}_bytes"] for part in ("weight", "kv_cache", "workspace"))


def test_a_context_that_does_not_fit(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numbainfer.info.memory_bytes", lambda: 1000)
    assert "more than it has; lower --ctx-size" in succeed("info", models["converted"]).out


# --- the machine ---------------------------------------------------------------------------------------------------


def test_info_of_the_machine() -> None:
    out = succeed("info").out
    assert re.search(rf"^numbainfer +{re.escape(__version__)}$", out, re.MULTILINE)
    assert all(f"\n{name} " in out for name in ("python", "numba", "cpu", "  int8 kernels", "cache"))
    facts = succeed("info", "-o", "json").json
    assert facts["numbainfer"] == __version__
    assert facts["cpu"]["kernels"] in ("avx512_vnni", "avx2", "neon_dot", "generic")
    assert facts["cpu"]["memory_bytes"] is None or facts["cpu"]["memory_bytes"] > 1 << 28
    assert facts["cpu"]["kernels"] != "avx2" or {"avx2", "fma", "f16c"} <= set(facts["cpu"]["features"])


def test_caches_of_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "1024K")]
    ):
        folder = tmp_path / "sys/devices/system/cpu/cpu0/cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert machine.cpu_caches() == {"L1d": 32 << 10, "L2": 1 << 20}


GPU = {"index": 0, "name": "NVIDIA H100", "memory_bytes": 85 * 10**9, "compute_capability": [9, 0]}


@pytest.mark.parametrize(
    ("driver", "gpus", "packages", "wanted"),
    [
        (None, [], True, None),
        (13000, [GPU], True, None),
        (13000, [GPU], False, 'pip install "numbainfer[gpu]"'),
        (12040, [GPU], True, "update it (580 or newer)"),
        (13000, [{**GPU, "compute_capability": [7, 5]}], True, "compute capability 8.0"),
    ],
)
def test_what_a_gpu_lacks(
    driver: int, gpus: list, packages: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_importable", lambda name: packages or name in machine.OPTIONAL)
    lines = [line for line in machine.missing(driver, gpus) if "compiled at every start" not in line]
    assert lines == [] if wanted is None else wanted in lines[0]


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_importable", lambda name: False)
    assert 'bench --plot needs matplotlib: pip install "numbainfer[plot]"' in machine.missing(None, [])
    assert 'pip install "numbainfer[plot]"' in succeed("info").out


def test_optional_packages_are_the_extras_of_the_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    for module, (extra, _) in machine.OPTIONAL.items():
        assert module in re.split(r"[^a-z_]", extras[extra].replace("-", "_")), f"{extra} brings {module}"


def test_gpus_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "nvidia", lambda: (13000, [GPU]))
    out = succeed("info").out
    assert re.search(r"^cuda:0 +NVIDIA H100, 85\.0 GB, compute capability 9\.0$", out, re.MULTILINE)
    assert re.search(r"^  driver +CUDA 13\.0$", out, re.MULTILINE)


# --- perplexity as it runs -----------------------------------------------------------------------------------------


def test_perplexity_tells_its_running_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    result = succeed("perplexity", STORIES, STORY_TEXT, "--ctx-size", 64, "-o", "json")
    told = re.findall(r"^perplexity (\d+)/(\d+): ([\d.]+)$", result.err, re.MULTILINE)
    chunks = result.json["chunks"]
    assert [int(done) for done, _, _ in told] == list(range(2, chunks + 1))  # the first began the task
    assert float(told[-1][2]) == pytest.approx(result.json["perplexity"], abs=1e-4)


def test_ctrl_c_prints_the_value_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity.negative_log_likelihood
    count = iter(range(10**6))

    def stopped(logits: Any, token: int) -> float:
        if next(count) == 100:  # within the fourth chunk of 31 scored tokens
            raise KeyboardInterrupt
        return whole(logits, token)

    monkeypatch.setattr(perplexity, "negative_log_likelihood", stopped)
    result = numbainfer("perplexity", STORIES, STORY_TEXT, "--ctx-size", 64, "-o", "json")
    assert result.code == 130
    told = json.loads(result.out)
    assert (told["chunks"], told["tokens"]) == (3, 93)
    monkeypatch.setattr(perplexity, "negative_log_likelihood", whole)
    assert told["perplexity"] > 1


def test_uncertainty_is_the_standard_error() -> None:
    losses = np.random.default_rng(0).normal(2, 0.5, 1000)
    score = Score()
    for loss in losses:
        score.add(float(loss))
    expected = math.exp(losses.mean()) * losses.std(ddof=1) / math.sqrt(1000)
    assert score.uncertainty == pytest.approx(expected, rel=1e-9)
