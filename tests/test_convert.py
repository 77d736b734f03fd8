"""Conversion: what is written is what the codec says, and whatever goes wrong leaves nothing under the final name."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny_models
from building import DATA, Checkpoints, build_model, difference, source_weights
from converting import GATE_UP, NAME, NORM, QKV, Tensors, convert_to, refusal, write_source
from safetensors.numpy import load_file
from tiny_tokenizers import letters

from numbainfer.checkpoint import Checkpoint, is_checkpoint, stack
from numbainfer.converters import convert as convert_module
from numbainfer.converters import source_reader
from numbainfer.converters.convert import convert
from numbainfer.converters.source import open_source
from numbainfer.converters.source_options import SourceOptions
from numbainfer.converters.source_reader import Target
from numbainfer.errors import NumbaInferError
from numbainfer.quantization import Matrix, QuantizedMatrix
from numbainfer.registry import Operators

EXPERTS = {"num_experts": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 64}


@pytest.fixture
def converted(checkpoint_of: Checkpoints, tmp_path: Path) -> Path:
    """A converted model, which a test may damage."""
    convert_to(checkpoint_of(NAME), tmp_path / "model")
    return tmp_path / "model"


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "groups"), [(128, {96: 32, 64: 64}), (64, {96: 32, 64: 64}), (32, {96: 32, 64: 32})])
def test_int8_is_the_codec(asked: int, groups: dict[int, int], checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    summary = convert_to(checkpoint_of(NAME), tmp_path / "out", Target("int8", asked))
    stored = load_file(tmp_path / "out" / "model.safetensors")  # the safetensors library's own reader
    weights = tiny_models.weights(NAME)
    assert {name.removesuffix("_scale") for name in stored} == weights.keys()
    floating = []
    for name, values in weights.items():
        if values.ndim == 1:
            assert stored[name].dtype == np.float32
            np.testing.assert_array_equal(stored[name], values)
        elif values.shape[1] in groups:
            scales = reference.quantize_groups(values, groups[values.shape[1]])[1].astype(np.float16)
            np.testing.assert_array_equal(stored[name + "_scale"], scales)  # none of these is subnormal
            steps = values.astype(np.float64) / np.repeat(scales.astype(np.float64), groups[values.shape[1]], axis=1)
            # a float32 reciprocal: within its rounding of a half the code may be either neighbour
            assert np.abs(stored[name] - steps).max() <= 0.5 + 127 * 2**-23
            assert np.abs(stored[name].astype(np.int32)).max() == 127
        else:
            assert stored[name].dtype == np.float16
            np.testing.assert_array_equal(stored[name], values.astype(np.float16))
            floating.append(name)
    assert sorted(summary.floating) == sorted(floating) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert summary.parameters == sum(values.size for values in weights.values())
    assert summary.nbytes == sum(array.nbytes for array in stored.values()) == Checkpoint(tmp_path / "out").nbytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source_dtype", ["float32", "float16", "bfloat16"])
def test_floating_point(dtype: str, source_dtype: str, checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    """Rounded once by the source and once here; vectors are float32 throughout."""
    summary = convert_to(checkpoint_of(NAME, dtype=source_dtype), tmp_path / "out", Target(dtype))
    assert summary.floating == []  # that list is of what int8 could not have
    checkpoint = Checkpoint(tmp_path / "out")
    for name, exact in tiny_models.weights(NAME).items():
        values = tiny_models.rounded(exact, source_dtype)
        if values.ndim == 1:
            np.testing.assert_array_equal(checkpoint.vector([name]), values)
            continue
        matrix = checkpoint.matrix([name])
        assert isinstance(matrix, Matrix)
        expected = tiny_models.bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)
        np.testing.assert_array_equal(matrix.data, expected)


def test_loading_and_converting_make_the_same_model(converted: Path, checkpoint_of: Checkpoints) -> None:
    loaded, mapped = source_weights(checkpoint_of(NAME), "int8"), Checkpoint(converted)
    for names in (QKV, GATE_UP, ["model.embed_tokens.weight"], ["model.layers.0.mlp.down_proj.weight"]):
        a, b = loaded.matrix(names), mapped.matrix(names)
        assert type(a) is type(b)
        for key, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, key))
    np.testing.assert_array_equal(loaded.vector([NORM]), mapped.vector([NORM]))


@pytest.mark.parametrize("shard_bytes", [None, 30_000])
def test_stacks_are_views_of_the_mapping(
    shard_bytes: int | None, checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shard_bytes is not None:
        monkeypatch.setattr(convert_module, "SHARD_BYTES", shard_bytes)
    convert_to(checkpoint_of(NAME), tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 if shard_bytes else len(files) == 1
    checkpoint = Checkpoint(tmp_path / "out")
    mappings = [np.frombuffer(file.mapping, np.uint8) for file in checkpoint.files]
    for names in (QKV, GATE_UP):
        matrix = checkpoint.matrix(names)
        assert isinstance(matrix, QuantizedMatrix)
        for array in (matrix.codes, matrix.scales):
            start = array.ctypes.data
            assert any(m.ctypes.data <= start and start + array.nbytes <= m.ctypes.data + m.size for m in mappings)
            assert not array.flags.writeable
        codes, scales = (np.concatenate(parts) for parts in zip(*map(single(checkpoint), names), strict=True))
        np.testing.assert_array_equal(matrix.codes, codes)
        np.testing.assert_array_equal(matrix.scales, scales)


def single(checkpoint: Checkpoint) -> Callable[[str], tuple[Any, Any]]:
    def parts(name: str) -> tuple[Any, Any]:
        matrix = checkpoint.matrix([name])
        assert isinstance(matrix, QuantizedMatrix)
        return matrix.codes, matrix.scales

    return parts


def test_stacks_that_do_not_lie_together_are_copied() -> None:
    both = np.arange(24, dtype=np.int8).reshape(6, 4)
    apart = [both[:2], both[3:]]
    np.testing.assert_array_equal(stack(apart), np.concatenate(apart))
    assert np.shares_memory(stack([both[:2], both[2:]]), both)
    assert "differ in dtype or width" in refusal(lambda: stack([both, both.astype(np.float16)]))
    assert "differ in dtype or width" in refusal(lambda: stack([both, both[:, :2]]))


def test_the_directory_is_whole(tmp_path: Path) -> None:
    """Tokenizer files byte for byte, generation_config and every key of config.json; a tied head is not stored."""
    name = "llama_int8"
    config = tiny_models.hf_config(name)
    tensors = tiny_models.weights(name)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = write_source(tmp_path / "hf", tensors, config, name)
    files = {
        "tokenizer_config.json": b'{"chat_template":\n\n "{{ messages }}" }\n',
        "special_tokens_map.json": b"{ }",
        "chat_template.jinja": "{# \u00e9 #}\r\n".encode(),
    }
    for file, content in files.items():
        (source / file).write_bytes(content)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    convert_to(source, tmp_path / "deep" / "er" / "out")
    out = tmp_path / "deep" / "er" / "out"
    for file, content in {**files, "tokenizer.json": letters()}.items():
        assert (out / file).read_bytes() == content
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 5]}
    written = json.loads((out / "config.json").read_text())
    assert written | config | {"torch_dtype": "float16"} == written
    assert written["quantization_config"]["quant_method"] == "numbainfer"
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert {p.name for p in out.parent.iterdir()} == {"out"}
    assert out.stat().st_mode & 0o777 == 0o755
    assert is_checkpoint(out)
    assert not is_checkpoint(source)


def test_stories260k_round_trip(ops: Operators, tmp_path: Path) -> None:
    """llama2.c's format in; its MLP width of 172 stays float16."""
    with open_source(DATA / "stories260K.bin", SourceOptions(tokenizer=DATA / "tok512.bin")) as source:
        summary = convert(source, tmp_path / "out", Target())
        assert summary.floating == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(5)]
    exact = build_model(ops, source_weights(DATA / "stories260K.bin", require_tokenizer=False))
    model = build_model(ops, Checkpoint(tmp_path / "out"))
    logits = [m.step(range(1, 60), range(59), m.cache.add_sequence().row, "all").copy() for m in (model, exact)]
    assert difference(*logits) < 0.03


def test_progress_counts_every_value(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    summary = convert_to(checkpoint_of(NAME), tmp_path / "out", progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1] == ("converting", summary.parameters, summary.parameters)


@pytest.mark.parametrize("target", [Target("int8"), Target("bfloat16")], ids=["int8", "bfloat16"])
def test_memory_stays_bounded(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 61 MB checkpoint with chunks of a quarter million values in 24 bytes for each of these: the chunk in float32
    and what is made of it on the way. tracemalloc sees NumPy's arrays; mapped files are the system's to drop."""
    chunk, rows = 1 << 18, 118_000
    monkeypatch.setattr(source_reader, "_CHUNK_VALUES", chunk)
    name = "llama_int8"
    tensors = tiny_models.weights(name)
    embedding = "model.embed_tokens.weight"
    tensors[embedding] = np.resize(tensors[embedding], (rows, 128))
    source = write_source(tmp_path / "hf", tensors, tiny_models.hf_config(name) | {"vocab_size": rows}, name)
    assert (source / "model.safetensors").stat().st_size > 60e6
    convert_to(source, tmp_path / "warm", target)  # compiling is not what is measured
    tracemalloc.start()
    try:
        convert_to(source, tmp_path / "out", target)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    scales = 2 * rows * 128 / 64  # those of a file are kept until its codes are written
    assert chunk < peak < 24 * chunk + scales + 2e6


# --- what is not written -------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(converted: Path, checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    source = checkpoint_of(NAME)
    before = {p.name: p.read_bytes() for p in converted.iterdir()}
    assert "exists; give another name, or --force" in refusal(lambda: convert_to(source, converted))
    assert {p.name: p.read_bytes() for p in converted.iterdir()} == before
    # --force replaces the whole directory, not only the files of the same names
    (converted / "mine.txt").write_text("a note")
    convert_to(source, converted, Target("float32"), force=True)
    assert Checkpoint(converted).matrix(QKV).shape == (128, 96)
    assert not (converted / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    # and an empty directory
    (tmp_path / "empty").mkdir()
    convert_to(source, tmp_path / "empty", force=True)
    assert is_checkpoint(tmp_path / "empty")


def test_force_spares_what_is_not_a_converted_model(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    source = checkpoint_of(NAME)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("a file")
    original = write_source(tmp_path / "hf")
    for out in (folder, file, original):
        assert "is not a converted model" in refusal(lambda out=out: convert_to(source, out, force=True))
    assert (folder / "thesis.txt").exists()
    assert file.read_text() == "a file"
    assert {p.name for p in tmp_path.iterdir()} == {"folder", "file", "hf"}


CONVERT_AND_WAIT = """
import sys, time
from pathlib import Path
from numbainfer.converters.convert import convert
from numbainfer.converters.source_reader import Target
from numbainfer.converters.source import open_source

source, out, calls = sys.argv[1:]
left = int(calls)

def progress(description, done, total):
    global left
    left -= 1
    if left == 0:
        print("half-way", flush=True)
        time.sleep(60)

convert(open_source(Path(source)), Path(out), Target(), force=True, progress=progress)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_conversion_that_is_killed(
    number: signal.Signals, replacing: bool, checkpoint_of: Checkpoints, converted: Path, tmp_path: Path
) -> None:
    """At a random tensor, in a process of its own. What was there before stays as it was."""
    out = converted if replacing else tmp_path / "out"
    before = {p.name: p.read_bytes() for p in converted.iterdir()}
    tensors = len(tiny_models.shapes(NAME))
    calls = random.Random(f"{number}{replacing}").randint(1, tensors)
    command = [sys.executable, "-c", CONVERT_AND_WAIT, str(checkpoint_of(NAME)), str(out), str(calls)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "half-way\n":
            pytest.fail(process.stderr.read())
        process.send_signal(number)
        error = process.stderr.read()
    assert process.returncode in (-number, 1)
    assert out.exists() == replacing
    assert {p.name: p.read_bytes() for p in converted.iterdir()} == before
    left = {p.name for p in tmp_path.iterdir()} - {"model"}
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in error
        assert left == set()  # it cleans up after itself
    else:
        assert all(name.startswith(f".{out.name}-") for name in left)  # and what it could not is hidden
        convert_to(checkpoint_of(NAME), out, force=replacing)  # and in nobody's way
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


class FullDisk(io.RawIOBase):
    """A file on a disk with `room` bytes left."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@pytest.mark.parametrize("room", [0, 10_000, 80_000])
def test_a_disk_that_fills_up(
    room: int, converted: Path, checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in converted.iterdir()}
    real_open = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "xb":
            return io.BufferedWriter(FullDisk(real_open(self, mode, 0), room))
        return real_open(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    for out, force in ((tmp_path / "out", False), (converted, True)):
        message = refusal(lambda out=out, force=force: convert_to(checkpoint_of(NAME), out, force=force))
        assert "No space left on device" in message
    assert {p.name: p.read_bytes() for p in converted.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["tempfile.mkdtemp", "os.fsync", "os.rename", "pathlib.Path.write_bytes"])
def test_every_step_of_writing_may_fail(
    function: str, number: int, checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint_of(NAME)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(function, fail)
    message = refusal(lambda: convert_to(source, tmp_path / "out"))
    monkeypatch.undo()
    assert message.startswith("cannot write")
    assert os.strerror(number) in message
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    out = tmp_path / "file" / "out"
    assert f"cannot write {out}" in refusal(lambda: convert_to(checkpoint_of(NAME), out))
    if os.name == "posix" and os.geteuid() != 0:  # root writes everywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        assert "Permission denied" in refusal(lambda: convert_to(checkpoint_of(NAME), tmp_path / "locked" / "out"))


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_value(name: str, value: float, kind: Any = np.float32) -> Callable[[Tensors], None]:
    def put(tensors: Tensors) -> None:
        tensors[name] = tensors[name].astype(kind)
        tensors[name].flat[7] = value

    return put


def extra(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


SPOILED_TENSORS: list[tuple[Callable[[Tensors], None], str]] = [
    (without(QKV[0]), rf"tensor {QKV[0]} \[64, 96\] is missing"),
    (without(NORM), f"tensor {NORM} .* is missing"),
    (without("lm_head.weight"), "tensor lm_head.weight .* is missing"),
    (extra("model.layers.2.mlp.up_proj.weight", (2, 2)), "tensor model.layers.2.mlp.up_proj.weight is not part of"),
    (extra("model.layers.0.self_attn.q_proj.bias", (64,)), "q_proj.bias is not part of Qwen3ForCausalLM"),
    (extra(QKV[2], (96, 32)), rf"tensor {QKV[2]} is \[96, 32\], the config says \[32, 96\]"),
    (extra(NORM, (96, 1)), rf"{NORM} is \[96, 1\], the config says \[96\]"),
    (with_value(QKV[1], np.nan), f"tensor {QKV[1]} has NaN or infinite values"),
    (with_value(QKV[1], -np.inf, np.float16), f"tensor {QKV[1]} has NaN or infinite values"),
    (with_value(NORM, np.nan), f"tensor {NORM} has NaN or infinite values"),
    (with_value("model.layers.1.mlp.down_proj.weight", np.nan), "down_proj.weight has NaN or infinite values"),
    (with_value("model.layers.1.mlp.down_proj.weight", 1e5), "down_proj.weight has values beyond float16's range"),
    (with_value(QKV[1], 1e7), f"tensor {QKV[1]} has values beyond float16's range; convert with --dtype float32"),
]


@pytest.mark.parametrize(("spoil", "problem"), SPOILED_TENSORS, ids=[problem for _, problem in SPOILED_TENSORS])
def test_spoiled_tensors(spoil: Callable[[Tensors], None], problem: str, tmp_path: Path) -> None:
    tensors = tiny_models.weights(NAME)
    spoil(tensors)
    source = write_source(tmp_path / "hf", tensors)
    with pytest.raises(NumbaInferError, match=problem):
        convert_to(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_values_beyond_float16_are_floats_in_float32(ops: Operators, tmp_path: Path) -> None:
    """What the error line advises works."""
    tensors = tiny_models.weights(NAME)
    with_value(QKV[1], 1e7)(tensors)
    convert_to(write_source(tmp_path / "hf", tensors), tmp_path / "out", Target("float32"))
    model = build_model(ops, Checkpoint(tmp_path / "out"))
    assert ops.download(model.layers[1].qkv.data).max() == np.float32(1e7)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"attention_sink": 4}, "attention_sink = 4 is not known"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.* is missing"),
        ({"vocab_size": 98}, r"embed_tokens.weight is \[97, 96\], the config says \[98, 96\]"),
        # a mixture of 4096 layers of 4096 experts is refused for the first tensor that is not there
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 4096, **EXPERTS}, "is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number"),
    ],
)
def test_configs_that_do_not_fit(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf", config=tiny_models.hf_config(NAME) | change)
    with pytest.raises(NumbaInferError, match=problem):
        convert_to(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_bad_tokenizer_is_refused_before_the_work(tmp_path: Path) -> None:
    source = write_source(tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refusal(lambda: convert_to(source, tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
