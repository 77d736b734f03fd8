"""The GGUF reader: types, names, metadata and RoPE factors become what Hugging Face would have."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import source_files as files
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from numbainfer import NumbaInferError
from numbainfer.converters.source import Source, open_source

EMBEDDING = {"token_embd.weight": np.ones((files.VOCAB, files.HIDDEN), np.float32)}


def open_gguf(path: Path) -> Source:
    return open_source(path, require_tokenizer=False)


def test_types(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((6, 512)).astype(np.float32)
    q4_k = rng.integers(0, 256, (6, 2 * 144), dtype=np.uint8)
    q4_k.reshape(6, 2, 144)[..., :4] = np.array([0.5, 0.25], np.float16).view(np.uint8)  # d and dmin
    q8_0 = quantize(floats, Type.Q8_0)
    stored = {
        "ffn_gate": floats,
        "ffn_up": floats.astype(np.float16),
        "attn_v": (quantize(floats, Type.BF16), Type.BF16),
        "ffn_down": (q8_0, Type.Q8_0),
        "attn_output": (q4_k, Type.Q4_K),
    }
    path = files.write_gguf(
        tmp_path / "m", EMBEDDING | {f"blk.0.{name}.weight": tensor for name, tensor in stored.items()}
    )
    tensors = {name.split(".", 3)[-1]: tensor for name, tensor in open_gguf(path).tensors.items()}

    blocks = q8_0.reshape(6, 16, 34)  # a float16 scale, then 32 int8
    by_hand = blocks[..., :2].copy().view(np.float16).astype(np.float32) * blocks[..., 2:].view(np.int8)
    expected = {
        "mlp.gate_proj.weight": ("float32", floats),
        "mlp.up_proj.weight": ("float16", floats.astype(np.float16)),
        "self_attn.v_proj.weight": ("bfloat16", quantize(floats, Type.BF16).view(np.uint16)),
        "mlp.down_proj.weight": ("float32", by_hand.reshape(6, 512)),
        "self_attn.o_proj.weight": ("float32", dequantize(q4_k, Type.Q4_K)),
    }
    for name, (dtype, array) in expected.items():
        assert (tensors[name].dtype, tensors[name].shape) == (dtype, (6, 512))
        for start, stop in ((0, 6), (2, 5), (4, 4)):
            np.testing.assert_array_equal(tensors[name].rows(start, stop), array[start:stop], err_msg=name)


def test_llama_interleaves_quantized_projections_and_biases(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = files.HEADS * files.HEAD_DIM
    weight = rng.standard_normal((rows, 32)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    stored = {
        "blk.0.attn_q.weight": (quantize(files.interleave(weight), Type.Q8_0), Type.Q8_0),
        "blk.0.attn_q.bias": files.interleave(bias),
    }
    source = open_gguf(files.write_gguf(tmp_path / "m", EMBEDDING | stored))
    tensors = source.tensors
    dequantized = dequantize(quantize(weight, Type.Q8_0), Type.Q8_0)
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.q_proj.weight"].rows(5, 17), dequantized[5:17])
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.q_proj.bias"].rows(0, rows), bias)
    assert source.config["attention_bias"]


def test_an_alignment_that_is_too_small(tmp_path: Path) -> None:
    vector = np.array([1, 2, 3], np.float32)
    stored = {"output_norm.weight": (np.zeros(3, np.float16), Type.F16), "blk.0.ffn_norm.weight": vector}
    metadata = files.gguf_metadata() | {"general.alignment": 2}
    tensors = open_gguf(files.write_gguf(tmp_path / "m", EMBEDDING | stored, metadata)).tensors
    rows = tensors["model.layers.0.post_attention_layernorm.weight"].rows(1, 3)
    assert rows.flags.aligned
    np.testing.assert_array_equal(rows, vector[1:])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_is_left_as_it_is(tmp_path: Path, architecture: str) -> None:
    weights = files.weights(tied=False)
    extra = (
        ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"]
        if architecture == "qwen2"
        else ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    )
    for part in extra:
        rows = weights[f"model.layers.0.{part.rsplit('.', 1)[0]}.weight"].shape[0] if "proj" in part else 6
        weights[f"model.layers.0.{part}"] = np.arange(rows, dtype=np.float32)
    metadata = files.gguf_metadata(architecture) | {
        f"{architecture}.attention.key_length": files.HEAD_DIM,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{architecture}.rope.freq_base": 1e6,
    }
    stored = {files.gguf_name(name): array for name, array in weights.items()}
    source = open_gguf(files.write_gguf(tmp_path / "m", stored, metadata, architecture))
    assert source.tensors.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(source.tensors[name].rows(0, len(array)), array)
    assert source.config["architectures"] == [architecture.capitalize() + "ForCausalLM"]
    assert source.config["rope_theta"] == 1e6
    assert source.config["rms_norm_eps"] == 1e-6  # exactly, though the file has a float32
    assert not source.config["tie_word_embeddings"]


def llama3_factors(factor: float, theta: float, dim: int) -> np.ndarray:
    """As convert_hf_to_gguf computes them for Llama 3.1 to 3.3, in float32."""
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_rope_factors(tmp_path: Path) -> None:
    def scaling(factors: np.ndarray) -> dict:
        keys = {
            "llama.attention.key_length": 64,
            "llama.rope.dimension_count": 64,
            "llama.rope.freq_base": 5e5,
        }
        path = tmp_path / f"{factors[-1]}"
        files.write_gguf(path, EMBEDDING | {"rope_freqs.weight": factors}, files.gguf_metadata() | keys)
        return open_gguf(path).config["rope_scaling"]

    for factor in (8.0, 32.0):
        assert scaling(llama3_factors(factor, 5e5, 64)) == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    other = np.linspace(1, 3, 32, dtype=np.float32)
    assert scaling(other) == {"rope_type": "factors", "factors": other.tolist()}
    with pytest.raises(NumbaInferError, match=r"rope_freqs\.weight is not 32 positive"):
        scaling(np.ones(31, np.float32))


def test_rope_scaling_keys(tmp_path: Path) -> None:
    for number, (keys, expected) in enumerate(
        [
            ({"type": "none"}, None),
            ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
            (
                {"type": "yarn", "factor": 4.0, "original_context_length": 32768},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            ),
        ]
    ):
        metadata = files.gguf_metadata() | {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
        source = open_gguf(files.write_gguf(tmp_path / str(number), EMBEDDING, metadata))
        assert source.config.get("rope_scaling") == expected


def test_end_of_generation_tokens(tmp_path: Path) -> None:
    tokens = ["a", "<|im_end|>", "<|endoftext|>", "<|eot_id|>"]
    metadata = files.gguf_metadata() | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            1,
            3,
            3,
            1,
        ],  # the last one is ordinary text
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 0,
    }
    source = open_gguf(files.write_gguf(tmp_path / "m", EMBEDDING, metadata))
    assert source.generation_config == {"bos_token_id": 0, "eos_token_id": [2, 1]}
    assert source.config["eos_token_id"] == 2
    with pytest.raises(NumbaInferError, match="eos_token_id is 9, not a token"):
        open_gguf(files.write_gguf(tmp_path / "n", EMBEDDING, metadata | {"tokenizer.ggml.eos_token_id": 9}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"split.count": 3}, "one of 3 parts of a GGUF, which its name must say"),
        ({"llama.expert_count": 8}, r"llama.expert_count: experts of llama \(Mixtral\) are not supported"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.block_count": 0}, r"llama\.block_count is 0, not"),
        ({"llama.context_length": "long"}, r"llama\.context_length is 'long', not"),
        ({"llama.attention.head_count": [4, 2]}, "head_count is .*the same for all layers"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0, not a positive number"),
        ({"llama.rope.dimension_count": 4}, r"rope\.dimension_count"),
        ({"llama.attention.value_length": 8}, "value_length"),
        ({"llama.rope.scaling.type": "magic"}, r"rope\.scaling\.type is 'magic'"),
        ({"general.alignment": 24}, "alignment is not a power of two"),
        ({"tokenizer.ggml.tokens": ["x"] * 12}, "12 tokens, but token_embd.weight has 11 rows"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, changes: dict, problem: str) -> None:
    metadata = {k: v for k, v in (files.gguf_metadata() | changes).items() if v is not None}
    path = files.write_gguf(tmp_path / "m", EMBEDDING, metadata)
    with pytest.raises(NumbaInferError, match=problem) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"blk.0.strange.weight": np.ones(4, np.float32)}, "'blk.0.strange.weight' is none of"),
        ({"blk.0.attn_q.weight": np.ones((7, 24), np.float32)}, "7 rows, not heads of 6"),
        ({"blk.0.ffn_up.weight": np.ones((2, 4), np.int8)}, "is I8, which can't be dequantized"),
        ({"blk.0.attn_norm.weight": (np.zeros(34, np.uint8), Type.Q8_0)}, "is Q8_0, which can't"),
    ],
)
def test_tensors_that_cannot_be_used(tmp_path: Path, tensors: dict, problem: str) -> None:
    with pytest.raises(NumbaInferError, match=problem):
        open_gguf(files.write_gguf(tmp_path / "m", EMBEDDING | tensors))


def test_other_architectures_and_no_embedding(tmp_path: Path) -> None:
    with pytest.raises(NumbaInferError, match="architecture 'gemma' is not supported"):
        open_gguf(files.write_gguf(tmp_path / "m", EMBEDDING, architecture="gemma"))
    with pytest.raises(NumbaInferError, match=r"token_embd\.weight is missing"):
        open_gguf(files.write_gguf(tmp_path / "n", {"output_norm.weight": np.ones(24, np.float32)}))


@pytest.mark.skipif("NUMBAINFER_TEST_MODELS" not in os.environ, reason="names a folder of real models")
def test_a_real_gguf() -> None:
    source = open_source(Path(os.environ["NUMBAINFER_TEST_MODELS"]) / "smollm2-135m-instruct.gguf")
    assert sum(np.prod(tensor.shape) for tensor in source.tensors.values()) == 134_515_008
    assert source.config["tie_word_embeddings"]
    assert source.config["rope_theta"] == 100_000
    assert source.generation_config is not None
    assert source.generation_config["eos_token_id"] == [2, 0]  # <|im_end|>, <|endoftext|>
    assert source.tokenizer_files
    for tensor in source.tensors.values():
        rows = tensor.rows(0, min(64, tensor.shape[0]))
        assert np.isfinite(rows).all()
        assert 1e-4 < np.abs(rows).max() < 100


def write_split(directory: Path, count: int = 3) -> list[Path]:
    """The parts of a GGUF as llama-gguf-split writes them: the metadata in the first, which need not have tensors."""
    directory.mkdir()
    stored = list(files.as_gguf(files.weights()).items())
    paths = []
    for number, names in enumerate(np.array_split(np.arange(len(stored)), count - 1)):
        paths.append(directory / f"m-{number + 2:05}-of-{count:05}.gguf")
        keys = {"split.no": number + 1, "split.count": count, "split.tensors.count": len(stored)}
        files.write_gguf(paths[-1], dict(stored[i] for i in names), keys)
    first = directory / f"m-00001-of-{count:05}.gguf"
    keys = {"split.no": 0, "split.count": count, "split.tensors.count": len(stored)}
    files.write_gguf(first, {}, files.gguf_metadata() | keys)
    return [first, *paths]


def test_split(tmp_path: Path) -> None:
    paths = write_split(tmp_path / "m")
    expected = files.weights()
    for given in (paths[0], paths[2], tmp_path / "m"):  # any part, or the directory that has nothing else
        with open_gguf(given) as source:
            assert source.tensors.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(source.tensors[name].rows(0, len(array)), array)
    paths[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(NumbaInferError, match=r"m-00002-of-00003\.gguf is missing; is the download complete"):
        open_gguf(paths[0])
    with pytest.raises(NumbaInferError, match="one of 3 parts of a GGUF, which its name must say"):
        open_gguf(tmp_path / "elsewhere.gguf")
    paths[2].rename(paths[1])
    paths[1].with_name("m-00003-of-00003.gguf").write_bytes(paths[1].read_bytes())
    with pytest.raises(NumbaInferError, match=r"m-00002-of-00003\.gguf is part 2 of another GGUF"):
        open_gguf(paths[0])
    files.write_gguf(tmp_path / "m" / "other.gguf", EMBEDDING)
    with pytest.raises(NumbaInferError, match="has several GGUF models; give one of them"):
        open_gguf(tmp_path / "m")


def dequantizable() -> list[Type]:
    """Every type that the library can dequantize, asked of itself."""
    found = []
    for kind in Type:
        with contextlib.suppress(NotImplementedError, KeyError):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            found.append(kind)
    return found


def test_every_type_that_the_library_dequantizes(tmp_path: Path) -> None:
    """Random bits, NaN and all: rows asked for in pieces are the library's whole matrix."""
    kinds = [kind for kind in dequantizable() if kind.name not in ("F32", "F16", "BF16")]
    assert len(kinds) >= 20
    rng = np.random.default_rng(0)
    stored = {}
    for number, kind in enumerate(kinds):
        block, size = GGML_QUANT_SIZES[kind]
        stored[number] = rng.integers(0, 256, (6, 256 // block * size), dtype=np.uint8)
    tensors = {f"blk.{n}.ffn_up.weight": (data, kinds[n]) for n, data in stored.items()}
    source = open_gguf(files.write_gguf(tmp_path / "m", EMBEDDING | tensors))
    for number, kind in enumerate(kinds):
        tensor = source.tensors[f"model.layers.{number}.mlp.up_proj.weight"]
        with np.errstate(all="ignore"):
            expected = dequantize(stored[number], kind)
        for start, stop in ((0, 6), (1, 4), (5, 6)):
            np.testing.assert_array_equal(tensor.rows(start, stop), expected[start:stop], err_msg=kind.name)
