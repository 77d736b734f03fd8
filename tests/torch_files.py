"""Files as torch.save writes them, made without torch: the zip of today, and the format before PyTorch 1.6."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

# bfloat16 as the uint16 of its bits
_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "uint16": "BFloat16Storage", "int64": "LongStorage"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class TorchPickle:
    """Pickles dicts, lists, tuples, texts, numbers and arrays (as tensors) with protocol 2. `storages`: the arrays.

    An array that comes twice is one storage, as a tied head is.
    """

    def __init__(self, legacy: bool = False) -> None:
        self.legacy = legacy
        self.storages: list[np.ndarray] = []

    def dump(self, value: Any) -> bytes:
        return b"\x80\x02" + self.encode(value) + b"."

    def encode(self, value: Any) -> bytes:
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            if 0 <= value < 256:
                return b"K" + bytes([value])
            if -(2**31) <= value < 2**31:
                return b"J" + struct.pack("<i", value)
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.encode, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(self.encode, value)) + b"e"
        if isinstance(value, dict):
            items = b"".join(self.encode(key) + self.encode(item) for key, item in value.items())
            metadata = b"}" + self.encode("_metadata") + b"}sb"  # set as an attribute, as of a state dict
            return b"ccollections\nOrderedDict\n)R(" + items + b"u" + metadata
        return self.tensor(value)

    def tensor(self, array: np.ndarray) -> bytes:
        index = next((i for i, other in enumerate(self.storages) if other is array), len(self.storages))
        if index == len(self.storages):
            self.storages.append(array)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        kind = b"ctorch\n" + _STORAGES[str(array.dtype)].encode() + b"\n"
        fields = kind + self.encode(str(index)) + self.encode("cpu") + self.encode(array.size)
        storage = b"(" + self.encode("storage") + fields + (b"N" if self.legacy else b"") + b"tQ"
        rest = self.encode(0) + self.encode(array.shape) + self.encode(strides) + b"\x89" + self.encode({})
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def write_torch(path: Path, value: Any) -> Path:
    """A zip as torch.save writes it."""
    pickle = TorchPickle()
    data = pickle.dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for index, array in enumerate(pickle.storages):
            archive.writestr(f"archive/data/{index}", array.tobytes("A"))
        archive.writestr("archive/version", b"3\n")
    return path


def write_legacy_torch(path: Path, value: Any) -> Path:
    """As PyTorch before 1.6 wrote it: pickles and then the storages, end to end."""
    pickle, plain = TorchPickle(legacy=True), TorchPickle()
    content = pickle.dump(value)
    out = io.BytesIO()
    out.write(plain.dump(_LEGACY_MAGIC) + plain.dump(1001))
    out.write(plain.dump({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}))
    out.write(content + plain.dump([str(index) for index in range(len(pickle.storages))]))
    for array in pickle.storages:
        out.write(struct.pack("<q", array.size) + array.tobytes("A"))
    path.write_bytes(out.getvalue())
    return path
