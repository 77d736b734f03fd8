"""numbainfer beside llama.cpp on the same device: same shape, random weights, int8 here and Q8_0 there.

    pip install ".[llama-cpp]"
    python benchmarks/vs_llama_cpp.py --model llama-3.2-1b

    CMAKE_ARGS="-DGGML_CUDA=on" pip install ".[gpu,llama-cpp]"        for a GPU: takes a compiler, nvcc and an hour
    python benchmarks/vs_llama_cpp.py --model llama-3.2-1b --device cuda -d 128 -n 128

llama.cpp's model is written as a GGUF into a temporary directory.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from compare import arguments, compare, config_of

from numbainfer.converters.gguf_keys import architecture_of, model_keys
from numbainfer.converters.gguf_writer import BLOCK, add_key, gguf_name
from numbainfer.specs import parameter_groups


def write_q8_0(architecture: str, path: Path) -> None:
    """A GGUF of that shape with random Q8_0 matrices and no vocabulary."""
    config = config_of(architecture)
    if config.experts is not None:
        raise SystemExit(f"{architecture} is a mixture of experts: only dense shapes are compared")
    name = architecture_of(config)
    writer = gguf.GGUFWriter(path, name)
    for key, value in model_keys(config, name).items():
        add_key(writer, key, value)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    random = np.random.default_rng(0).integers(-127, 128, 1 << 24, dtype=np.int8)
    for parameter in (p for group in parameter_groups(config) for p in group):
        tensor, _ = gguf_name(parameter.name)
        if parameter.is_matrix:
            rows, width = parameter.shape
            blocks = np.empty((rows * width // BLOCK, 2 + BLOCK), np.uint8)
            blocks[:, :2] = np.full(1, 1 / (73 * width**0.5), np.float16).view(np.uint8)
            blocks[:, 2:] = np.resize(random, rows * width).view(np.uint8).reshape(-1, BLOCK)
            writer.add_tensor(tensor, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            norm = not parameter.name.endswith(".bias")
            writer.add_tensor(tensor, np.full(parameter.shape, float(norm), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A GGUF in llama.cpp, through its C interface."""

    def __init__(self, path: Path, context: int, device: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        on_gpu = device == "cuda"
        if on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise SystemExit("this llama-cpp-python was built without CUDA: see --help")
        model: Any = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = -1 if on_gpu else 0  # -1: all
        self._model = llama_cpp.llama_load_model_from_file(str(path).encode(), model)
        params: Any = llama_cpp.llama_context_default_params()
        params.n_ctx = context + 8
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        if on_gpu:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_new_context_with_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp can't open {path}")
        self._length = 0
        self._random = np.random.default_rng(0)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def reset(self, depth: int) -> None:
        """Leaves `depth` tokens in the cache."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(memory, 0, depth, -1)
        self._length = min(self._length, depth)
        if self._length < depth:
            self.prefill(depth - self._length)

    def prefill(self, count: int) -> None:
        """Appends `count` tokens at once."""
        tokens = self._random.integers(0, self._vocabulary, count).tolist()
        for start in range(0, count, 512):
            part = tokens[start : start + 512]
            array = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(part)))
            if code:
                raise RuntimeError(f"llama_decode failed with {code}")
        llama_cpp.llama_synchronize(self._context)
        self._length += count

    def decode(self, count: int) -> None:
        """Appends `count` tokens one by one."""
        for _ in range(count):
            self.prefill(1)


def main() -> None:
    options = arguments(__doc__ or "", ("cpu", "cuda"))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "random.gguf"
        write_q8_0(options.model, path)
        context = options.depth + max(options.prompt_tokens, options.gen_tokens)
        compare("llama.cpp Q8_0", LlamaCpp(path, context, options.device, options.threads), options)


if __name__ == "__main__":
    main()
