"""Reads a model that `numbainfer convert` wrote, so that it can be converted again: to GGUF, or to another dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from numbainfer.checkpoint import QUANTIZATION_METHOD, Checkpoint, read_json
from numbainfer.converters import tokenizer_files
from numbainfer.converters.source import Array, Source, SourceTensor
from numbainfer.errors import NumbaInferError
from numbainfer.quantization import Matrix, QuantizedMatrix, dequantize
from numbainfer.specs import Parameter, parameter_groups


def open_converted(directory: Path) -> Source:
    """Open a converted directory; int8 matrices come as the float32 that they stand for. Raises NumbaInferError."""
    checkpoint = Checkpoint(directory)
    config = dict(checkpoint.config.raw)
    quantization = config.pop("quantization_config", None)
    if quantization is not None and quantization.get("quant_method") != QUANTIZATION_METHOD:
        raise NumbaInferError(f"{directory / 'config.json'}: quantization_config is not numbainfer's own")
    generation = directory / "generation_config.json"
    return Source(
        path=directory,
        format="numbainfer",
        config=config,
        generation_config=read_json(generation) if generation.is_file() else None,
        tokenizer_files=tokenizer_files.from_directory(directory, config.get("vocab_size")),
        tensors={p.name: _tensor(checkpoint, p) for group in parameter_groups(checkpoint.config) for p in group},
        mappings=[file.mapping for file in checkpoint.files],
    )


def _tensor(checkpoint: Checkpoint, parameter: Parameter) -> SourceTensor:
    name = parameter.name
    if not parameter.is_matrix:
        return SourceTensor(name, parameter.shape, "float32", lambda start, stop: checkpoint.vector([name])[start:stop])
    matrix = checkpoint.matrix([name])
    if isinstance(matrix, Matrix):
        data: Array = matrix.data
        dtype = "bfloat16" if data.dtype == np.uint16 else str(data.dtype)
        return SourceTensor(name, parameter.shape, dtype, lambda start, stop: data[start:stop])
    stored: QuantizedMatrix = matrix

    def read(start: int, stop: int) -> Array:
        return dequantize(QuantizedMatrix(stored.codes[start:stop], stored.scales[start:stop], stored.group))

    return SourceTensor(name, parameter.shape, "float32", read)
