"""Every GPU kernel compiles to PTX and to machine code, without a GPU, and fits what a GPU has."""

from __future__ import annotations

import re
from functools import cache

import pytest

pytest.importorskip("numba_cuda", reason="the gpu extra is not installed")

from numbainfer.gpu.compile import Kernel, all_kernels

ARCHITECTURES = [(8, 0), (9, 0)]
STATIC_SHARED = 48 << 10  # bytes: more has to be dynamic
REGISTERS = 65536  # of a multiprocessor
WARPGROUP = 128  # threads

KERNELS = all_kernels()
TOKENS = [k for k in KERNELS if k.name == "token"]
PRODUCT = next(k for k in KERNELS if k.function.__module__.endswith("mma_kernel") and k.only == (9, 0))


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", KERNELS, ids=[k.symbol for k in KERNELS])
def test_compiles(kernel: Kernel, capability: tuple[int, int]) -> None:
    if kernel.only not in (None, capability):
        pytest.skip(f"the kernel is for sm_{kernel.only[0]}{kernel.only[1]} only")
    cubin = kernel.cubin(capability)
    assert cubin.code[:4] == b"\x7fELF"
    assert cubin.entry.encode() in cubin.code
    assert 0 < cubin.registers * kernel.threads * max(1, kernel.blocks if capability >= (9, 0) else 1) <= REGISTERS
    assert cubin.shared <= STATIC_SHARED
    assert cubin.spills == 0
    assert not cubin.waits
    if kernel.hot:
        assert cubin.stack == 0, "a local array did not fit into registers"


@cache
def ptx(kernel: Kernel) -> str:
    return str(kernel.intermediate((9, 0), "ptx"))


@pytest.mark.parametrize("kernel", TOKENS, ids=lambda k: k.symbol)
def test_one_token_takes_no_double_precision(kernel: Kernel) -> None:
    """A name that is an int32 here and a float32 there is a float64 to Numba."""
    assert ".f64" not in ptx(kernel)


@pytest.mark.parametrize("kernel", [*TOKENS, PRODUCT], ids=lambda k: k.symbol)
def test_registers_suffice(kernel: Kernel) -> None:
    """A warpgroup gives registers that the others take. Who asks for more than the block has waits for ever."""
    given, taken = (
        {int(count) for count in re.findall(rf"setmaxnreg\.{way}\.sync\.aligned\.u32 (\d+)", ptx(kernel))}
        for way in ("dec", "inc")
    )
    assert len(given) == len(taken) == 1
    wanted = WARPGROUP * given.pop() + (kernel.threads - WARPGROUP) * taken.pop()
    assert wanted <= kernel.threads * kernel.cubin((9, 0)).registers


def test_symbols_tell_kernels_apart() -> None:
    names = [(k.function.__module__, k.symbol) for k in KERNELS]
    assert len(set(names)) == len(names)
