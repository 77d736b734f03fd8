"""The `numbainfer` command as tests call it, in this process, and models that are small enough to start in no time."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_files
import tiny_models
from building import DATA
from tiny_tokenizers import letters

from numbainfer import cli
from numbainfer.cpu import compile

STORIES = DATA / "stories260K.bin"  # tok512.bin lies beside it
GREEDY = ("--temperature", "0")

# Ends nothing: a reply of this model goes on until it is stopped.
ENDLESS = {"eos_token_id": None, "max_position_embeddings": 100_000}
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"


@dataclass
class Result:
    """What a command did. Text mode is off: `out` and `err` have the line ends as they were."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout, which has to be one JSON value."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that the command failed with."""
        assert self.out == ""
        assert "Traceback" not in self.err
        (line,) = (line for line in self.err.splitlines() if line.startswith("error: "))
        assert self.err.endswith(line + "\n")  # nothing after it
        assert "internal:" not in line
        return line.removeprefix("error: ")


def numbainfer(*arguments: object, stdin: bytes = b"", encoding: str = "utf-8") -> Result:
    """Runs the command in this process, with a pipe on stdin, and nothing that is a terminal."""
    out, err = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["numbainfer", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        for name, buffer in (("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding, write_through=name == "stderr"))
        patch.setattr(compile, "on_first_compile", None)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        sys.stdout.flush()
        text = (out.getvalue().decode(encoding), err.getvalue().decode(encoding))
    assert isinstance(exit.value.code, int)
    return Result(exit.value.code, *text)


def succeed(*arguments: object, **options: Any) -> Result:
    """The same for a command that has to succeed."""
    result = numbainfer(*arguments, **options)
    assert result.code == 0, result.err
    return result


def write_model(directory: Path, name: str = "llama_int8", **config: Any) -> Path:
    """An HF directory of a tiny model, which a test may spoil; `config` changes its config.json."""
    tiny_models.write_hf_checkpoint(name, directory)
    (directory / "config.json").write_text(json.dumps({**tiny_models.hf_config(name), **config}))
    (directory / "tokenizer.json").write_bytes(letters())
    return directory


def write_chat_model(directory: Path, template: str = TEMPLATE, **config: Any) -> Path:
    """The same with a chat template."""
    write_model(directory, **config)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


def write_gguf(path: Path) -> Path:
    """A GGUF with its vocabulary: letters."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*"abcdefghi", "ab", "<|im_end|>"],
        "tokenizer.ggml.token_type": [1] * 10 + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 10,
    }
    tensors = source_files.as_gguf(source_files.weights())
    return source_files.write_gguf(path, tensors, source_files.gguf_metadata() | metadata)


def copy_stories(directory: Path) -> Path:
    """stories260K.bin and its tokenizer, which a test may spoil."""
    for name in ("stories260K.bin", "tok512.bin"):
        shutil.copy(DATA / name, directory)
    return directory / "stories260K.bin"


def spoil_tensor(directory: Path, name: str, value: float) -> None:
    """Puts a value into the middle of a tensor of a float32 safetensors file."""
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    middle = start + (begin + end) // 8 * 4
    data[middle : middle + 4] = np.float32(value).tobytes()
    path.write_bytes(data)


def write_models(folder: Path) -> dict[str, Path]:
    """A tiny model of each kind."""
    succeed("convert", write_model(folder / "hf"), folder / "converted")
    return {
        "hf": folder / "hf",
        "converted": folder / "converted",
        "chat": write_chat_model(folder / "chat"),
        "endless": write_model(folder / "endless", **ENDLESS),
        "gguf": write_gguf(folder / "model.gguf"),
        "bin": STORIES,
    }


def run(model: object, *arguments: object, **options: Any) -> Any:
    """The JSON of `numbainfer run`, greedy unless told otherwise."""
    sampling = () if "--temperature" in arguments else GREEDY
    return succeed("run", model, *arguments, "--json", *sampling, **options).json
