"""Single PTX instructions as functions for kernels: what `@cuda.jit` Python has no word for.

Each is a Numba intrinsic made of one line of inline PTX (the PTX ISA manual describes every instruction). Addresses
are integers: 64-bit ones of global memory from `address(pointer)`, 32-bit ones of shared memory from
`shared_address(array)`, both in bytes.

griddepcontrol.*, cp.async.bulk.* and mbarrier.try_wait exist from sm_90 on; the rest from sm_80 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic
from numpy import float32

i32, i64, u16, f32 = types.int32, types.int64, types.uint16, types.float32

_CONSTRAINTS = {i32: "r", i64: "l", u16: "h", f32: "f", types.uint32: "r"}
_LLVM = {
    i32: ir.IntType(32),
    i64: ir.IntType(64),
    u16: ir.IntType(16),
    f32: ir.FloatType(),
    types.uint32: ir.IntType(32),
}

target: tuple[int, int] = (9, 0)
"""The compute capability being compiled for; compile.py sets it. Read by the instructions that not all have."""


def _emit(context: Any, builder: Any, text: str, results: list, arguments: list, values: list, *, effects: bool) -> Any:
    """The call of an inline assembly; a value, a struct of values, or nothing."""
    returned = [_LLVM[r] for r in results]
    kind = returned[0] if len(returned) == 1 else ir.LiteralStructType(returned) if returned else ir.VoidType()
    constraints = ["=" + _CONSTRAINTS[r] for r in results] + [_CONSTRAINTS[a] for a in arguments]
    if effects:
        constraints.append("~{memory}")
    attributes = ("convergent",) if effects else ()  # not to be copied into one side of a branch
    function = ir.FunctionType(kind, [value.type for value in values])
    return builder.call(
        ir.InlineAsm(function, text, ",".join(constraints), side_effect=effects), values, attrs=attributes
    )


def instruction(
    text: str,
    result: Any,
    *arguments: Any,
    effects: bool = True,
    minimum: tuple[int, int] = (8, 0),
    only: tuple[int, int] | None = None,
) -> Any:
    """Decorator: a function whose body is `text`, with $0, $1 ... for results and then arguments.

    result: a type, a UniTuple, or types.void. effects: it reads or writes memory that others write, or has to stay
    where it is; False lets the compiler move, merge or drop it. Below `minimum`, and where it is
    not `only`, it does nothing.
    """
    results = [] if result == types.void else list(result.types) if isinstance(result, types.BaseTuple) else [result]

    def decorate(body: Callable) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            if target < minimum or only not in (None, target):
                return context.get_dummy_value()
            out = _emit(context, builder, text, results, list(arguments), list(values), effects=effects)
            if not results:
                return context.get_dummy_value()
            if len(results) == 1:
                return out
            return context.make_tuple(builder, result, [builder.extract_value(out, i) for i in range(len(results))])

        names = ", ".join(body.__code__.co_varnames[: body.__code__.co_argcount])
        namespace = {"sig": result(*arguments), "codegen": codegen}
        source = f"def {body.__name__}(typingctx{', ' if names else ''}{names}):\n    return sig, codegen"
        exec(source, namespace)
        function: Any = namespace[body.__name__]
        function.__doc__ = body.__doc__
        return intrinsic(function)

    return decorate


_i32x4, _f32x4, _f32x2 = (types.UniTuple(t, n) for t, n in ((i32, 4), (f32, 4), (f32, 2)))


# --- addresses ---------------------------------------------------------------------------------------------------


@intrinsic
def address(typingctx, pointer):
    """The 64-bit address that a pointer holds."""
    return types.int64(pointer), lambda context, builder, sig, args: builder.ptrtoint(args[0], ir.IntType(64))


@intrinsic
def words_at(typingctx, address):
    """The pointer to 32-bit integers at an address."""
    kind = types.CPointer(types.int32)
    return kind(types.int64), lambda context, builder, sig, args: builder.inttoptr(args[0], ir.IntType(32).as_pointer())


@intrinsic
def halves_at(typingctx, address):
    """The pointer to 16-bit values at an address."""
    kind = types.CPointer(types.uint16)
    return kind(types.int64), lambda context, builder, sig, args: builder.inttoptr(args[0], ir.IntType(16).as_pointer())


@intrinsic
def advance(typingctx, pointer, count):
    """pointer + count elements"""
    return pointer(pointer, types.int64), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def shared_address(typingctx, array):
    """The 32-bit address of a shared array's start."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        shared = builder.addrspacecast(data, ir.PointerType(data.type.pointee, 3))
        return builder.ptrtoint(shared, ir.IntType(32))

    return types.int32(array), codegen


# --- global memory -----------------------------------------------------------------------------------------------


@instruction("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {$0, $1, $2, $3}, [$4];", _i32x4, i64)
def load_weights(address):
    """16 bytes that nobody writes while the kernel runs, read once: past L1."""


@instruction("ld.global.nc.u16 $0, [$1];", u16, i64)
def load_constant_u16(address):
    """2 bytes that nobody writes while the kernel runs."""


@instruction("ld.global.nc.f32 $0, [$1];", f32, i64)
def load_constant_f32(address):
    """4 bytes that nobody writes while the kernel runs."""


@instruction("ld.global.f32 $0, [$1];", f32, i64)
def load_f32(address):
    """4 bytes of activations."""


@instruction("ld.global.u32 $0, [$1];", i32, i64)
def load_i32(address):
    """4 bytes, as a word."""


@instruction("ld.global.v2.f32 {$0, $1}, [$2];", _f32x2, i64)
def load_f32x2(address):
    """8 bytes of activations."""


@instruction("st.global.f32 [$0], $1;", types.void, i64, f32)
def store_f32(address, value):
    """4 bytes of activations."""


@instruction("st.global.b32 [$0], $1;", types.void, i64, i32)
def store_i32(address, value):
    """4 bytes, as a word."""


@instruction("st.global.v4.b32 [$0], {$1, $2, $3, $4};", types.void, i64, i32, i32, i32, i32)
def store_i32x4(address, a, b, c, d):
    """16 bytes, as words."""


@instruction("ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", _f32x4, i64)
def load_f32x4(address):
    """16 bytes of activations."""


@instruction("ld.global.v4.u32 {$0, $1, $2, $3}, [$4];", _i32x4, i64)
def load_i32x4(address):
    """16 bytes, as words."""


@instruction("st.global.v4.f32 [$0], {$1, $2, $3, $4};", types.void, i64, f32, f32, f32, f32)
def store_f32x4(address, a, b, c, d):
    """16 bytes of activations."""


# --- between blocks that run at the same time: numbers that tell by themselves whether they have come ---------------


@instruction("ld.relaxed.gpu.global.v4.u32 {$0, $1, $2, $3}, [$4];", _i32x4, i64)
def peek_i32x4(address):
    """16 bytes as they stand at this moment, each 4 of them whole."""


@instruction("ld.relaxed.gpu.global.u32 $0, [$1];", i32, i64)
def peek_i32(address):
    """4 bytes as they stand at this moment."""


@instruction("ld.relaxed.gpu.global.u64 $0, [$1];", i64, i64)
def peek_i64(address):
    """8 bytes as they stand at this moment."""


@instruction("st.relaxed.gpu.global.u32 [$0], $1;", types.void, i64, i32)
def post_i32(address, value):
    """4 bytes, for others to peek at."""


@instruction("st.relaxed.gpu.global.u64 [$0], $1;", types.void, i64, i64)
def post_i64(address, value):
    """8 bytes, for others to peek at."""


# --- shared memory -----------------------------------------------------------------------------------------------


@instruction("ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", _i32x4, i32)
def shared_i32x4(address):
    """16 bytes of shared memory, as words."""


@instruction("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", _f32x4, i32)
def shared_f32x4(address):
    """16 bytes of shared memory, as floats."""


@instruction("ld.shared.u32 $0, [$1];", i32, i32)
def shared_i32(address):
    """4 bytes of shared memory."""


@instruction("ld.volatile.shared.u32 $0, [$1];", i32, i32)
def shared_peek_i32(address):
    """4 bytes of shared memory as they stand at this moment."""


@instruction("ld.shared.f32 $0, [$1];", f32, i32)
def shared_f32(address):
    """4 bytes of shared memory, as a float."""


@instruction("ld.shared.u16 $0, [$1];", u16, i32)
def shared_u16(address):
    """2 bytes of shared memory."""


@instruction("ld.shared.u64 $0, [$1];", i64, i32)
def shared_i64(address):
    """8 bytes of shared memory."""


@instruction("st.shared.u64 [$0], $1;", types.void, i32, i64)
def shared_store_i64(address, value):
    """8 bytes to shared memory."""


@instruction("st.shared.u32 [$0], $1;", types.void, i32, i32)
def shared_store_i32(address, value):
    """4 bytes to shared memory."""


@instruction("st.shared.u16 [$0], $1;", types.void, i32, u16)
def shared_store_u16(address, value):
    """2 bytes to shared memory."""


@instruction("st.shared.f32 [$0], $1;", types.void, i32, f32)
def shared_store_f32(address, value):
    """4 bytes to shared memory."""


@instruction("st.shared.v4.f32 [$0], {$1, $2, $3, $4};", types.void, i32, f32, f32, f32, f32)
def shared_store_f32x4(address, a, b, c, d):
    """16 bytes to shared memory, as floats."""


@instruction("st.shared.v4.u32 [$0], {$1, $2, $3, $4};", types.void, i32, i32, i32, i32, i32)
def shared_store_i32x4(address, a, b, c, d):
    """16 bytes to shared memory."""


# --- asynchronous copies from global to shared memory (sm_80) ---------------------------------------------------


@instruction("cp.async.cg.shared.global.L2::256B [$0], [$1], 16;", types.void, i32, i64)
def copy_async_16(to, source):
    """Starts copying 16 bytes past L1, both ends aligned to 16."""


@instruction("cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;", types.void, i32, i64, i32)
def copy_async_16_or_zeros(to, source, size):
    """The same, of the first `size` bytes; zeros for the rest."""


@instruction("cp.async.ca.shared.global [$0], [$1], 4;", types.void, i32, i64)
def copy_async_4(to, source):
    """Starts copying 4 bytes, both ends aligned to 4."""


@instruction("cp.async.commit_group;", types.void)
def copy_async_commit():
    """Closes the group of this thread's copies started since the last commit."""


def copy_async_wait(groups: int) -> Any:
    """The function (for kernels) that waits until at most `groups` of this thread's groups are under way."""

    @instruction(f"cp.async.wait_group {groups};", types.void)
    def wait():
        """Waits for all but the latest groups of copies."""

    return wait


# --- arithmetic --------------------------------------------------------------------------------------------------


@instruction("dp4a.s32.s32 $0, $1, $2, $3;", i32, i32, i32, i32, effects=False)
def dp4a(a, b, c):
    """c + the dot product of the four signed bytes of a and of b."""


@instruction("cvt.f32.f16 $0, $1;", f32, u16, effects=False)
def half_to_float(bits):
    """float16 (its bits) to float32: exact."""


@instruction(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
    _f32x2,
    i32,
    effects=False,
)
def halves_to_floats(bits):
    """Two float16 (low, high) to float32: exact."""


@instruction("cvt.rn.f16.f32 $0, $1;", u16, f32, effects=False)
def float_to_half(value):
    """float32 to float16's bits, to nearest even; infinite from 65520 on."""


@instruction("mov.b32 $0, {0, $1};", f32, u16, effects=False)
def bfloat_to_float(bits):
    """bfloat16 (its bits) to float32: exact."""


@instruction("cvt.rni.s32.f32 $0, $1;", i32, f32, effects=False)
def round_to_int(value):
    """To the nearest integer, ties to even; saturates."""


@instruction("mov.b32 $0, $1;", f32, i32, effects=False)
def as_float(bits):
    """The float32 that has these bits."""


@instruction("mov.b32 $0, $1;", i32, f32, effects=False)
def as_int(value):
    """The bits of a float32."""


LOG2_E = float32(1.4426950408889634)
"""e^x = 2^(x * LOG2_E)"""


@instruction("max.f32 $0, $1, $2;", f32, f32, f32, effects=False)
def larger(a, b):
    """The larger of two numbers that are none of them NaN, in one instruction."""


@instruction("redux.sync.max.u32 $0, $1, 0xffffffff;", i32, i32)
def warp_max_u32(value):
    """The largest of all lanes' numbers, without sign."""


@instruction("redux.sync.max.s32 $0, $1, 0xffffffff;", i32, i32)
def warp_max_i32(value):
    """The largest of all lanes' numbers."""


@instruction("ex2.approx.ftz.f32 $0, $1;", f32, f32, effects=False)
def exp2(value):
    """2^value, to 2 units in the last place."""


@instruction("rcp.approx.ftz.f32 $0, $1;", f32, f32, effects=False)
def reciprocal(value):
    """1 / value, to 1 unit in the last place."""


@instruction("rsqrt.approx.ftz.f32 $0, $1;", f32, f32, effects=False)
def inverse_root(value):
    """1 / sqrt(value), to 2 units in the last place."""


@instruction("shr.s32 $0, $1, $2;", i32, i32, i32, effects=False)
def shift_right(a, n):
    """a >> n in 32 bits: Numba's own is of 64, and the compiler can narrow it only where n is a constant."""


@instruction("div.u32 $0, $1, $2;", i32, i32, i32, effects=False)
def divide(a, b):
    """a // b of numbers that are not negative, in 32 bits: a tenth of the instructions that 64 take."""


@instruction("prmt.b32 $0, $1, $2, $3;", i32, i32, i32, i32, effects=False)
def permute(a, b, selector):
    """Four bytes chosen out of the eight of a (0 to 3) and b (4 to 7), one per hexadecimal digit of the selector."""


# --- for the compiler --------------------------------------------------------------------------------------------


@instruction(r".pragma \22nounroll\22; mov.b32 $0, $1;", i32, i32)
def still(i):
    """i, of which the compiler then knows nothing. `i = still(i)` first in a loop's body keeps the loop as it is: its
    copies would fill the instruction cache."""


# --- pairs of float16 --------------------------------------------------------------------------------------------


@instruction("mov.b32 $0, {$1, $1};", i32, u16, effects=False)
def double_half(bits):
    """A float16 in both halves of a word."""


@instruction("sub.rn.f16x2 $0, $1, $2;", i32, i32, i32, effects=False)
def subtract_halves(a, b):
    """a - b, for two float16 in a word."""


@instruction("mul.rn.f16x2 $0, $1, $2;", i32, i32, i32, effects=False)
def multiply_halves(a, b):
    """a * b, for two float16 in a word."""


@instruction(
    "{ .reg .f32 a, b; min.f32 a, $1, 0f477FE000; max.f32 a, a, 0fC77FE000; min.f32 b, $2, 0f477FE000; "
    "max.f32 b, b, 0fC77FE000; cvt.rn.f16x2.f32 $0, b, a; }",
    *(i32, f32, f32),
    effects=False,
)
def pack_halves(first, second):
    """Two numbers as float16 in a word, the first in its lower half: to nearest even, saturated at 65504."""


@instruction("cvt.rn.f16x2.f32 $0, $2, $1;", i32, f32, f32, effects=False)
def round_halves(first, second):
    """The same, not saturated."""


# --- tensor cores ------------------------------------------------------------------------------------------------


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
    "{$10, $11, $12, $13};",
    *(_f32x4, i32, i32, i32, i32, i32, i32, f32, f32, f32, f32),
    effects=False,
)
def multiply_16x8x16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """c + a @ b of float16 matrices 16 x 16 and 16 x 8, in the registers of a warp: PTX ISA, "matrix fragments for
    mma.m16n8k16"."""


# --- between blocks and kernels ----------------------------------------------------------------------------------


@instruction("atom.add.acq_rel.gpu.global.u32 $0, [$1], $2;", i32, i64, i32)
def fetch_add(address, amount):
    """Adds and returns what stood there; orders this thread's memory accesses around it."""


@instruction("atom.add.relaxed.gpu.global.u32 $0, [$1], $2;", i32, i64, i32)
def add_at(address, amount):
    """Adds and returns what stood there; orders nothing else."""


@instruction("mov.u32 $0, %smid;", i32)
def multiprocessor():
    """The number of the one that runs this; after an interruption it may be another."""


@instruction("mov.u32 $0, %clock;", i32)
def clock():
    """The multiprocessor's cycles, modulo 2^32."""


@instruction("griddepcontrol.wait;", types.void, minimum=(9, 0))
def wait_for_previous_kernel():
    """Dependent launch: returns when the kernels before are complete and their writes visible. Nothing that they
    write may be read before, nor anything written that they read."""


@instruction("griddepcontrol.launch_dependents;", types.void, minimum=(9, 0))
def let_next_kernel_start():
    """Dependent launch: once every block has said so, the next kernel's blocks may start, up to their wait."""
