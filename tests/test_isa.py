"""The instruction-set paths that this machine can be told to take: the same tests, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from numbainfer.cpu import dot
from numbainfer.cpu.isa import detect
from numbainfer.cpu.simd import I8x64, I32x16

# What differs by path: the int8 dot product (rows and tiles), float16 both ways, and the functions of vectors
# (fused multiply-add, rounding, e^x), which LLVM may turn into calls where there is no instruction.
TESTS = [
    "test_linear.py::test_int8_sums_of_the_largest_codes_are_exact",
    "test_linear.py::test_int8_sums_of_two_full_planes_do_not_overflow",
    "test_linear.py::test_rows_for_fewer_tokens_than_the_memory_holds",
    "test_linear.py::test_float_weights[cpu-100-5-float16]",
    "test_operators.py::test_embedding[cpu-100-float16]",
    "test_operators.py::test_quantize[cpu-96-32-9-2]",
    "test_operators.py::test_quantize_matrix_at_the_ends_of_float16[cpu-float32]",
    "test_operators.py::test_quantize_matrix_counts_groups_that_are_not_finite[cpu-nan0-float16]",
    "test_operators.py::test_quantize_matrix_counts_groups_that_are_not_finite[cpu-inf-float16]",
    "test_operators.py::test_swiglu[cpu-72-3]",
    "test_attention.py::test_float16_store_rounds_to_nearest_even_and_saturates",
    "test_attention.py::test_attention[cpu-4-1-20-page boundaries in one batch-float16]",
    "test_launch.py::test_a_program_runs_when_told_in_order_and_again",
]
RUN = """
import sys, pytest
from numbainfer.cpu.isa import detect
assert detect().name == sys.argv[1], detect().name
sys.exit(pytest.main(["-m", "not gpu", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def passes(path: str, cpu: str, features: str) -> None:
    here = Path(__file__).parent
    tests = [str(here / test) for test in TESTS]
    done = subprocess.run(
        [sys.executable, "-c", RUN, path, *tests],
        env=os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_generic() -> None:
    """A CPU of which nothing is known: no float16 conversion, no fused multiply-add, no int8 dot product."""
    passes("generic", "generic", "")


@pytest.mark.parametrize("path", ["avx2", "avx_vnni"])
def test_avx2(path: str) -> None:
    features = llvm.get_host_cpu_features()
    needed = ["avx2", "fma", "f16c"] + (["avxvnni"] if path == "avx_vnni" else [])
    if not all(features.get(name) for name in needed):
        pytest.skip(f"this CPU has no {needed[-1]}")
    hidden = ("avx512", "avx10", "amx") + (("avxvnni",) if path == "avx2" else ())
    without = (
        f"{'+' if present and not name.startswith(hidden) else '-'}{name}" for name, present in sorted(features.items())
    )
    passes(path, llvm.get_host_cpu_name(), ",".join(without))


@pytest.mark.parametrize(
    ("path", "triple", "features", "instruction", "count"),
    [
        ("avx512_vnni", "x86_64-unknown-linux-gnu", "+avx512f,+avx512bw,+avx512vl,+avx512vnni", "vpdpbusd", 1),
        ("avx_vnni", "x86_64-unknown-linux-gnu", "+avx2,+fma,+f16c,+avxvnni", "vpdpbusd", 2),
        ("avx2", "x86_64-unknown-linux-gnu", "+avx2,+fma,+f16c", "vpmaddubsw", 2),
        ("neon_dot", "aarch64-unknown-linux-gnu", "+neon,+dotprod", "sdot", 4),
        ("generic", "riscv64-unknown-linux-gnu", "+m,+f,+d", "mul", 64),
    ],
)
def test_the_dot_product_compiles_for_its_instruction_set(
    path: str, triple: str, features: str, instruction: str, count: int
) -> None:
    """On any machine: the int8 dot product of 64 bytes is so many of its path's instructions."""
    module = ir.Module()
    module.triple = triple
    pointers = [kind.llvm.as_pointer() for kind in (I32x16, I8x64, I8x64)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    acc, w, x = (builder.load(pointer) for pointer in function.args)
    builder.store(dot._DOTS[path](builder, acc, w, x), function.args[0])
    builder.ret_void()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(features=features)
    code = machine.emit_assembly(llvm.parse_assembly(str(module)))
    assert len(re.findall(rf"^\s+(?:{{vex}}\s+)?{instruction}w?\s", code, re.MULTILINE)) == count


def test_the_path_is_the_best_that_the_machine_has() -> None:
    features = llvm.get_host_cpu_features()
    best = {"avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni", "avx2": "avx2", "dotprod": "neon_dot"}
    expected = next((path for feature, path in best.items() if features.get(feature)), "generic")
    if "NUMBA_CPU_NAME" in os.environ or "NUMBA_CPU_FEATURES" in os.environ:
        pytest.skip("Numba is told to compile for another machine")
    assert detect().name == expected
