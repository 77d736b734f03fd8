"""The operators: each declared once, with its contract, and bound to a device.

An operator is declared here as an empty function: its docstring is the contract. `numbainfer/cpu/` and
`numbainfer/gpu/` each define a function of that name with those parameters. `bind(device)` resolves all names once
into a namespace, with the device's stream filled in: `ops.rmsnorm(x, weight, eps, out)`.

Notation: T tokens of one step, which may belong to several sequences; D = hidden size; H query heads, K key/value
heads, d = head size; P pages of 64 positions. Arrays are C-ordered. float32 unless said otherwise.
Every operator writes `out` (or what its contract names) and returns nothing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from numbainfer.device import Device
from numbainfer.errors import NumbaInferError
from numbainfer.memory import MemoryPool
from numbainfer.quantization import Matrix, QuantizedMatrix

if TYPE_CHECKING:
    import numpy as np

CONTRACTS: dict[str, Callable] = {}


def operator(function: Callable) -> Callable:
    """Decorator: declares an operator."""
    CONTRACTS[function.__name__] = function
    return function


@operator
def embedding(stream: Any, tokens: Any, table: Any, out: Any) -> None:
    """out[t] = table[tokens[t]].

    tokens [T] int32; table Matrix or QuantizedMatrix [vocabulary, D]; out [T, D]. Exact (a product for int8).
    Tokens outside the table give rows of zeros.
    """


@operator
def rmsnorm(stream: Any, x: Any, weight: Any, eps: float, out: Any) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row (Zhang & Sennrich 2019, eq. 4).

    x [T, D]; weight [D]; out [T, D], or QuantizedRows [T, D]: then quantized as `quantize` does. `out` may be x.
    """


@operator
def quantize(stream: Any, x: Any, out: Any) -> None:
    """Symmetric integers per group: q = round(x / s), ties to even; zeros where max|x| of the group < 1e-33.

    x [T, D] to QuantizedRows [T, D], scales float32. Two planes: s = max|x| / 32512. One plane:
    s = max(min(max|x|, 4 * rms of the row) / 127, max|x| / 32512). q = 256 * high + low,
    high = floor((q + 128) / 256) and low = max(q - 256 * high, -127).
    """


@operator
def quantize_matrix(stream: Any, x: Any, out: Any, faults: Any) -> None:
    """The codec of quantization.py, for weights.

    x [rows, width] float32, float16 or bfloat16 (uint16) to QuantizedMatrix [rows, width].
    faults [2] int32 is counted up: [0] groups with a NaN or an infinity, [1] groups with values that no float16
    scale reaches (above 65504 * 127). Their codes and scales mean nothing.
    """


@operator
def linear(stream: Any, x: Any, weight: Any, bias: Any, residual: Any, out: Any) -> None:
    """out = x @ weight.T + bias + residual.

    weight Matrix [N, D]: x [T, D] float32. weight QuantizedMatrix [N, D]: x QuantizedRows [T, D] of the same group;
    products of a group, or of parts of one, are summed in int32 exactly, these sums in float32. bias [N] or None;
    residual [T, N] or None, may be `out`. out [T, N]. Tensor cores (more than four tokens on a GPU, weights that are
    not float32) round both sides to float16 instead and sum in float32.
    """


@operator
def rope(stream: Any, x: Any, heads: int, positions: Any, cos: Any, sin: Any) -> None:
    """Rotary position embedding in place (Su et al. 2021, section 3.4), the two halves of a head paired as HF does.

    x [T, heads * d]; positions [T] int32; cos, sin [positions, r / 2], r <= d the rotated part of a head:
    x[i] = x[i] cos - x[i + r/2] sin, x[i + r/2] = x[i + r/2] cos + x[i] sin for i < r/2.
    """


@operator
def rope_and_store(
    stream: Any,
    qkv: Any,
    heads: int,
    q_norm: Any,
    k_norm: Any,
    eps: float,
    positions: Any,
    sequences: Any,
    cos: Any,
    sin: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    apart: bool = False,
) -> None:
    """What happens between the QKV product and attention, fused: per-head RMSNorm of q and k, RoPE, KV store.

    qkv [T, (H + 2 K) * d]: q is rotated in place (k's and v's places keep what they had or the rotated k);
    q_norm, k_norm [d] or None; cos None: no RoPE in this layer. positions, sequences [T] int32. k_pages, v_pages
    [P, K, 64, d] float16 or float32; page_table [sequences, pages] int32: token t of sequence s at position p
    goes to page_table[s, p // 64], slot p % 64. float16 pages: rounded to nearest even, saturated at 65504.
    apart: no two tokens are of one sequence, so none needs another's key. A device may then leave it all, q's rotation
    too, to the `attention` that has to follow.
    """


@operator
def attention(
    stream: Any,
    qkv: Any,
    heads: int,
    scale: float,
    window: int,
    positions: Any,
    sequences: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    out: Any,
) -> None:
    """Causal attention over the KV cache: token t attends to positions 0 to positions[t] of its own sequence, and of
    these to the last `window` where that is not 0 (sliding window: Beltagy et al. 2020, section 3.1).

    out[t, h] = softmax(scale * q[t, h] . k[:, g]) @ v[:, g], g = h // (H / K) (GQA: Ainslie et al. 2023), computed
    with the online softmax (Milakov & Gimelshein 2018; Dao et al. 2022). q is the first H * d columns of
    qkv [T, (H + 2 K) * d]; pages as in rope_and_store; out [T, H * d], or QuantizedRows.
    """


@operator
def softmax(stream: Any, x: Any, out: Any) -> None:
    """out = exp(x - max(x)) / sum, row by row. x, out [T, N]; out may be x."""


@operator
def swiglu(stream: Any, gate_up: Any, out: Any) -> None:
    """out = silu(gate) * up, silu(z) = z / (1 + e^-z) (Shazeer 2020).

    gate_up [T, 2 F], gate first; out [T, F], or QuantizedRows [T, F]: then gate_up may be left as it is, unwritten, if
    the product that was to write it came just before.
    """


@operator
def add(stream: Any, x: Any, y: Any, out: Any) -> None:
    """out = x + y, all [T, D]; out may be x or y."""


@operator
def argmax(stream: Any, x: Any, out: Any) -> None:
    """out[t] = the first index of the largest of x[t]. x [T, N]; out [T] int32. NaN counts as smallest."""


@operator
def greedy(stream: Any, logits: Any, tokens: Any, positions: Any, history: Any) -> None:
    """What one greedy step leaves to the next: tokens[t] = argmax of logits[t], positions[t] += 1.

    logits [T, N]; tokens, positions [T] int32. history [S, T] int32, which the host reads:
    history[positions[t] % S, t] = tokens[t], with the position after it was counted up.
    """


@operator
def top_k(stream: Any, x: Any, values: Any, indices: Any) -> None:
    """The k largest of each row in descending order, the lower index first among equals.

    x [T, N]; values [T, k], indices [T, k] int32; 1 <= k <= N. NaN counts as smallest.
    """


# --- mixtures of experts ---------------------------------------------------------------------------------------
# E experts, k of them chosen for each token. The T * k choices are worked on in the order of their experts: place i
# holds one choice, and the places of expert e are starts[e] to starts[e + 1]. Which expert a token goes to stands in
# arrays that kernels read, so a captured program serves every token.


@operator
def route(stream: Any, logits: Any, renormalise: int, experts: Any, weights: Any) -> None:
    """Each token's k experts: the largest of softmax(logits), the lower index first among equals (Shazeer et al. 2017,
    section 2.1, without the noise).

    logits [T, E]; experts [T, k] int32; weights [T, k]: their probabilities, with `renormalise` divided by their sum.
    """


@operator
def group_by_expert(stream: Any, experts: Any, starts: Any, tokens: Any, places: Any) -> None:
    """Sorts choices by expert, and within an expert by token.

    experts [T, k] int32, all from 0 to E - 1. Written, all int32: starts [E + 1], from 0 to T * k; tokens [T * k]: the
    token of each place; places [T, k]: where each choice went.
    """


@operator
def linear_experts(stream: Any, x: Any, weight: Any, starts: Any, tokens: Any, out: Any) -> None:
    """linear for places: out[i] = x[row] @ weight[e].T for every place i, e being its expert.

    weight Matrix or QuantizedMatrix [E * N, D]: the experts' matrices, one below the other; x float32 or QuantizedRows
    as linear takes them. tokens [places] int32: x is [T, D] and row = tokens[i]; None: x is [places, D] and row = i.
    starts [E + 1] int32; out [places, N]. Only the matrices of experts that have a place are read.
    """


@operator
def combine(
    stream: Any, values: Any, places: Any, weights: Any, shared: Any, gate: Any, residual: Any, out: Any
) -> None:
    """What the experts found, added up: out[t] = residual[t] + sum over j of weights[t, j] * values[places[t, j]], and
    where there is a shared expert + sigmoid(gate[t]) * shared[t].

    values [T * k, D]; places [T, k] int32; weights [T, k]; shared [T, D] and gate [T, 1], or both None; residual and
    out [T, D]; out may be residual.
    """


MIXTURE = ("route", "group_by_expert", "linear_experts", "combine")
"""A backend may lack these: it then runs all models but mixtures of experts."""


# Each backend package also defines what a device needs besides operators:
#   open_stream(device, threads) -> a stream: .threads, .capture() -> a program with .run(),
#       .time(programs) -> seconds that each takes on the device, run once in this order
#   open_allocator(device) -> a memory.Allocator
#   upload(pool, array) -> a NumPy array's values on the device: the array itself where that is possible
#   download(stream, array) -> a device's array as a NumPy array, which lives until the next download
#   shared_array(stream, shape, dtype) -> (the device's array, the same memory as a NumPy array)
#   CHUNK: the most tokens of a step, unless told otherwise: prompts are taken in chunks of this
#   RUNS_AHEAD: whether launches return before they are done
#   mark(stream) -> a function that waits until what was launched so far is done
#   device_name(device) -> what the device calls itself
#   activation_planes(tokens) -> the form of QuantizedRows that its int8 `linear` wants for a step of so many tokens
#   token_step(stream, pool, model) -> None, or what runs a step of one token of this model.Model as a whole:
#       .launch(tokens, positions, sequences, logits, history), where logits and history may be None: not wanted;
#       with history it does what `greedy` does; .release() gives its memory back to the pool
#   BandwidthProbe(stream) -> .measure() gives the memory read bandwidth in bytes/s
_BACKENDS = {"cpu": "numbainfer.cpu", "cuda": "numbainfer.gpu"}


class Operators(SimpleNamespace):
    """All operators bound to one device, and the device's `stream`, `pool` and `device`."""

    backend: ModuleType
    stream: Any
    pool: MemoryPool
    device: Device

    def upload(self, value: Any) -> Any:
        """A NumPy array or a matrix of such, on the device; None stays None. Weights of the CPU stay where they are."""
        if isinstance(value, Matrix):
            return Matrix(self.upload(value.data))
        if isinstance(value, QuantizedMatrix):
            return QuantizedMatrix(self.upload(value.codes), self.upload(value.scales), value.group)
        return None if value is None else self.backend.upload(self.pool, value)

    def download(self, array: Any) -> np.ndarray:
        """A device's array as a NumPy array, after all that was launched; it lives until the next download."""
        return self.backend.download(self.stream, array)

    def __getattr__(self, name: str) -> Any:  # only for the type checker: operators are set by bind()
        raise AttributeError(name)


def backend(kind: str) -> ModuleType:
    """The package that implements the operators for a kind of device ("cpu", "cuda")."""
    try:
        module = importlib.import_module(_BACKENDS[kind])
    except ImportError as error:
        if kind != "cuda":
            raise
        raise NumbaInferError(
            f'--device cuda needs the GPU packages ({error}): pip install "numbainfer[gpu]", or use --device cpu'
        ) from error
    missing = [name for name in CONTRACTS if not hasattr(module, name) and name not in MIXTURE]
    if missing:
        raise NumbaInferError(f"{kind} does not run in this version of numbainfer; use --device cpu")
    return module


def bind(device: Device, threads: int | None = None) -> Operators:
    """The operators of a device, resolved once. `threads`: CPU threads, None for one per physical core."""
    module = backend(device.kind)
    stream = module.open_stream(device, threads)
    bound = {name: partial(getattr(module, name, None) or _refusal(device), stream) for name in CONTRACTS}
    pool = MemoryPool(module.open_allocator(device))
    return Operators(backend=module, stream=stream, pool=pool, device=device, **bound)


def _refusal(device: Device) -> Callable:
    """What stands for an operator of MIXTURE that a backend lacks."""

    def refuse(*arguments: Any) -> None:
        raise NumbaInferError(f"{device} does not run mixtures of experts in this version; use --device cpu")

    return refuse


def parameters(function: Callable) -> list[str]:
    """The parameter names of an operator, to hold an implementation against its contract."""
    return list(inspect.signature(function).parameters)
