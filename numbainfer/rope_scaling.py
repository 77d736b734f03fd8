"""The RoPE frequencies, and how a config changes them for longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from numbainfer.config_reader import Reader, shown, shown_key


@dataclass(frozen=True)
class RopeScaling:
    """How the RoPE frequencies are changed for longer contexts. kind "default": not at all."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    factors: tuple[float, ...] = ()  # kind "factors": one divisor per frequency, as GGUF files carry them
    attention_factor: float = 1.0  # what cos and sin are multiplied with
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def reach(self) -> int:
        """The positions that a model is stretched to, where that is not its max_position_embeddings; else 0."""
        stretched = self.kind in ("dynamic", "yarn")
        return min(int(self.factor * self.original_max_positions), 2**31 - 1) if stretched else 0


def inverse_frequencies(size: int, theta: float, scaling: RopeScaling, length: int = 0) -> np.ndarray:
    """The angle per position of each pair of a head's first `size` values: float32 [size / 2], scaling applied.

    length: of the sequence, which only "dynamic" depends on. In float32 like HF transformers, whose logits are the
    reference.
    """
    base = _powers(size, theta)
    if scaling.kind == "linear":
        return base / np.float32(scaling.factor)
    if scaling.kind == "factors":
        return base / np.asarray(scaling.factors, np.float32)
    if scaling.kind == "dynamic":
        return _dynamic(size, theta, scaling, length)
    if scaling.kind == "llama3":
        return _llama3(base, scaling)
    if scaling.kind == "yarn":
        return _yarn(size, theta, base, scaling)
    return base


def _powers(size: int, theta: float) -> np.ndarray:
    """theta^(-2 i / size) for i < size / 2."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)


def _dynamic(size: int, theta: float, scaling: RopeScaling, length: int) -> np.ndarray:
    """ "NTK-aware" scaling: a larger theta for a longer sequence, so that the longest wavelength grows with it and the
    shortest stays (u/bloc97 and u/emozilla, 2023)."""
    growth = max(length, scaling.original_max_positions) / scaling.original_max_positions
    stretch = scaling.factor * growth - (scaling.factor - 1)
    return _powers(size, theta * stretch ** (size / (size - 2)))


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept (meta-llama/llama-models, models/llama3/model.py)."""
    wavelength = 2 * math.pi / base
    long = scaling.original_max_positions / scaling.low_freq_factor
    short = scaling.original_max_positions / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / span
    mixed = (1 - smooth) * base / scaling.factor + smooth * base
    scaled = np.where(wavelength > long, base / scaling.factor, mixed)
    return np.where(wavelength < short, base, scaled).astype(np.float32)


def _yarn(size: int, theta: float, base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """YaRN (Peng et al. 2023, section 3.2): pairs that turn more than beta_fast times over the original context are
    kept, those that turn less than beta_slow times are stretched, and between them a ramp over the pairs' numbers."""

    def pair(turns: float) -> float:
        """The pair that turns so many times."""
        return size * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # as transformers does, for a step in place of a ramp
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return (base / np.float32(scaling.factor) * ramp + base * (1 - ramp)).astype(np.float32)


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """What cos and sin are multiplied with, where the config doesn't say: 0.1 ln(factor) + 1 (Peng et al. 2023, eq.
    22); DeepSeek's variant divides two such terms."""

    def term(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return term(mscale) / term(mscale_all_dim) if mscale and mscale_all_dim else term(1.0)


# --- reading it from config.json ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """What config.json says of RoPE: theta, the scaling, and how many values of each head are rotated."""

    theta: float
    scaling: RopeScaling
    size: int


_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "factors": ("factors",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
_LARGEST = 1e9


def read_rope(reader: Reader, head_dim: int, positions: int) -> Rope:
    """From transformers 4's rope_theta and rope_scaling, or 5's rope_parameters. positions: max_position_embeddings."""
    new, old = reader.raw.get("rope_parameters"), reader.raw.get("rope_scaling")
    given = new if new is not None else old if old is not None else {}
    if not isinstance(given, Mapping):
        raise reader.error(f"RoPE parameters must be an object, not {shown(given)}")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise reader.error(f"RoPE scaling {shown(kind)} is not supported ({', '.join(_KEYS)} are)")
    # these three may stand at the top, too
    top = {key: reader.raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in reader.raw}
    values = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **top, **given}
    original = reader.raw.get("original_max_position_embeddings")
    if original is not None and kind in ("llama3", "yarn"):  # there it counts more than what the object has
        values["original_max_position_embeddings"] = original
    for key, value in given.items():
        known = key in _KEYS[kind] or key in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        if not known and value is not None:
            raise reader.error(f"RoPE parameter {shown_key(key)} = {shown(value)} is not supported")
    theta = reader.number("rope_theta", 0.0, 1e15, values)
    share = 1.0
    if values["partial_rotary_factor"] is not None:
        share = reader.number("partial_rotary_factor", 0.0, 1.0, values)
    size = int(head_dim * share)
    if size % 2 or size == 0:
        raise reader.error(f"partial_rotary_factor {share:g} of heads of {head_dim} gives {size} values, not pairs")
    return Rope(theta, _read_scaling(reader, kind, values, theta, size, positions), size)


def _read_scaling(
    reader: Reader, kind: str, values: Mapping[str, Any], theta: float, size: int, positions: int
) -> RopeScaling:
    def number(key: str, default: float | None = None) -> float:
        if values.get(key) is None and default is not None:
            return default
        return reader.number(key, 0.0, _LARGEST, values)

    if kind == "default":
        return RopeScaling()
    if kind == "factors":
        factors = values.get("factors")
        if not isinstance(factors, (list, tuple)) or len(factors) != size // 2:
            raise reader.error(f"RoPE needs {size // 2} factors")
        if not all(type(f) in (int, float) and 0 < f < 1e6 for f in factors):
            raise reader.error("RoPE factors must be positive numbers")
        return RopeScaling("factors", factors=tuple(float(f) for f in factors))
    if kind == "linear":
        return RopeScaling("linear", number("factor"))
    original = int(number("original_max_position_embeddings", float(positions)))
    if kind == "dynamic":
        if original != positions:
            raise reader.error("dynamic RoPE scaling goes by max_position_embeddings, not by another original context")
        if size == 2:
            raise reader.error("dynamic RoPE scaling needs more than one pair of a head")
        factor = number("factor")
        if factor < 1:
            raise reader.error(f"factor must be 1 or more, not {factor:g}")
        return RopeScaling("dynamic", factor, original_max_positions=original)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise reader.error("high_freq_factor must be above low_freq_factor")
        return RopeScaling("llama3", number("factor"), low, high, original)
    if theta <= 1 or original < 1:
        raise reader.error("yarn RoPE scaling needs a rope_theta above 1 and an original context of 1 or more")
    factor = number("factor", positions / original)
    mscales = [number(key) if values.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
    return RopeScaling(
        "yarn",
        factor,
        original_max_positions=original,
        attention_factor=number("attention_factor", yarn_attention_factor(factor, *mscales)),
        beta_fast=number("beta_fast") if values.get("beta_fast") else 32.0,
        beta_slow=number("beta_slow") if values.get("beta_slow") else 1.0,
        truncate=reader.flag("truncate", True, values),
    )
