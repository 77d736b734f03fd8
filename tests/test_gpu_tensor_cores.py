"""What products of many tokens take on a GPU: float16 activations, handed from operator to operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from conftest import open_machine
from machine import Machine, assert_within, normal
from numpy.testing import assert_array_equal

from numbainfer.quantization import QuantizedMatrix, QuantizedRows, dequantize

pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")

from numbainfer.gpu.half_rows import HalfRows, pack, padded, unpack
from numbainfer.gpu.linear_mma import linear_mma
from numbainfer.gpu.mma_plan import Plan, choose

TOKENS = [5, 16, 17, 33, 64, 65, 130, 300]  # around the tiles of 16, 32, 64 and 128 tokens


@pytest.fixture
def gpu() -> Machine:
    return open_machine("cuda")


@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (5, 96), (130, 64), (128, 200)])
def test_layout(tokens: int, width: int) -> None:
    """pack and unpack are each other's inverse, and put what half_rows.py says where it says."""
    values = np.rint(100 * normal(1, tokens, width))
    rows = -(-tokens // 128) * 128
    data = pack(values, rows, factor=4.0)
    np.testing.assert_array_equal(unpack(HalfRows(data, tokens, width, 4.0)), values)
    token, column = tokens - 1, width - 3
    block, j, c, e = column // 64, column % 64 // 16, column % 16 // 2, column % 2
    half = data[block, token, 8 * (c ^ token % 8) + 2 * j + e].view(np.float16)
    assert half == values[token, column] / 4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [2, 16, 17, 64, 65, 512, 2048])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (896, 4864), (4096, 14336), (128256, 2048)])
def test_plans_cover_all_tiles(rows: int, columns: int, tokens: int, gated: bool) -> None:
    """Each part of the columns has a block of 64, each row and token a tile."""
    for paired in (False, True):
        plan = choose(rows, columns, tokens, gated, 132, paired)
        tile_rows, tile_tokens = -(-rows // (64 if gated else 128)), -(-tokens // plan.width)
        assert plan.tiles == (tile_rows + tile_rows % 2 if plan.paired else tile_rows) * tile_tokens
        assert padded(tokens) >= plan.width * tile_tokens or plan.width < 128
        assert 1 <= plan.splits <= -(-columns // 64)
        assert plan.shared <= 227 << 10


def weights(machine: Machine, seed: int, rows: int, columns: int, group: int) -> tuple[QuantizedMatrix, np.ndarray]:
    matrix = machine.matrix(0.1 * normal(seed, rows, columns), group)
    return matrix, dequantize(QuantizedMatrix(machine.get(matrix.codes), machine.get(matrix.scales), group))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("width", "hidden", "group"), [(96, 160, 32), (448, 576, 64), (2048, 1280, 128), (5120, 96, 32)]
)
def test_mlp(gpu: Machine, tokens: int, width: int, hidden: int, group: int) -> None:
    """Norm, gate and up with SwiGLU, down with the residual: all of it without one float32 activation between."""
    x, norm = normal(1, tokens, width), 1 + 0.1 * normal(2, width)
    gate_up, wide = weights(gpu, 3, 2 * hidden, width, group)
    down, narrow = weights(gpu, 4, width, hidden, 32)
    bias = normal(5, 2 * hidden)
    device_x, product = gpu.put(x), gpu.out(tokens, 2 * hidden)
    normed = QuantizedRows.empty(gpu.ops.pool, tokens, width, group, 2)
    inner = QuantizedRows.empty(gpu.ops.pool, tokens, hidden, 32, 2)
    gpu.run("rmsnorm", device_x, gpu.put(norm), 1e-5, normed)
    gpu.run("linear", normed, gate_up, gpu.put(bias), None, product)
    gpu.run("swiglu", product, inner)
    gpu.run("linear", inner, down, None, device_x, device_x)

    gates = reference.linear(reference.rmsnorm(x, norm, 1e-5), wide, bias)
    middle = reference.swiglu(gates[:, :hidden], gates[:, hidden:])
    magnitude = reference.linear(abs(middle), abs(narrow)) + abs(x)
    assert_within(gpu.get(device_x), reference.linear(middle, narrow, None, x), 4e-3 * magnitude)
    gpu.close()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 70])
def test_two_products_of_one_input(gpu: Machine, tokens: int) -> None:
    """The second one finds the input in float16 only; one token's operators find no codes and make them."""
    x, norm = normal(1, tokens, 192), np.ones(192, np.float32)
    first, w = weights(gpu, 3, 64, 192, 64)
    second, v = weights(gpu, 4, 96, 192, 64)
    normed = QuantizedRows.empty(gpu.ops.pool, tokens, 192, 64, 2)
    out, other = gpu.out(tokens, 64), gpu.out(tokens, 96)
    gpu.run("rmsnorm", gpu.put(x), gpu.put(norm), 1e-5, normed)
    gpu.run("linear", normed, first, None, None, out)
    gpu.run("linear", normed, second, None, None, other)
    values = reference.rmsnorm(x, norm, 1e-5)
    for result, matrix in ((out, w), (other, v)):
        bound = 2**-11 * reference.linear(abs(values), abs(matrix))
        assert_within(gpu.get(result), reference.linear(values, matrix), bound)
    gpu.close()


def add_to_stream(gpu: Machine, x: np.ndarray, inner: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """x on the GPU, to which a product of `inner` columns is to be added, as soon as anything else is done: what it
    becomes, and by how much it may be off."""
    tokens, width = x.shape
    values, residual = normal(11, tokens, inner), gpu.put(x)
    matrix, w = weights(gpu, 12, width, inner, 32)
    rows = QuantizedRows.empty(gpu.ops.pool, tokens, inner, 32, 2)
    gpu.run("quantize", gpu.put(values), rows)
    gpu.run("linear", rows, matrix, None, residual, residual)
    return residual, reference.linear(values, w, None, x), 2**-11 * (reference.linear(abs(values), abs(w)) + abs(x))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 16, 33, 64])
@pytest.mark.parametrize(("width", "inner"), [(96, 64), (160, 4864), (448, 576), (896, 896), (896, 4864), (2048, 96)])
def test_norm_as_part_of_products(gpu: Machine, tokens: int, width: int, inner: int) -> None:
    """A product added to the residual stream, its norm, and two products of that: one with a bias, one with SwiGLU."""
    norm, bias, eps = 1 + 0.5 * normal(1, width), normal(2, 352), 1e-5
    qkv, q = weights(gpu, 3, 352, width, 32)
    gate_up, g = weights(gpu, 4, 2 * 416, width, 32)
    down, d = weights(gpu, 5, 224, 416, 32)
    normed = QuantizedRows.empty(gpu.ops.pool, tokens, width, 32, 2)
    hidden = QuantizedRows.empty(gpu.ops.pool, tokens, 416, 32, 2)
    out, product, last = gpu.out(tokens, 352), gpu.out(tokens, 2 * 416), gpu.out(tokens, 224)
    device_norm, device_bias = gpu.put(norm), gpu.put(bias)
    residual, expected, bound = add_to_stream(gpu, 3 * normal(6, tokens, width), inner)
    gpu.run("rmsnorm", residual, device_norm, eps, normed)
    gpu.run("linear", normed, qkv, device_bias, None, out)
    gpu.run("linear", normed, gate_up, None, None, product)
    gpu.run("swiglu", product, hidden)
    gpu.run("linear", hidden, down, None, None, last)

    x = gpu.get(residual)
    assert normed.halves.squares is not None
    assert_within(x, expected, bound)
    values = reference.rmsnorm(x, norm, eps)
    assert_within(gpu.get(out), reference.linear(values, q, bias), 2**-11 * reference.linear(abs(values), abs(q)))
    gates = reference.linear(values, g)
    middle = reference.swiglu(gates[:, :416], gates[:, 416:])
    assert_within(gpu.get(last), reference.linear(middle, d), 4e-3 * reference.linear(abs(middle), abs(d)))
    gpu.close()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 40])
def test_norm_that_no_product_takes(gpu: Machine, tokens: int) -> None:
    """Somebody reads the residual stream before; later the norm's codes."""
    norm, x = 1 + 0.5 * normal(1, 160), normal(2, tokens, 160)
    normed = QuantizedRows.empty(gpu.ops.pool, tokens, 160, 32, 2)
    device_norm = gpu.put(norm)
    residual, expected, bound = add_to_stream(gpu, x, 96)
    gpu.run("rmsnorm", residual, device_norm, 1e-5, normed)
    assert_within(gpu.get(residual), expected, bound)
    codes, scales, _ = gpu.get_rows(normed)
    values = reference.rmsnorm(gpu.get(residual), norm, 1e-5)
    assert_within(reference.dequantize(codes, scales), values, np.repeat(1.51 * scales, 32, axis=1) + 1e-5)
    gpu.close()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 40])
def test_codes_of_a_norm_as_part_of_products(gpu: Machine, tokens: int) -> None:
    """A product takes the norm in float16, then experts want its codes."""
    norm = 1 + 0.5 * normal(1, 160)
    normed = QuantizedRows.empty(gpu.ops.pool, tokens, 160, 32, 2)
    router, r = weights(gpu, 3, 32, 160, 32)
    experts, e = weights(gpu, 4, 64, 160, 32)
    logits, out = gpu.out(tokens, 32), gpu.out(tokens, 64)
    device_norm, starts = gpu.put(norm), gpu.put(np.array([0, tokens], np.int32))
    residual, _, _ = add_to_stream(gpu, normal(5, tokens, 160), 96)
    gpu.run("rmsnorm", residual, device_norm, 1e-5, normed)
    gpu.run("linear", normed, router, None, None, logits)
    assert normed.halves.squares is not None
    gpu.run("linear_experts", normed, experts, starts, None, out)
    values = reference.rmsnorm(gpu.get(residual), norm, 1e-5)
    for result, w in ((logits, r), (out, e)):
        assert_within(gpu.get(result), reference.linear(values, w), 2**-11 * reference.linear(abs(values), abs(w)))
    gpu.close()


@pytest.mark.gpu
def test_norm_in_the_memory_of_the_product_before(gpu: Machine) -> None:
    """Its result goes where other blocks of the product still read."""
    x, norm = normal(1, 20, 512), 1 + 0.5 * normal(2, 512)
    matrix, w = weights(gpu, 3, 512, 512, 64)
    rows, residual, out = QuantizedRows.empty(gpu.ops.pool, 20, 512, 64, 2), gpu.put(x), gpu.out(20, 512)
    device_norm = gpu.put(norm)
    gpu.run("quantize", gpu.put(x), rows)
    gpu.run("linear", rows, matrix, None, residual, residual)
    gpu.run("rmsnorm", residual, device_norm, 1e-5, rows)
    gpu.run("linear", rows, matrix, None, None, out)
    values = reference.rmsnorm(gpu.get(residual), norm, 1e-5)
    assert_within(gpu.get(residual), reference.linear(x, w, None, x), 2**-11 * reference.linear(abs(x), abs(w)) + 1e-5)
    assert_within(gpu.get(out), reference.linear(values, w), 2**-11 * reference.linear(abs(values), abs(w)))
    gpu.close()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 33, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (8, 8, 64), (16, 4, 128)])
def test_attention_of_a_batch(gpu: Machine, tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """A token of each of several sequences; what the product after it takes is written in float16 by attention."""
    rng, width = np.random.default_rng(7), heads * head_dim
    lengths = rng.integers(1, 700, tokens)
    lengths[:2] = 1, 700
    table = np.arange(tokens * 11, dtype=np.int32).reshape(tokens, 11)
    k_pages, v_pages = (rng.standard_normal((tokens * 11, kv_heads, 64, head_dim)).astype(np.float16) for _ in range(2))
    keys, values = (
        [
            pages[row].transpose(0, 2, 1, 3).reshape(704, kv_heads, head_dim)[:n]
            for row, n in zip(table, lengths, strict=True)
        ]
        for pages in (k_pages, v_pages)
    )
    qkv = 2 * normal(8, tokens, (heads + 2 * kv_heads) * head_dim)
    matrix, w = weights(gpu, 9, 96, width, 64)
    mixed, out = QuantizedRows.empty(gpu.ops.pool, tokens, width, 64, 2), gpu.out(tokens, 96)
    positions, sequences = (lengths - 1).astype(np.int32), np.arange(tokens, dtype=np.int32)
    pages = (gpu.put(k_pages), gpu.put(v_pages), gpu.put(table))
    gpu.run(
        *("attention", gpu.put(qkv), heads, head_dim**-0.5, 0, gpu.put(positions), gpu.put(sequences)), *pages, mixed
    )
    gpu.run("linear", mixed, matrix, None, None, out)
    q = qkv[:, :width].reshape(tokens, heads, head_dim)
    expected = reference.attention(q, keys, values, sequences, positions).reshape(tokens, width)
    bound = 2**-10 * reference.linear(abs(expected), abs(w))
    assert_within(gpu.get(out), reference.linear(expected, w), bound)
    gpu.close()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 5, 33, 64])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (32, 2, 64), (16, 4, 128)])
def test_rope_as_part_of_attention(
    gpu: Machine, tokens: int, normed: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Tokens apart: attention turns queries and keys and stores these. The same as one after the other."""
    rng, width = np.random.default_rng(7), heads * head_dim
    positions = rng.integers(0, 700, tokens).astype(np.int32)
    positions[:2] = 0, 699
    table = gpu.put(rng.permutation(tokens * 11).astype(np.int32).reshape(tokens, 11))
    pages = [rng.standard_normal((tokens * 11, kv_heads, 64, head_dim)).astype(np.float16) for _ in range(2)]
    qkv = 2 * normal(8, tokens, (heads + 2 * kv_heads) * head_dim)
    norms = [gpu.put(1 + 0.5 * normal(10 + i, head_dim)) if normed else None for i in range(2)]
    angles = rng.uniform(0, 2 * np.pi, (700, head_dim // 2)).astype(np.float32)
    cos, sin = gpu.put(np.cos(angles)), gpu.put(np.sin(angles))
    matrix, _ = weights(gpu, 9, 96, width, 64)
    indices = gpu.put(positions), gpu.put(np.arange(tokens, dtype=np.int32))
    results = []
    for apart in (False, True):
        mixed, out = QuantizedRows.empty(gpu.ops.pool, tokens, width, 64, 2), gpu.out(tokens, 96)
        device, k_pages, v_pages = gpu.put(qkv), *(gpu.put(p) for p in pages)
        gpu.run("rope_and_store", device, heads, *norms, 1e-5, *indices, cos, sin, k_pages, v_pages, table, apart)
        gpu.run("attention", device, heads, head_dim**-0.5, 0, *indices, k_pages, v_pages, table, mixed)
        gpu.run("linear", mixed, matrix, None, None, out)
        results.append([gpu.get(array).astype(np.float64) for array in (out, k_pages, v_pages, device)])
    (expected, keys, values, turned), (actual, own_keys, own_values, untouched) = results
    assert_array_equal(untouched, qkv)
    assert (turned != qkv).any()
    assert_array_equal(own_values, values)
    assert_within(own_keys, keys, 2**-10 * abs(keys) + 1e-4)
    assert_within(actual, expected, 2**-9 * abs(expected).max())
    gpu.close()


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(384, 192, 130), (384, 320, 600), (200, 576, 300), (640, 1088, 256), (16384, 192, 600)],
)
def test_clusters(gpu: Machine, rows: int, columns: int, tokens: int, width: int, splits: int, gated: bool) -> None:
    """Tiles of either width by two blocks: an odd number of rows of tiles, parts of 1 to 17 blocks of columns, more of
    them than the GPU has clusters."""
    if gpu.ops.stream.gpu.capability != (9, 0):
        pytest.skip("no clusters")
    x, residual = normal(1, tokens, columns), normal(2, tokens, rows)
    matrix, w = weights(gpu, 3, rows, columns, 64)
    halves = HalfRows(gpu.put(pack(x, padded(tokens))), tokens, columns)
    tiles = -(-rows // 256) * 2 * -(-tokens // width)
    plan = Plan(width, True, splits, tiles)
    product = reference.linear(x, w)
    if gated:
        hidden = HalfRows(gpu.put(pack(np.zeros((tokens, rows // 2)), padded(tokens), 64.0)), tokens, rows // 2, 64.0)
        linear_mma(gpu.ops.stream, halves, matrix, None, None, hidden, plan)
        data = HalfRows(gpu.get(hidden.data), tokens, rows // 2, 64.0)
        expected = reference.swiglu(product[:, : rows // 2], product[:, rows // 2 :])
        assert_within(unpack(data), expected, 4e-3 * abs(expected).max())
    else:
        out = gpu.out(tokens, rows)
        linear_mma(gpu.ops.stream, halves, matrix, None, gpu.put(residual), out, plan)
        bound = 2**-11 * (reference.linear(abs(x), abs(w)) + abs(residual))
        assert_within(gpu.get(out), product + residual, bound)
    gpu.close()


@pytest.mark.gpu
def test_plans_that_do_not_fit_are_refused(gpu: Machine) -> None:
    """Wider tiles than there are rows for would read and write beyond them."""
    matrix, _ = weights(gpu, 3, 256, 128, 64)
    halves = HalfRows(gpu.put(pack(normal(1, 70, 128), 128)), 70, 128)
    with pytest.raises(ValueError, match="need room for 256 tokens"):
        linear_mma(gpu.ops.stream, halves, matrix, None, None, gpu.out(70, 256), Plan(256, True, 1, 2))
    gpu.close()
