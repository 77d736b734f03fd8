"""bench beyond its rows: comparing, plotting, kept measurements, and the profile by operator."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny_models
from building import source_weights
from command import STORIES, numbainfer, succeed, write_model

from numbainfer import bench_profile
from numbainfer.bench import Bench, Feeder, Test, bytes_moved, plan
from numbainfer.bench_output import compare, read_rows
from numbainfer.bench_plot import Point
from numbainfer.bench_profile import ONE_KERNEL, WHOLE_STEP, Step, profile
from numbainfer.device import Device
from numbainfer.model import Model
from numbainfer.registry import CONTRACTS, bind


def row(test: str = "tg128", rate: float = 100.0, **more: Any) -> dict[str, Any]:
    """A row as `bench -o json` prints it, 4 GB/s of 8."""
    return {
        "model": "llama",
        "architecture": "LlamaForCausalLM",
        "params": 10**9,
        "weight_bytes": 10**9,
        "device": "cpu",
        "device_name": "a CPU",
        "threads": 2,
        "test": test,
        "repetitions": 3,
        "tokens_per_second": rate,
        "stddev": 1.0,
        "ms_per_token": 1000 / rate,
        "bytes_per_second": 4e9,
        "bandwidth_ceiling": 8e9,
        "percent_of_ceiling": 50.0,
        "load_seconds": 1.0,
        "compile_seconds": 0.0,
        "peak_memory_bytes": 10**9,
        "version": "0",
        **more,
    }


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file of rows in which depth, batch and prompt length vary."""
    tests = [str(test) for test in plan((16, 64), (8,), (0, 100), (1, 4))]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(test, 10.0 * (i + 1)) for i, test in enumerate(tests)]))
    return path


# --- comparing -----------------------------------------------------------------------------------------------------


def test_compare_finds_the_same_test() -> None:
    old = [row("tg128", 80.0), row("tg128", 50.0, device="cuda:0"), row("pp512", 10.0)]
    new = [row("tg128", 100.0), row("tg128", 100.0, device="cuda:0"), row("tg128@b8", 1.0)]
    compared = compare(new, old)
    assert [r["before"] for r in compared] == [80.0, 50.0, None]
    assert [r["change_percent"] for r in compared] == [pytest.approx(25), pytest.approx(100), None]
    assert all(set(r) > set(row()) for r in compared)


def test_compare_in_every_output(tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    new.write_text(json.dumps([row("tg128", 100.0), row("tg64", 100.5), row("tg32", 90.0), row("tg16")]))
    old.write_text(json.dumps([row("tg128", 80.0), row("tg64", 100.0), row("tg32", 100.0)]))

    def told(output: str) -> str:
        return succeed("bench", "--from", new, "--compare", old, "-o", output).out

    changes = [line.split("|")[-2].strip() for line in told("markdown").splitlines()[2:]]
    assert changes == ["+25.0%", "+0.5% ~", "-10.0%", "new"]  # 0.5 tokens/s are less than twice their deviation
    assert all(change in told("table") for change in changes)
    assert [r["change_percent"] is None for r in json.loads(told("json"))] == [False, False, False, True]
    assert told("csv").splitlines()[0].endswith("before,before_stddev,change_percent")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "[1]", '[{"test": "tg128"}]', json.dumps([row("nonsense")]), json.dumps([row(rate=1)]) + "]"]
    + [
        json.dumps([{**row(), key: value}])
        for key, value in (("stddev", "x"), ("tokens_per_second", None), ("test", 3))
    ],
)
def test_files_that_are_no_measurements(content: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    for arguments in (("--compare", path, STORIES), ("--from", path)):
        result = numbainfer("bench", *arguments)
        assert result.code == 1
        assert result.error  # and nothing was measured
        assert "compiling" not in result.err


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert numbainfer("bench", "--from", tmp_path / "missing.json").error.endswith("No such file or directory")


def test_what_bench_prints_can_be_read_again(tmp_path: Path) -> None:
    told = succeed("bench", STORIES, "-p", 4, "-n", 2, "-r", 1, "-o", "json").out
    path = tmp_path / "rows.json"
    path.write_text(told)
    assert read_rows(str(path)) == json.loads(told)
    assert succeed("bench", "--from", path, "-o", "json").out == told


# --- plotting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot_writes_the_format_of_its_name(suffix: str, kept: Path, tmp_path: Path) -> None:
    out = tmp_path / f"plot{suffix}"
    result = succeed("bench", "--from", kept, "--plot", out)
    assert f"plotted to {out}" in result.err
    assert out.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


def comments(path: Path) -> str:
    """The texts of an SVG of matplotlib, which it draws as paths with the text as a comment before."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return " ".join(node.text or "" for node in ElementTree.parse(path, parser).iter() if not isinstance(node.tag, str))


def test_plot_shows_what_varies(kept: Path, tmp_path: Path) -> None:
    succeed("bench", "--from", kept, "--plot", tmp_path / "lines.svg")
    text = comments(tmp_path / "lines.svg")
    titles = ("Decoding", "Decoding together", "Prefill", "Prefill after a context", "roofline: memory bandwidth")
    assert all(f" {title} " in text for title in titles)
    one = tmp_path / "one.json"
    one.write_text(json.dumps([row("pp512", 400.0), row("tg128")]))
    succeed("bench", "--from", one, "--plot", tmp_path / "bars.svg")
    text = comments(tmp_path / "bars.svg")
    assert all(f" {word} " in text for word in ("pp512", "tg128", "100.0", "400.0"))
    assert "Decoding together" not in text


def test_the_roofline_is_the_bandwidth_over_the_bytes_of_a_token() -> None:
    point = Point.of(row(rate=100.0))  # 4 GB/s at 100 tokens/s are 40 MB a token, of which 8 GB/s read 200
    assert point.roofline == pytest.approx(200)
    assert (point.rate, point.test, point.series) == (100.0, Test("tg", 128), "llama, cpu")


def test_plot_that_can_not_be(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbainfer("bench", STORIES, "--plot", "plot.gif").code == 2
    missing = numbainfer("bench", STORIES, "--plot", tmp_path / "missing" / "plot.png")
    assert "there is no directory" in missing.error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "numbainfer[plot]"' in numbainfer("bench", STORIES, "--plot", tmp_path / "x.png").error


# --- the profile ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("profile") / "model")


def test_profile_times_every_operator_of_the_walk(model: Path) -> None:
    rows = succeed("bench", model, "--profile", "-p", 8, "-n", 4, "-b", 1, "-b", 2, "-r", 2, "-o", "json").json
    assert list(dict.fromkeys(r["test"] for r in rows)) == ["pp8", "tg1", "tg1@b2"]
    layers = tiny_models.hf_config("llama_int8")["num_hidden_layers"]
    for test in ("pp8", "tg1", "tg1@b2"):
        *operators, whole = (r for r in rows if r["test"] == test)
        calls = {r["operator"]: r["calls"] for r in operators}
        assert calls["rmsnorm"] == 2 * layers + 1
        assert calls["attention"] == calls["linear qkv"] == calls["linear down"] == layers
        assert calls["linear head"] == calls["embedding"] == 1
        assert {name.split()[0] for name in calls} <= set(CONTRACTS)
        assert whole["operator"] in (WHOLE_STEP, ONE_KERNEL)
        assert whole["calls"] == sum(calls.values())
        assert sum(r["percent_of_time"] for r in operators) == pytest.approx(100)
        for r in rows:
            assert r["bytes_per_second"] == pytest.approx(r["bytes"] / r["milliseconds"] * 1000)
            assert r["percent_of_ceiling"] == pytest.approx(100 * r["bytes_per_second"] / r["bandwidth_ceiling"])


def test_profile_counts_bytes_and_operations(model: Path) -> None:
    rows = succeed("bench", model, "--profile", "-p", 0, "-n", 1, "-d", 99, "-r", 1, "-o", "json").json
    of = {r["operator"]: r for r in rows}
    down = 2 * (128 * 192 + 128 * 3 * 2)  # two layers: codes and scales
    assert 0 <= of["linear down"]["bytes"] - down < 0.1 * down  # and what goes in and out
    kv = 2 * 2 * 100 * 2 * 32 * 2  # layers, keys and values, positions, heads, head_dim, float16
    assert 0 <= of["attention"]["bytes"] - kv < 0.1 * kv
    assert of["embedding"]["bytes"] < 1000  # one row of the table, not all of it

    def operations(name: str) -> float:
        return of[name]["operations_per_second"] * of[name]["milliseconds"] / 1000

    assert operations("linear gate_up") == pytest.approx(2 * 2 * 128 * 2 * 192)
    assert operations("attention") == pytest.approx(2 * 4 * 4 * 32 * 100)
    assert of["rmsnorm"]["operations_per_second"] == 0


def test_the_profile_leaves_the_model_as_it_was() -> None:
    """The recorded programs are the step: they store keys and values, and the next step gives the same logits."""
    bench = Bench(lambda: source_weights(STORIES), Device("cpu"), [Test("tg", 3, 5)], threads=1)
    fresh = Feeder(Model(bind(Device("cpu"), 1), source_weights(STORIES), 8))
    for feeder in (bench.feeder, fresh):
        feeder.reset(5)
    rows = profile(bench, Test("tg", 3, 5), 1)
    assert len(rows) > 5
    assert not bench.model.eager
    assert bench.model.ops is bench.ops
    # as many random tokens were drawn: one to warm up, one recorded
    for _ in range(2):
        fresh.reset(5)
        fresh.step()
    for feeder in (bench.feeder, fresh):
        feeder.reset(5)
    assert bench.feeder.step().tolist() == fresh.step().tolist()


def test_steps_under_a_sliding_window() -> None:
    step = Step(tokens=3, depth=10, batch=1)
    assert (step.seen(0), step.cached(0)) == (11 + 12 + 13, 13)
    assert (step.seen(4), step.cached(4)) == (12, 6)  # positions 7 to 12
    assert Step(tokens=8, depth=10, batch=8).seen(0) == 88
    assert bench_profile.Step(8, 10, 8).cached(0) == 88


def test_profile_for_people(model: Path) -> None:
    options = ("bench", model, "--profile", "-p", 8, "-n", 0, "-r", 1)
    table = succeed(*options).out
    assert all(word in table for word in ("linear gate_up", "% of time", "GOP/s", WHOLE_STEP, "read bandwidth"))
    lines = succeed(*options, "-o", "markdown").out.splitlines()
    assert lines[0] == "| test | operator | calls | ms | % of time | moves | GB/s | % of ceiling | GOP/s |"


# --- wrong usage, Ctrl-C -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("--from", "x.json", STORIES),
        ("--from", "x.json", "--random", "smollm2-135m"),
        ("--profile", "--plot", "x.png"),
        ("--profile", "--compare", "x.json"),
        ("-b", "0"),
        ("-b", "513"),
    ],
)
def test_wrong_usage(arguments: tuple[object, ...]) -> None:
    assert numbainfer("bench", *arguments).code == 2


def test_ctrl_c_shows_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Bench.run

    def stopped(self: Bench, repetitions: int) -> Any:
        yield next(rows(self, repetitions))
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "run", stopped)
    result = numbainfer("bench", STORIES, "-p", 4, "-n", 2, "-r", 1, "-o", "json")
    assert result.code == 130
    assert [r["test"] for r in result.json] == ["pp4"]


# --- mixtures of experts and sliding windows -----------------------------------------------------------------------


def open_tiny(directory: Path, name: str, test: Test) -> Bench:
    return Bench(lambda: source_weights(write_model(directory / name, name)), Device("cpu"), [test], threads=1)


def test_bench_of_a_mixture_counts_the_chosen_experts(tmp_path: Path) -> None:
    bench = open_tiny(tmp_path, "qwen3_moe", Test("tg", 1, 2))
    moved = [bytes_moved(bench.model, "tg", 1, 2, batch) for batch in (1, 8)]
    experts = [layer.mixture for layer in bench.model.layers if layer.mixture is not None]
    all_of_them = sum(mixture.gate_up.nbytes + mixture.down.nbytes for mixture in experts)
    kv = sum(2 * 4 * 3 * bench.model.config.kv_heads * bench.model.config.head_dim for _ in bench.model.layers)
    # 3 of 8 experts for one token, all for eight; the rest is the cache of seven more sequences
    assert moved[1] - moved[0] == pytest.approx(all_of_them * 5 / 8 + 7 * kv)
    names = {r["operator"] for r in profile(bench, Test("tg", 1, 2), 1)}
    assert {"route", "group_by_expert", "linear_experts gate_up", "linear_experts down", "linear router"} <= names


def test_bench_counts_what_a_window_lets_see(tmp_path: Path) -> None:
    bench = open_tiny(tmp_path, "mistral_window", Test("tg", 1, 100))
    window = next(layer.window for layer in bench.model.layers if layer.window)
    within, beyond = (bytes_moved(bench.model, "tg", 1, depth) for depth in (window - 1, window + 40))
    assert beyond == within
