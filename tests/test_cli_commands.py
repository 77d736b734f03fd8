"""`convert`, `bench`, `perplexity` and help as scripts rely on them."""

from __future__ import annotations

import csv
import io
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from building import DATA
from command import (
    STORIES,
    numbainfer,
    run,
    succeed,
    write_model,
    write_models,
)

from numbainfer import NumbaInferError, __version__
from numbainfer.bench import Test
from numbainfer.cli import commands
from numbainfer.cli.bench import ARCHITECTURES
from numbainfer.engine import Engine
from numbainfer.loading import load
from numbainfer.random_weights import RANDOM
from numbainfer.safetensors_file import SafetensorsFile

STORY_TEXT = DATA / "story_text.txt"

BENCH_ROW = {
    "model": str,
    "architecture": str,
    "params": int,
    "weight_bytes": int,
    "device": str,
    "device_name": str,
    "threads": int,
    "test": str,
    "repetitions": int,
    "tokens_per_second": float,
    "stddev": float,
    "ms_per_token": float,
    "bytes_per_second": float,
    "bandwidth_ceiling": float,
    "percent_of_ceiling": float,
    "load_seconds": float,
    "compile_seconds": float,
    "peak_memory_bytes": int,
    "version": str,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind; not to be changed."""
    return write_models(tmp_path_factory.mktemp("models"))


# --- convert -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32"])
def test_convert(dtype: str, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    result = succeed("convert", models["hf"], out, "--dtype", dtype)
    assert result.out == ""
    assert re.search(rf"^{re.escape(str(out))}: 279,296 parameters, [\d.]+ [kM]B as {dtype}$", result.err, re.MULTILINE)
    stored = SafetensorsFile(out / "model.safetensors").tensors["model.layers.0.mlp.down_proj.weight"].dtype
    assert stored == {"int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]
    assert sorted(p.name for p in out.parent.iterdir()) == ["model"]
    assert run(out, "abc", "-n", 3)["tokens"]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_convert_group_size(group: int, models: dict[str, Path], tmp_path: Path) -> None:
    succeed("convert", models["hf"], tmp_path / "out", "--group-size", group)
    tensors = SafetensorsFile(tmp_path / "out" / "model.safetensors").tensors
    assert tensors["model.embed_tokens.weight_scale"].shape == (257, 128 // group)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 192 // min(group, 64))


def test_convert_says_what_stays_float16(tmp_path: Path) -> None:
    result = succeed("convert", STORIES, tmp_path / "out")  # its MLP is 172 wide
    assert "5 matrices stay float16, no group divides their width: model.layers.0.mlp.down_proj" in result.err


def test_convert_force(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("convert", models["hf"], out)
    refused = numbainfer("convert", models["gguf"], out)
    assert (refused.code, refused.error) == (1, f"{out} exists; give another name, or --force to replace it")
    succeed("convert", models["gguf"], out, "--force")
    assert run(out, "abc", "-n", 5)["tokens"] == run(models["gguf"], "abc", "-n", 5)["tokens"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_convert_never_removes_its_own_source(models: dict[str, Path], tmp_path: Path) -> None:
    succeed("convert", models["hf"], tmp_path / "out")
    source = write_model(tmp_path / "out" / "original")
    refused = numbainfer("convert", source, tmp_path / "out", "--force")
    assert "which would go with it" in refused.error
    assert (source / "model.safetensors").exists()


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    lonely = tmp_path / "model.bin"
    shutil.copy(STORIES, lonely)
    assert "has no tokenizer" in numbainfer("run", lonely, "Once").error
    tokenizer = ("--tokenizer", DATA / "tok512.bin")
    wanted = run(STORIES, "Once", "-n", 5)["tokens"]
    assert run(lonely, "Once", "-n", 5, *tokenizer)["tokens"] == wanted
    succeed("convert", lonely, tmp_path / "out", *tokenizer)
    assert run(tmp_path / "out", "Once", "-n", 5)["tokens"] == wanted
    assert "a converted model has its own" in numbainfer("run", tmp_path / "out", "Once", *tokenizer).error


# --- bench ---------------------------------------------------------------------------------------------------------


def check_row(row: dict[str, Any]) -> None:
    assert {name: type(value) for name, value in row.items()} == BENCH_ROW
    assert row["tokens_per_second"] == pytest.approx(1000 / row["ms_per_token"])
    assert row["percent_of_ceiling"] == pytest.approx(100 * row["bytes_per_second"] / row["bandwidth_ceiling"])
    assert all(row[name] > 0 for name in ("params", "weight_bytes", "threads", "bytes_per_second", "load_seconds"))
    assert 1e9 < row["bandwidth_ceiling"] < 1e13
    assert row["stddev"] >= 0
    assert row["version"] == __version__


def test_bench_json(models: dict[str, Path]) -> None:
    options = ("-p", 8, "-p", 16, "-n", 4, "-d", 0, "-d", 20, "-r", 2, "-t", 1, "--device", "cpu", "--device", "auto")
    result = succeed("bench", models["converted"], *options, "-o", "json")
    tests = ["pp8", "pp16", "tg4", "pp8@d20", "pp16@d20", "tg4@d20"]
    assert [row["test"] for row in result.json] == tests * 2
    for row in result.json:
        check_row(row)
        assert (row["model"], row["device"], row["threads"], row["repetitions"]) == ("converted", "cpu", 1, 2)
        assert row["params"] == 279_296
        weights = SafetensorsFile(models["converted"] / "model.safetensors").tensors.values()
        assert row["weight_bytes"] == sum(entry.stop - entry.start for entry in weights)
    assert "compiling" in result.err


def test_bench_defaults(models: dict[str, Path]) -> None:
    rows = succeed("bench", models["endless"], "-r", 1, "-o", "json").json
    assert [row["test"] for row in rows] == ["pp512", "tg128"]
    assert [row["stddev"] for row in rows] == [0, 0]


@pytest.mark.parametrize(
    ("prompt", "generate", "tests"), [(8, 0, ["pp8"]), (0, 3, ["tg3"]), (1, 0, ["pp1"]), (0, 1, ["tg1"])]
)
def test_bench_one_kind(prompt: int, generate: int, tests: list[str], models: dict[str, Path]) -> None:
    rows = succeed("bench", models["hf"], "-p", prompt, "-n", generate, "-r", 1, "-o", "json").json
    assert [row["test"] for row in rows] == tests


def test_bench_one_token_after_a_depth(models: dict[str, Path]) -> None:
    """Warming up takes no more context than the test."""
    rows = succeed("bench", models["converted"], "-p", 0, "-n", 1, "-d", 8, "-r", 1, "-o", "json").json
    assert [row["test"] for row in rows] == ["tg1@d8"]


def test_bench_of_several_sequences_together(models: dict[str, Path]) -> None:
    """Tokens of all sequences count; the weights are read once for all of them, the cache once for each."""
    options = ("-p", 0, "-n", 6, "-d", 0, "-d", 100, "-b", 1, "-b", 8, "-r", 1)
    rows = succeed("bench", models["converted"], *options, "-o", "json").json
    assert [row["test"] for row in rows] == ["tg6", "tg6@b8", "tg6@d100", "tg6@d100@b8"]
    for row in rows:
        check_row(row)
    moved = [row["bytes_per_second"] / row["tokens_per_second"] * 6 * Test.parse(row["test"]).batch for row in rows]
    kv = 2 * 2 * 2 * 32 * 2  # bytes of a position: keys and values, layers, heads, head_dim, float16
    assert moved[1] - moved[0] == pytest.approx(7 * 21 * kv)  # 1 + 2 + ... + 6 positions
    assert moved[3] - moved[2] == pytest.approx(7 * (21 + 600) * kv)


def test_names_of_tests() -> None:
    for test in (Test("pp", 512), Test("tg", 128, 4096), Test("tg", 1, 0, 8), Test("tg", 128, 4096, 16)):
        assert Test.parse(str(test)) == test
    assert str(Test("tg", 128, 4096, 8)) == "tg128@d4096@b8"
    for name in ("pp", "tg128@b", "tg128@b8@d4", "xx3", "tg128 "):
        with pytest.raises(NumbaInferError, match="is not the name of a test"):
            Test.parse(name)


def test_bench_for_people_and_spreadsheets(models: dict[str, Path]) -> None:
    def bench(output: str) -> str:
        return succeed("bench", models["converted"], "-p", 8, "-n", 4, "-r", 1, "-o", output).out

    rows = list(csv.DictReader(io.StringIO(bench("csv"))))
    assert [list(row) for row in rows] == [list(BENCH_ROW)] * 2
    assert [row["test"] for row in rows] == ["pp8", "tg4"]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)

    markdown = bench("markdown").splitlines()
    assert [line.count("|") for line in markdown] == [10] * 4
    assert [cell.strip() for cell in markdown[3].split("|")[1:5:3]] == ["converted", "tg4"]

    table = bench("table")
    assert all(word in table for word in ("pp8", "tg4", "tok/s", "% of ceiling", "converted", "1 repetitions"))


def test_bench_random() -> None:
    rows = succeed("bench", "--random", "smollm2-135m", "-p", 16, "-n", 4, "-r", 2, "-o", "json").json
    for row in rows:
        check_row(row)
    assert [row["params"] for row in rows] == [134_515_008] * 2  # as its model card says, without the norms' 576
    assert set(RANDOM) == set(ARCHITECTURES)


# --- perplexity, info, help -----------------------------------------------------------------------------------------


def perplexity_in_numpy(engine: Engine, text: str, size: int) -> tuple[float, int]:
    """llama.cpp's: chunks of `size`, BOS first, the second half of each scored. (mean nll, tokens)"""
    tokens = engine.tokenizer.encode(text)
    losses = []
    for start in range(0, len(tokens) - size + 1, size):
        chunk = [engine.tokenizer.bos_id, *tokens[start + 1 : start + size]]
        logits = np.concatenate([part.astype(np.float64) for _, part in engine.logits(chunk)])
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-logs[i, chunk[i + 1]] for i in range(size // 2, size - 1)]
    return float(np.mean(losses)), len(losses)


@pytest.mark.parametrize("size", [64, 257])
def test_perplexity(size: int) -> None:
    told = succeed("perplexity", STORIES, STORY_TEXT, "--ctx-size", size, "-o", "json").json
    assert {name: type(value) for name, value in told.items()} == {
        "perplexity": float,
        "nll": float,
        "tokens": int,
        "chunks": int,
        "seconds": float,
    }
    nll, tokens = perplexity_in_numpy(load(STORIES, chunk=128).engine, STORY_TEXT.read_text(), size)
    assert told["tokens"] == tokens == told["chunks"] * (size - 1 - size // 2)
    assert told["nll"] == pytest.approx(nll, rel=1e-5)
    assert told["perplexity"] == pytest.approx(np.exp(nll), rel=1e-4)
    assert 4 < told["perplexity"] < 6  # it was trained on such stories


def test_perplexity_of_stdin() -> None:
    from_file = succeed("perplexity", STORIES, STORY_TEXT, "--ctx-size", 128, "-o", "json").json
    piped = succeed("perplexity", STORIES, "-", "--ctx-size", 128, stdin=STORY_TEXT.read_bytes()).out
    assert re.search(rf"^perplexity +{from_file['perplexity']:.4f} \+/- 0\.\d+$", piped, re.MULTILINE)


def test_version() -> None:
    assert succeed("--version").out == f"numbainfer, version {__version__}\n"


@pytest.mark.parametrize("command", ["run", "convert", "bench", "info", "perplexity"])
def test_help_has_examples_that_work(command: str) -> None:
    text = succeed(command, "--help").out
    examples = re.findall(rf"^  (?:.*\| )?numbainfer {command}\b(.*)", text, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(re.split(r" [|>]", example)[0])
        commands.commands[command].make_context(command, words)  # raises where an option is unknown
    assert command in succeed("--help").out


def test_no_command_shows_the_help() -> None:
    result = numbainfer()
    assert (result.code, result.out) == (2, "")
    assert "Usage: numbainfer" in result.err
    assert not re.search("^error", result.err, re.MULTILINE)
