"""What the CPU's vector unit can do, and which form of the int8 dot product that means.

Numba compiles for the host, or for what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say (numba's own settings): the
path follows them, so a test can force any path that the machine can run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm
from numba.core import config


@dataclass(frozen=True)
class Isa:
    """The facts of one instruction-set path that kernels depend on.

    name: shown by `numbainfer info`. (The kernel cache's key has the CPU's features, from which it follows.)
    weight_offset: what the dot product adds to each weight byte before multiplying: x86's VNNI multiplies
        unsigned by signed bytes, so weights w become w + 128 there; elsewhere 0.
    half_convert: whether the hardware converts float16 (else it is done with integer arithmetic).
    tile_tokens: how many tokens the GEMM keeps in registers against 32 output rows.
    """

    name: str
    weight_offset: int
    half_convert: bool
    tile_tokens: int


_PATHS = {
    # 32 vector registers of 512 bits: 8 tokens x 2 accumulators, 2 weight vectors, 1 broadcast
    "avx512_vnni": Isa("avx512_vnni", weight_offset=128, half_convert=True, tile_tokens=8),
    # 16 registers of 256 bits: a 16-lane value takes two
    "avx_vnni": Isa("avx_vnni", weight_offset=128, half_convert=True, tile_tokens=2),
    "avx2": Isa("avx2", weight_offset=0, half_convert=True, tile_tokens=2),
    # 32 registers of 128 bits: a 16-lane value takes four
    "neon_dot": Isa("neon_dot", weight_offset=0, half_convert=True, tile_tokens=2),
    "generic": Isa("generic", weight_offset=0, half_convert=False, tile_tokens=2),
}


def _target_features() -> set[str]:
    """The names of the features that code is compiled for, as LLVM spells them."""
    if config.CPU_FEATURES is not None:
        return {f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+")}
    if config.CPU_NAME not in (None, "host", llvm.get_host_cpu_name()):
        return set()  # another CPU's name with no features: only what every machine has is safe to use
    return {name for name, present in llvm.get_host_cpu_features().items() if present}


@lru_cache(maxsize=1)
def detect() -> Isa:
    """The best path for the CPU that Numba compiles for."""
    features = _target_features()
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features:
        return _PATHS["avx512_vnni"]
    if {"avx2", "fma", "f16c"} <= features:
        return _PATHS["avx_vnni" if "avxvnni" in features else "avx2"]
    if {"dotprod", "neon"} <= features:
        return _PATHS["neon_dot"]
    return _PATHS["generic"]
