"""Bad input on the command line: one line that says what is wrong, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers
from command import STORIES, copy_stories, numbainfer, spoil_tensor, succeed, write_chat_model, write_gguf, write_model
from safetensors.numpy import load_file, save_file

from numbainfer.converters import convert as converter

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
NORM = "model.norm.weight"


def refusals(model: Path, tmp_path: Path) -> set[str]:
    """What run, convert and bench have against a model: exit code 1, and nothing left behind."""
    out = tmp_path / "outputs" / "out"
    out.parent.mkdir(exist_ok=True)
    commands = (("run", model, "hi"), ("convert", model, out), ("bench", model, "-p", 4, "-n", 0, "-r", 1))
    results = [numbainfer(*command) for command in commands]
    assert [result.code for result in results] == [1, 1, 1]
    assert list(out.parent.iterdir()) == []
    return {result.error for result in results}


# --- damaged models: run, convert and bench say the same -------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def edit_tensors(model: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def lie(model: Path, old: bytes, new: bytes) -> None:
    """Changes the safetensors header; its length stays."""
    data = (model / "model.safetensors").read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    (model / "model.safetensors").write_bytes(data.replace(old, new))


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no config", lambda m: (m / "config.json").unlink(), "is not a model directory: it has no config.json"),
    ("config not JSON", lambda m: (m / "config.json").write_text("{'a': 1}"), r"config\.json is not valid JSON"),
    ("config not UTF-8", lambda m: (m / "config.json").write_bytes(b"\xff\xfe\xfd"), r"config\.json is not valid JSON"),
    ("config enormous", lambda m: sparse(m / "config.json"), r"config\.json is too large"),
    ("tokenizer enormous", lambda m: sparse(m / "tokenizer.json"), r"tokenizer\.json is too large"),
    ("config a list", lambda m: (m / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
    ("architecture", lambda m: edit_json(m / "config.json", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    ("no layers", lambda m: edit_json(m / "config.json", num_hidden_layers=0), "num_hidden_layers"),
    ("layers a text", lambda m: edit_json(m / "config.json", num_hidden_layers="two"), "num_hidden_layers"),
    ("more layers", lambda m: edit_json(m / "config.json", num_hidden_layers=3), r"model\.layers\.2\..* is missing"),
    ("fewer layers", lambda m: edit_json(m / "config.json", num_hidden_layers=1), "is not part of LlamaForCausalLM"),
    ("wider", lambda m: edit_json(m / "config.json", intermediate_size=256), r"is \[\d+, \d+\], the config says"),
    ("missing tensor", lambda m: edit_tensors(m, lambda t: t.pop(NORM)), rf"tensor {NORM} \[128\] is missing"),
    ("extra tensor", lambda m: edit_tensors(m, lambda t: t.update(x=t[NORM])), "tensor x is not part of"),
    ("wrong shape", lambda m: edit_tensors(m, lambda t: t.update({NORM: t[NORM][:-1]})), rf"{NORM} is \[127\]"),
    (
        "wrong dtype",
        lambda m: edit_tensors(m, lambda t: t.update({NORM: t[NORM].astype("i8")})),
        "I64; weights must",
    ),
    ("NaN", lambda m: spoil_tensor(m, "model.layers.1.mlp.up_proj.weight", np.nan), "up_proj.weight has NaN or infin"),
    ("infinite", lambda m: spoil_tensor(m, NORM, np.inf), f"{NORM} has NaN or infinite"),
    ("no weights", lambda m: (m / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    ("empty weights", lambda m: (m / "model.safetensors").write_bytes(b""), "is it truncated"),
    ("zeros", lambda m: sparse(m / "model.safetensors"), "header is not valid JSON"),
    ("dtype lies", lambda m: lie(m, b'"F32","shape":[257,128]', b'"F16","shape":[257,128]'), "takes 65792 bytes"),
    ("shape lies", lambda m: lie(m, b'"shape":[257,128]', b'"shape":[257,129]'), "takes 132612 bytes"),
    (
        "offsets lie",
        lambda m: lie(m, b'"data_offsets":[0,', b'"data_offsets":[4,'),
        "takes 131584 bytes, it has",
    ),
]


def sparse(path: Path) -> None:
    """100 GB of zeros, which take no room on the disk."""
    with path.open("wb") as file:
        file.truncate(100 * 10**9)


@pytest.mark.parametrize(("damage", "problem"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damaged_checkpoints(damage: Callable[[Path], Any], problem: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    damage(model)
    (error,) = refusals(model, tmp_path)
    assert str(model) in error
    assert re.search(problem, error)


def test_truncated_files(tmp_path: Path) -> None:
    """At the places where something begins, and at random ones."""
    safetensors = write_model(tmp_path / "model") / "model.safetensors"
    header = 8 + int.from_bytes(safetensors.read_bytes()[:8], "little")
    gguf, stories = write_gguf(tmp_path / "m.gguf"), copy_stories(tmp_path)
    for path, model in ((safetensors, safetensors.parent), (gguf, gguf), (stories, stories)):
        data = path.read_bytes()
        draw = random.Random(path.name)
        begins = (0, 1, 4, 7, 8, 27, 28, 29, header, header + 1, len(data) - 1)
        for end in (*begins, *(draw.randrange(len(data)) for _ in range(25))):
            path.write_bytes(data[:end])
            result = numbainfer("convert", model, tmp_path / "out")
            assert result.code == 1, end
            assert str(model) in result.error
        path.write_bytes(data[: len(data) // 2])
        refusals(model, tmp_path)
        shutil.rmtree(model) if model.is_dir() else model.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outputs", "tok512.bin"]


def test_a_gguf_with_garbage_behind_its_header(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf")
    data = bytearray(gguf.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    gguf.write_bytes(data)
    (error,) = refusals(gguf, tmp_path)
    assert "has NaN or infinite values" in error


CONVERTED_DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no weights", lambda m: (m / "model.safetensors").unlink(), "cannot read .*No such file"),
    ("cut", lambda m: os.truncate(m / "model.safetensors", 100_000), "is it truncated"),
    (
        "version",
        lambda m: edit_json(m / "config.json", numbainfer_format=99),
        "format version 99.* convert",
    ),
    ("config", lambda m: edit_json(m / "config.json", hidden_size=64), "the config says"),
    ("tokenizer", lambda m: (m / "tokenizer.json").write_text("{"), r"tokenizer\.json"),
    ("no tokenizer", lambda m: (m / "tokenizer.json").unlink(), r"neither tokenizer\.json nor tokenizer\.model"),
    ("generation", lambda m: (m / "generation_config.json").write_text("["), r"generation_config\.json is not valid"),
]


@pytest.mark.parametrize(("damage", "problem"), [d[1:] for d in CONVERTED_DAMAGE], ids=[d[0] for d in CONVERTED_DAMAGE])
def test_damaged_converted_models(damage: Callable[[Path], Any], problem: str, tmp_path: Path) -> None:
    succeed("convert", write_model(tmp_path / "hf"), tmp_path / "model")
    damage(tmp_path / "model")
    result = numbainfer("run", tmp_path / "model", "hi")
    assert result.code == 1
    assert re.search(problem, result.error)


TOKENIZERS: list[tuple[str, bytes, str]] = [
    ("empty", b"", r"tokenizer\.json"),
    ("not JSON", b"{", r"tokenizer\.json"),
    ("not a tokenizer", b'{"a": 1}', r"tokenizer\.json"),
    ("binary", bytes(range(256)), r"tokenizer\.json"),
    ("another model's", tiny_tokenizers.byte_level("qwen2").to_str().encode(), "belong to different models"),
]


@pytest.mark.parametrize(("content", "problem"), [t[1:] for t in TOKENIZERS], ids=[t[0] for t in TOKENIZERS])
def test_bad_tokenizers(content: bytes, problem: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "tokenizer.json").write_bytes(content)
    for command in (("run", model, "hi"), ("convert", model, tmp_path / "out")):
        result = numbainfer(*command)
        assert result.code == 1
        assert re.search(problem, result.error)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "chat template"),
        ("{% for i in messages %}{% for", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
        ("{{ 'x' * 10 ** 10 }}", "chat template"),
        ("{{ raise_exception('no system\nplease') }}", "no system please"),
        ("{{ 1 / 0 }}", "chat template"),
        ("", "the prompt is empty"),
    ],
)
def test_hostile_chat_templates(template: str, problem: str, tmp_path: Path) -> None:
    result = numbainfer("run", write_chat_model(tmp_path / "model", template), "hi")
    assert result.code == 1
    assert problem in result.error
    interactive = numbainfer("run", tmp_path / "model", "-i", stdin=b"hi\n")
    assert interactive.code == 0  # told, and the next turn is asked for
    assert "error: " in interactive.err


# --- paths that are no models ---------------------------------------------------------------------------------------


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.txt").write_text("Once upon a time, there was a text that is no model.")
    sparse(Path("zeros.gguf"))
    sparse(Path("zeros.bin"))
    for path, problem in (
        ("missing", "missing: no such file or directory"),
        ("missing.gguf", "missing.gguf: no such file or directory"),
        ("x" * 300, "File name too long"),
        ("empty", "empty is not a model directory: it is empty"),
        (".", "zeros.gguf is not a model that numbainfer reads"),
        ("text.txt", "is not a model that numbainfer reads"),
        ("zeros.gguf", "is not a model that numbainfer reads"),
        ("zeros.bin", "is not a model that numbainfer reads"),
        ("text.txt/model", "no such file or directory"),
    ):
        for error in refusals(Path(path), tmp_path):
            assert problem in error
    for path in ("missing.gguf", "./missing"):  # alone: not taken for a prompt, stdin not read
        assert "no such file or directory" in numbainfer("run", path).error


@posix
def test_files_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(tmp_path / "loop")
    for path, problem in (
        (tmp_path / "fifo", "is neither a file nor a directory"),
        (Path("/dev/null"), "is neither a file nor a directory"),
        (Path("/dev/zero"), "is neither a file nor a directory"),
        (tmp_path / "loop", "a symbolic link that leads nowhere"),
        (tmp_path / "loop" / "model.gguf", "no such file or directory"),
    ):
        (error,) = refusals(path, tmp_path)
        assert problem in error


@posix
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"])
def test_a_checkpoint_with_a_fifo_in_it_does_not_wait_for_ever(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    succeed("convert", model, tmp_path / "converted")
    for directory in (model, tmp_path / "converted"):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)
        result = numbainfer("run", directory, "hi", "-n", 1)
        if name == "generation_config.json":  # it does without
            assert result.code == 0
        else:
            assert result.code == 1
            assert name in result.error


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root reads and writes everything")
def test_permissions(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").chmod(0)
    (error,) = refusals(model, tmp_path)
    assert "Permission denied" in error
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    result = numbainfer("convert", STORIES, locked / "out")
    assert result.error == f"cannot write {locked / 'out'}: Permission denied"


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for out, force, problem in (
        ("file", (), "exists; give another name"),
        ("folder", (), "exists; give another name"),
        ("file", ("--force",), "--force replaces only those"),
        ("folder", ("--force",), "--force replaces only those"),
        ("file/out", (), "cannot write"),
        ("x" * 300, (), "File name too long"),
    ):
        result = numbainfer("convert", STORIES, tmp_path / out, *force)
        assert result.code == 1
        assert problem in result.error
    assert (tmp_path / "folder" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_an_output_that_another_process_makes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = converter._write_shard
    theirs = tmp_path / "out" / "theirs"

    def late(*arguments: Any) -> None:
        write(*arguments)
        theirs.parent.mkdir()
        theirs.touch()

    monkeypatch.setattr(converter, "_write_shard", late)
    result = numbainfer("convert", STORIES, tmp_path / "out")
    assert result.error == f"{tmp_path / 'out'} exists; give another name, or --force to replace it"
    assert theirs.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- prompts, texts and options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("",), ("  \n",), (STORIES, ""), (STORIES, " "), (STORIES,), (STORIES, "-"), ()])
def test_empty_prompts(arguments: tuple[object, ...]) -> None:
    result = numbainfer("run", *arguments)
    assert (result.code, result.error) == (1, "the prompt is empty: give some text")


def test_prompts_that_are_no_text() -> None:
    result = numbainfer("run", STORIES, stdin=b"caf\xe9")
    assert result.code == 1
    assert result.error.startswith("the prompt on stdin is not UTF-8 text")
    assert "not valid Unicode; give it as UTF-8" in numbainfer("run", STORIES, "caf\udce9").error
    chat = numbainfer("run", STORIES, "-i", stdin=b"caf\xe9\n")
    assert (chat.code, chat.out) == (1, "")
    assert "error: the input is not UTF-8 text" in chat.err


def test_prompts_that_are_too_long() -> None:
    result = numbainfer("run", STORIES, "Once upon a time " * 200)
    assert result.code == 1
    assert re.search(r"^the prompt has \d+ tokens and the context holds 512: shorten it", result.error)
    assert "raise --ctx-size" in numbainfer("run", STORIES, "Once", "--ctx-size", 1).error
    assert "this model's context is 512 at most" in numbainfer("run", STORIES, "Once", "--ctx-size", 513).error


def test_texts_for_perplexity(tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("Once upon a time")
    binary.write_bytes(b"\x00\xff\xfe")
    for arguments, problem in (
        ((STORIES, short, "--ctx-size", 64), "fewer than one chunk of 64: lower --ctx-size"),
        ((STORIES, binary), f"{binary} is not UTF-8 text"),
        ((STORIES, tmp_path / "missing"), f"{tmp_path / 'missing'}: No such file or directory"),
        ((STORIES, tmp_path), "irectory"),
        ((STORIES, short, "--ctx-size", 600), "this model's context is 512 at most"),
        ((tmp_path / "missing", short), "no such file or directory"),
    ):
        result = numbainfer("perplexity", *arguments)
        assert result.code == 1
        assert problem in result.error


def test_perplexity_of_a_model_that_overflows(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    edit_tensors(model, lambda t: t.update({NORM: t[NORM] * np.float32(1e30)}))
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 20)
    result = numbainfer("perplexity", model, text, "--ctx-size", 32, "-o", "json")
    assert result.code == 1
    assert "weights are damaged or overflow" in result.error


WRONG_USAGE = [
    ("run", STORIES, "x", "--bad"),
    ("run", STORIES, "x", "and", "more"),
    ("run", STORIES, "x", "-n", "-1"),
    ("run", STORIES, "x", "-n", "many"),
    ("run", STORIES, "x", "--temperature", "-0.1"),
    ("run", STORIES, "x", "--temperature", "inf"),
    ("run", STORIES, "x", "--temperature", "nan"),
    ("run", STORIES, "x", "--top-p", "0"),
    ("run", STORIES, "x", "--top-p", "1.1"),
    ("run", STORIES, "x", "--min-p", "nan"),
    ("run", STORIES, "x", "--repetition-penalty", "0"),
    ("run", STORIES, "x", "--seed", "-1"),
    ("run", STORIES, "x", "--seed", 2**64),
    ("run", STORIES, "x", "--stop", ""),
    ("run", STORIES, "x", "--threads", "0"),
    ("run", STORIES, "x", "--ctx-size", "-1"),
    ("run", STORIES, "x", "--device", "foo"),
    ("run", STORIES, "x", "--device", "cuda:x"),
    ("run", STORIES, "x", "-i", "--json"),
    ("convert", STORIES),
    ("convert", STORIES, ""),
    ("convert", "", "out"),
    ("convert", STORIES, "out", "--dtype", "int4"),
    ("convert", STORIES, "out", "--group-size", "48"),
    ("bench", STORIES, "--random", "smollm2-135m"),
    ("bench", "--random", "gpt-5"),
    ("bench", STORIES, "-p", "0", "-n", "0"),
    ("bench", STORIES, "-r", "0"),
    ("bench", STORIES, "-o", "xml"),
    ("bench", STORIES, "--device", "gpu"),
    ("bench", ""),
    ("info", ""),
    ("perplexity", STORIES),
    ("perplexity", STORIES, "file", "--ctx-size", "3"),
    ("serve",),
    ("--bad",),
]


@pytest.mark.parametrize("arguments", WRONG_USAGE, ids=lambda a: " ".join(str(word).split("/")[-1] for word in a))
def test_wrong_usage(arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = numbainfer(*arguments)
    assert result.code == 2
    command = "numbainfer" if arguments[0] in ("serve", "--bad") else f"numbainfer {arguments[0]}"
    assert result.error.endswith(f"(see {command} --help)")
    assert result.err.count("\n") == 1  # before anything was loaded
    assert list(tmp_path.iterdir()) == []


def test_what_this_machine_or_model_lacks() -> None:
    for arguments, problem in (
        (("run", STORIES, "x", "--threads", 1000), "--threads 1000: this machine offers 1 to "),
        (("bench", STORIES, "--threads", 1000), "--threads 1000: this machine offers 1 to "),
        (("bench", STORIES, "-p", 400, "-d", 200), "600 tokens exceed this model's context of 512"),
        (("bench", STORIES, "-p", 8, "-n", 300, "-d", 300), "600 tokens exceed this model's context of 512"),
        (("info", STORIES, "--ctx-size", 513), "this model's context is 512 at most"),
    ):
        result = numbainfer(*arguments)
        assert result.code == 1
        assert problem in result.error


def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("numbainfer.loading.Model", none_left)
    result = numbainfer("run", STORIES, "x")
    assert (result.code, result.error) == (1, "out of memory: lower --ctx-size or take a smaller model")


def test_what_nobody_thought_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even then no traceback, unless it is asked for."""
    monkeypatch.setattr("numbainfer.loading.Model", lambda *arguments, **options: 1 // 0)
    result = numbainfer("run", STORIES, "x")
    assert (result.code, result.out) == (1, "")
    assert "error: internal: ZeroDivisionError" in result.err
    assert "--debug" in result.err
    with pytest.raises(ZeroDivisionError):
        numbainfer("run", STORIES, "x", "--debug")
