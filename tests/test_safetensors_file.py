"""The safetensors reader and writer, held against the safetensors library and against files that lie."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from numbainfer import NumbaInferError
from numbainfer.safetensors_file import SafetensorsFile, SafetensorsWriter


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "f32": rng.standard_normal((5, 3)).astype(np.float32),
        "f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "i8": rng.integers(-128, 128, (7, 3)).astype(np.int8),
        "u8": np.arange(3, dtype=np.uint8),
        "i32": np.arange(-2, 2, dtype=np.int32),
        "i64": np.array([2**60]),
        "none": np.empty((0, 4), np.float32),
        "scalar": np.array(1.5, np.float32),
    }


def encode(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    expected = some_tensors()
    save_file(expected, tmp_path / "a", metadata={"format": "np"})
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.metadata == {"format": "np"}
        assert file.tensors.keys() == expected.keys()
        arrays = {name: file.array(name) for name in file.tensors}
    for name, array in arrays.items():  # views stay valid after close
        assert array.dtype == expected[name].dtype
        assert not array.flags.writeable
        assert not array.flags.owndata
        np.testing.assert_array_equal(array, expected[name])


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    expected = some_tensors()
    codes = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64"}
    entries = [(name, codes[array.dtype.name], array.shape) for name, array in expected.items()]
    with SafetensorsWriter(tmp_path / "a", entries, {"format": "pt"}) as writer:
        for name, array in expected.items():
            if array.ndim == 0 or array.shape[0] < 2:
                writer.write(name, array)
            else:  # in two pieces, the second of them not contiguous
                writer.write(name, array[:1])
                writer.write(name, np.asfortranarray(array[1:]))
    found = load_file(tmp_path / "a")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    with safe_open(tmp_path / "a", "np") as library:
        assert library.metadata() == {"format": "pt"}
    ours = SafetensorsFile(tmp_path / "a")
    assert list(ours.tensors) == list(expected)  # the order of the entries
    assert ours.tensors["f32"].start % 64 == 0


def test_bfloat16_and_odd_offsets(tmp_path: Path) -> None:
    bits = np.arange(6, dtype=np.uint16).reshape(2, 3)
    ones = np.ones(2, np.float32)
    entries = [("u8", "U8", (3,)), ("bf", "BF16", (2, 3)), ("f32", "F32", (2,))]
    with SafetensorsWriter(tmp_path / "a", entries) as writer:
        for name, array in (("u8", np.zeros(3, np.uint8)), ("bf", bits), ("f32", ones)):
            writer.write(name, array)
    file = SafetensorsFile(tmp_path / "a")
    np.testing.assert_array_equal(file.array("bf"), bits)
    np.testing.assert_array_equal(file.array("f32"), ones)
    assert file.tensors["f32"].start % 4 == 3  # packed where float32 can't be read in place
    assert file.array("f32").flags.aligned
    np.testing.assert_array_equal(file.rows("bf", 1, 2), bits[1:2])


def test_writer_keeps_its_contract(tmp_path: Path) -> None:
    entries = [("a", "F32", (2, 3)), ("b", "I8", (4,))]
    rows = np.zeros((1, 3), np.float32)
    path = tmp_path / "out"

    def attempt(*writes: tuple[str, np.ndarray]) -> None:
        with SafetensorsWriter(path, entries) as writer:
            for name, array in writes:
                writer.write(name, array)

    for writes, problem in (
        ([("a", rows)], "got 12 of its 24 bytes"),
        ([("a", rows), ("b", np.zeros(4, np.int8))], "out of order"),
        ([("a", rows), ("a", rows), ("a", rows)], "more rows"),
        ([("a", rows.astype(np.float16))], "does not fit"),
        ([("a", np.zeros((1, 4), np.float32))], "does not fit"),
    ):
        with pytest.raises(ValueError, match=problem):
            attempt(*writes)
        assert not path.exists()  # nothing half-written stays
    attempt(("a", rows), ("a", rows), ("b", np.zeros(4, np.int8)))
    with pytest.raises(NumbaInferError, match=r"cannot write .*File exists"):
        attempt()
    with pytest.raises(ValueError, match="taken"):
        SafetensorsWriter(tmp_path / "twice", [("a", "F32", (1,)), ("a", "F32", (1,))])
    with pytest.raises(NumbaInferError, match="cannot write"):
        SafetensorsWriter(tmp_path / "no" / "such", entries)


DATA = bytes(16)
LIES: dict[str, bytes] = {
    "are too few for": b"1234567",
    "header would be": (2**40).to_bytes(8, "little") + DATA,
    "truncated: the header": (100).to_bytes(8, "little") + b"{}",
    "not valid JSON": encode(b"{nonsense}"),
    "can't decode": encode(b'{"\xff": 1}'),
    "twice": encode(b'{"a": 1, "a": 2}'),
    "NaN is not": encode(b'{"a": NaN}'),
    "recursion": encode(b"[" * 200_000),
    "not a JSON object": encode([1]),
    "__metadata__": encode({"__metadata__": {"a": 1}}),
    "header entry": encode({"a": {"dtype": "F32"}}),
    "header entry is": encode({"a": 3}),
    "'C64' is not supported": encode({"a": entry("C64", [2], [0, 16])}, DATA),
    r"\[\] is not supported": encode({"a": entry([], [2], [0, 16])}, DATA),
    r"shape \[-2, -2\] is not": encode({"a": entry(shape=[-2, -2])}, DATA),
    r"shape \[True, 4\] is not": encode({"a": entry(shape=[True, 4])}, DATA),
    r"shape \[2.0, 2\] is not": encode({"a": entry(shape=[2.0, 2])}, DATA),
    "shape 4 is not": encode({"a": entry(shape=4)}, DATA),
    "is not a list of at most 8": encode({"a": entry(shape=[1] * 100)}, DATA),
    "larger than any file": encode({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}),
    "larger than any": encode({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}),
    "takes 16 bytes, it has 8": encode({"a": entry(offsets=[0, 8])}, DATA),
    r"data_offsets \[16, 0\]": encode({"a": entry(offsets=[16, 0])}, DATA),
    r"data_offsets \[0\]": encode({"a": entry(offsets=[0])}, DATA),
    r"data_offsets \[-16, 0\]": encode({"a": entry(offsets=[-16, 0])}, DATA),
    "is it truncated": encode({"a": entry()}, DATA[:8]),
    "'b' overlaps": encode({"a": entry(), "b": entry(shape=[2], offsets=[8, 16])}, DATA),
    "'a' leaves a gap": encode({"a": entry(shape=[2], offsets=[8, 16])}, DATA),
    "8 bytes after the last": encode({"a": entry(shape=[2], offsets=[0, 8])}, DATA),
}


@pytest.mark.parametrize("problem", LIES)
def test_a_file_that_lies_is_refused(tmp_path: Path, problem: str) -> None:
    (tmp_path / "lie").write_bytes(LIES[problem])
    with pytest.raises(NumbaInferError, match=problem) as caught:
        SafetensorsFile(tmp_path / "lie")
    assert str(tmp_path / "lie") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for size in range(len(data)):
        (tmp_path / "b").write_bytes(data[:size])
        with pytest.raises(NumbaInferError):
            SafetensorsFile(tmp_path / "b")


def test_flipped_bits_never_raise_anything_else(tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    refused = 0
    header_bits = 8 * (8 + int.from_bytes(data[:8], "little"))
    for bit in range(header_bits):
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "b").write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
        try:
            with SafetensorsFile(tmp_path / "b") as file:
                for name in file.tensors:
                    file.array(name)
        except NumbaInferError:
            refused += 1
    assert refused > 0.9 * header_bits  # what remains: other names, and dtypes of the same width


def test_missing_and_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(NumbaInferError, match="cannot read"):
            SafetensorsFile(path)
