"""A layer's mixture of experts: its weights, its workspace, and the operators that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from numbainfer.checkpoint import Weights
from numbainfer.config import Experts, ModelConfig
from numbainfer.memory import MemoryPool
from numbainfer.quantization import AnyMatrix, QuantizedMatrix
from numbainfer.registry import Operators


@dataclass
class Mixture:
    """The weights of one layer's E experts; the shared one's None where the family has none."""

    router: AnyMatrix  # [E, D]
    gate_up: AnyMatrix  # [E * 2 F, D]: each expert's gate and up
    down: AnyMatrix  # [E * D, F]
    shared_gate_up: Any  # [2 S, D]
    shared_down: Any  # [D, S]
    shared_gate: Any  # [1, D]


def read_mixture(weights: Weights, experts: Experts, at: str) -> Mixture:
    """The mixture whose tensors' names begin with `at`."""

    def matrix(*names: str) -> AnyMatrix:
        return weights.matrix([f"{at}.{name}.weight" for name in names])

    numbers, shared = range(experts.count), bool(experts.shared_size)
    return Mixture(
        router=matrix("gate"),
        gate_up=matrix(*(f"experts.{e}.{name}" for e in numbers for name in ("gate_proj", "up_proj"))),
        down=matrix(*(f"experts.{e}.down_proj" for e in numbers)),
        shared_gate_up=matrix("shared_expert.gate_proj", "shared_expert.up_proj") if shared else None,
        shared_down=matrix("shared_expert.down_proj") if shared else None,
        shared_gate=matrix("shared_expert_gate") if shared else None,
    )


class MixtureWorkspace:
    """What a mixture's operators write, for steps of up to `chunk` tokens; every layer uses the same."""

    def __init__(self, pool: MemoryPool, config: ModelConfig, chunk: int) -> None:
        assert config.experts is not None
        experts, hidden, k = config.experts, config.hidden_size, config.experts.per_token
        self.normed = pool.empty((chunk, hidden), np.float32)
        self.logits = pool.empty((chunk, experts.count), np.float32)
        self.chosen, self.places = (pool.zeros((chunk, k), np.int32) for _ in range(2))
        self.weights = pool.empty((chunk, k), np.float32)
        self.starts, self.tokens = pool.zeros(experts.count + 1, np.int32), pool.zeros(chunk * k, np.int32)
        self.gate_up = pool.empty((chunk * k, 2 * experts.size), np.float32)
        self.values = pool.empty((chunk * k, hidden), np.float32)
        shared = experts.shared_size
        self.shared_gate_up: Any = pool.empty((chunk, 2 * shared), np.float32) if shared else None
        self.shared: Any = pool.empty((chunk, hidden), np.float32) if shared else None
        self.shared_gate: Any = pool.empty((chunk, 1), np.float32) if shared else None

    def release(self, pool: MemoryPool) -> None:
        for array in vars(self).values():
            if array is not None:
                pool.release(array)


def mix(
    ops: Operators,
    config: ModelConfig,
    mixture: Mixture,
    norm: Any,
    x: Any,
    space: MixtureWorkspace,
    input_of: Callable[..., Any],
) -> None:
    """x += what the experts find in rmsnorm(x). x [T, D]; input_of: Model._input."""
    assert config.experts is not None
    T, k = x.shape[0], config.experts.per_token
    normed, starts, tokens, places = space.normed[:T], space.starts, space.tokens[: T * k], space.places[:T]
    chosen, weights, gate_up, values = (
        space.chosen[:T],
        space.weights[:T],
        space.gate_up[: T * k],
        space.values[: T * k],
    )

    ops.rmsnorm(x, norm, config.norm_eps, normed)
    ops.linear(normed, mixture.router, None, None, space.logits[:T])
    ops.route(space.logits[:T], int(config.experts.renormalise), chosen, weights)
    ops.group_by_expert(chosen, starts, tokens, places)
    source = normed
    if isinstance(mixture.gate_up, QuantizedMatrix):
        source = input_of(mixture.gate_up, "experts_in", T)
        ops.quantize(normed, source)
    ops.linear_experts(source, mixture.gate_up, starts, tokens, gate_up)
    hidden = input_of(mixture.down, "experts_hidden", T * k, len(space.values))
    ops.swiglu(gate_up, hidden)
    ops.linear_experts(hidden, mixture.down, starts, None, values)
    if mixture.shared_gate is None:
        ops.combine(values, places, weights, None, None, x, x)
        return
    hidden = input_of(mixture.shared_down, "shared_hidden", T)
    ops.linear(source, mixture.shared_gate_up, None, None, space.shared_gate_up[:T])
    ops.swiglu(space.shared_gate_up[:T], hidden)
    ops.linear(hidden, mixture.shared_down, None, None, space.shared[:T])
    ops.linear(normed, mixture.shared_gate, None, None, space.shared_gate[:T])
    ops.combine(values, places, weights, space.shared[:T], space.shared_gate[:T], x, x)
