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


i32x4, f32x4, f32x2 = (types.UniTuple(t, n) for t, n in ((i32, 4), (f32, 4), (f32, 2)))


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


@instruction("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {$0, $1, $2, $3}, [$4];", i32x4, i64)
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


@instruction("ld.global.v2.f32 {$0, $1}, [$2];", f32x2, i64)
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


@instruction("ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", f32x4, i64)
def load_f32x4(address):
    """16 bytes of activations."""


@instruction("ld.global.v4.u32 {$0, $1, $2, $3}, [$4];", i32x4, i64)
def load_i32x4(address):
    """16 bytes, as words."""


@instruction("st.global.v4.f32 [$0], {$1, $2, $3, $4};", types.void, i64, f32, f32, f32, f32)
def store_f32x4(address, a, b, c, d):
    """16 bytes of activations."""


# --- between blocks that run at the same time: numbers that tell by themselves whether they have come ---------------


@instruction("ld.relaxed.gpu.global.v4.u32 {$0, $1, $2, $3}, [$4];", i32x4, i64)
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


@instruction("ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", i32x4, i32)
def shared_i32x4(address):
    """16 bytes of shared memory, as words."""


@instruction("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", f32x4, i32)
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
