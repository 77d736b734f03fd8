"""PyTorch's files without PyTorch: what torch.save writes is read, and what is not a state dict is refused, not run."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_files import TorchPickle, write_legacy_torch, write_torch

from numbainfer import NumbaInferError
from numbainfer.converters.torch_file import TorchFile

MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("write", [write_torch, write_legacy_torch])
def test_tensors(tmp_path: Path, write: Any) -> None:
    content = {"a": MATRIX, "b": MATRIX, "t": np.asfortranarray(MATRIX), "h": MATRIX.astype(np.float16)}
    found = TorchFile(write(tmp_path / "m.bin", content)).content
    for name in content:
        np.testing.assert_array_equal(found[name].rows(1, 3), MATRIX[1:])
    assert found["a"].storage is found["b"].storage
    assert found["t"].strides == (1, 3)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_torch_itself(tmp_path: Path, legacy: bool) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which nothing else here needs")
    values = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = torch.nn.Linear(6, 4).state_dict() | {"t": values.T, "slice": values[1:3], "p": torch.nn.Parameter(values)}
    state |= {"bf": values.bfloat16(), "half": values.half(), "long": values.long()}
    settings = {"dim": 288, "dropout": 0.0, "x": None, "big": 2**40, "yes": True}
    content = {"model": state, "model_args": settings, "list": [1, (2.5, "é")], "dtype": torch.float32}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    found = TorchFile(tmp_path / "m.pt").content
    assert found["model_args"] == settings
    assert found["list"] == content["list"]
    for name, tensor in state.items():
        raw = tensor.detach().view(torch.uint16) if name == "bf" else tensor.detach()
        np.testing.assert_array_equal(found["model"][name].rows(0, tensor.shape[0]), raw.numpy(), err_msg=name)


class Hostile:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zipped(path: Path, data: bytes, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
    return path


def test_a_hostile_pickle_is_refused_not_run(tmp_path: Path) -> None:
    flag = tmp_path / "was-run"
    for hostile in (
        Hostile(os.mkdir, str(flag)),
        Hostile(eval, f"__import__('os').mkdir({str(flag)!r})"),
        Hostile(getattr, str, "join"),
    ):
        for protocol in (2, 4):
            data = pickle.dumps({"a": hostile}, protocol)
            with pytest.raises(NumbaInferError, match=r"refused: its pickle would run '.*(mkdir|eval|getattr)"):
                TorchFile(zipped(tmp_path / "m.pt", data))
        (tmp_path / "old.pt").write_bytes(data)
        with pytest.raises(NumbaInferError, match=r"not a file that torch\.save wrote"):
            TorchFile(tmp_path / "old.pt")
    assert not flag.exists()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x80\x02" + b"]" * 3_000_000 + b".", "too long"),
        (b"\x80\x02X\xff\xff\xff\xff.", "cut off"),
        (b"\x80\x02\x8d" + b"\xff" * 8 + b".", "cut off"),
        (b"\x80\x02}r\xff\xff\xff\x7fj\xff\xff\xff\x7fNNs.", "damaged"),  # a memo of two thousand million entries
        (b"\x80\x02I1\n.", "the instruction 0x49"),
        (b"\x80\x02}}Ns.", "damaged"),  # a dict as a key
        (b"\x80\x02K\x01K\x02R.", "damaged"),  # a call of a number
        (b"\x80\x09N.", "protocol 9"),
        (b"\x80\x02(", "cut off"),
        (b"\x80\x02.", "damaged"),
    ],
)
def test_pickles_that_are_no_models(tmp_path: Path, data: bytes, problem: str) -> None:
    with pytest.raises(NumbaInferError, match=problem):
        TorchFile(zipped(tmp_path / "m.pt", data))


def test_zips_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with pytest.raises(NumbaInferError, match="compressed or encrypted"):
        TorchFile(zipped(path, bytes(10**8), compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"x")
    with pytest.raises(NumbaInferError, match=r"no data\.pkl"):
        TorchFile(path)

    # A tensor that is larger than its storage: strides of 0 would make any size of a single number.
    for shape, strides in (((2**20, 2**20), (0, 0)), ((4, 4), (4, 1)), ((12,), (2,)), ((2**40, 0, 2**40), (1, 1, 1))):
        encode = TorchPickle().encode
        data = TorchPickle().dump({"a": MATRIX})
        lie = data.replace(encode((3, 4)) + encode((4, 1)), encode(shape) + encode(strides))
        assert lie != data
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", lie)
            archive.writestr("archive/data/0", MATRIX.tobytes())
        with pytest.raises(NumbaInferError, match=r"reaches past its storage|damaged"):
            TorchFile(path)


def test_damaged_numbers_are_noticed(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "m.pt", {"a": MATRIX})
    data = bytearray(path.read_bytes())
    data[data.index(MATRIX.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    tensor = TorchFile(path).content["a"]
    with pytest.raises(NumbaInferError, match="checksum of data/0 does not match"):
        tensor.rows(0, 3)
