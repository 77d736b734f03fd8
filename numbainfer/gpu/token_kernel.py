"""One token through the whole model in one kernel: a block on every multiprocessor, from the embedding to the choice.

A layer is five steps: norm and QKV; RoPE, store and attention; attention's output; norm, gate, up and SwiGLU; down.
Every block has a share of each step's rows. Between steps the blocks exchange vectors through global memory, and wait
for each other by nothing else: each number carries in its two lowest bits which one of the vectors that its place has
held it belongs to (a tag), so whoever reads it until the bits are right has the number too. No number is overwritten
too early: every block has rows of every matrix, so who has a step's whole input knows that all blocks are done with the
inputs of the steps before (attention's output is complete only if QKV was, which all blocks wrote).

Weights do not depend on any of this. One warp of each block does nothing but copy the block's rows of all matrices, of
all layers, in the order of their use, to a ring in shared memory, as far ahead as the ring is long: across steps and
layers. So memory is busy while blocks wait for each other, and what they wait for finds its weights there.

Most of a layer's code runs once in it and has to be fetched first, by estimate 4 to 5 cycles an instruction: it is kept
short.
Steps with one token of int8 models; token_plan.py cuts a model's matrices for it. Needs sm_90: bulk copies.
"""

from __future__ import annotations

from numba import cuda
from numpy import float32, int32, int64, uint16

from numbainfer.gpu.compile import Kernel, device_function, family, kernel
from numbainfer.gpu.pipeline import (
    barrier_init,
    barrier_wait,
    fence_for_copies,
    fewer_registers,
    more_registers,
    synchronize_threads,
)
from numbainfer.gpu.ptx import (
    LOG2_E,
    address,
    as_int,
    divide,
    dp4a,
    exp2,
    half_to_float,
    inverse_root,
    load_constant_f32,
    load_f32x4,
    load_i32,
    peek_i64,
    post_i32,
    post_i64,
    reciprocal,
    shared_address,
    shared_f32,
    shared_f32x4,
    shared_i32x4,
    shared_i64,
    shared_store_f32,
    shared_store_i32,
    shared_store_i32x4,
    shared_store_i64,
    shared_u16,
)
from numbainfer.gpu.reduce import warp_sum
from numbainfer.gpu.select import SMALLEST, key_index, make_key
from numbainfer.gpu.token_attention import make_attention
from numbainfer.gpu.token_input import make_input, tagged
from numbainfer.gpu.token_plan import (
    BIAS,
    COLUMNS,
    HEAD_SHAPE,
    K_PAGES,
    MLP_NORM,
    NORM,
    OUTPUT_SHAPE,
    PAGES,
    SHAPE,
    SHAPES,
    UP_BIAS,
    Plan,
)
from numbainfer.gpu.token_weights import make_copy, uniform

QKV, ATTENTION, OUTPUT, GATE_UP, DOWN = range(5)  # the steps of a layer; the head is one more QKV
LAST_INDEX = (1 << 29) - 1  # of a vocabulary


@device_function
def tagged_key(key, tag):
    """A key of select.py with two bits of tag below it: it orders as before."""
    index = int64(LAST_INDEX) - int64(key_index(key))
    return (key >> 32 << 32) | (index << 2) | int64(tag)


@family(
    (64, 4, 16, 2048, 8192, 64, 2048, 972, 23, 3, 16),
    (64, 7, 24, 896, 4864, 64, 1216, 1152, 21, 3, 16),
    (128, 4, 32, 4096, 14336, 64, 2048, 1944, 11, 3, 16),
)
def _token(*numbers: int) -> Kernel:
    plan = Plan(*numbers)
    warps, threads, slots, slot_bytes, slot_codes = plan.warps, 32 * plan.warps, plan.slots, plan.slot, plan.slot_codes
    copies, quads, norm_quads, widest = plan.copies, plan.quads, plan.norm_quads, plan.widest
    values, norm_values, code_words, slot_words = 4 * quads, 4 * norm_quads, 8 * copies, 4 * copies
    at_full, at_progress, at_table, at_shapes = plan.full, plan.progress, plan.table, plan.shapes
    at_angles, at_squares, at_pages = plan.angles, plan.squares, plan.pages
    at_own, at_sums = plan.own, plan.sums
    at_codes, at_scales = plan.area, plan.scales
    shift = plan.group.bit_length() - 1
    attend, copy_weights = make_attention(plan), make_copy(plan)
    await_numbers, embed, quantize = make_input(plan)
    give_registers, take_registers = fewer_registers(32), more_registers(112)

    @device_function
    def synchronize():
        """All warps but the copying one."""
        synchronize_threads(1, threads)

    @device_function
    def largest_of_block(key, keys, warp, lane):
        """The largest key, in every thread. keys: shared int64 [32]."""
        for step in (16, 8, 4, 2, 1):
            key = max(key, cuda.shfl_xor_sync(0xFFFFFFFF, key, step))
        if lane == 0:
            keys[warp] = key
        synchronize()
        for w in range(warps):
            key = max(key, keys[w])
        return key

    @kernel(
        "i64p i32p i32 i32 i32p i32p i32p i8p u16p i32 i32 i32 i32 f32 f32 i32 f32p f32p i32p i32 i32 "
        "f32p f32p f32p f32p i64p i64p i32p f32p i64p i32p i32",
        threads=threads + 128,  # registers are dealt by warpgroup
        blocks=1,
        hot=True,
        fast=True,
        only=(9, 0),
    )
    def token(
        table, shapes, layers, with_head, tokens, positions, sequences, embedding, embedding_scales,
        vocabulary, heads, kv_heads, units_per_key, scale, eps, half, cos, sin, page_table, pages_per_sequence,
        parts_shift, x, qkv, mixed, inner, part_values, part_statistics, state, logits, best_keys, history,
        history_size,
    ):  # fmt: skip
        memory = shared_address(cuda.shared.array(0, int64, alignment=16))
        keys, block_keys = cuda.shared.array(32, int64), cuda.shared.array(32, int64)
        thread, block, blocks = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        warp, lane = uniform(thread >> 5), thread & 31

        i = thread
        while i < (layers + 1) * COLUMNS:
            shared_store_i64(memory + at_table + 8 * i, table[i])
            i += threads
        if thread < SHAPES:  # the block's share of each shape of matrix
            pairs, log_parts = shapes[4 * thread], shapes[4 * thread + 1]
            width, size = shapes[4 * thread + 2], shapes[4 * thread + 3]
            first = divide(block * pairs, blocks)
            count = int32(divide((block + 1) * pairs, blocks) - first)
            rows = divide(slot_codes, width)
            rows = divide(count - 1, divide(count + rows - 1, rows)) + 1  # of a slot: as many in each
            times = divide(count + rows - 1, rows)
            at = int32(memory + at_shapes + 4 * SHAPE * thread)
            shared_store_i32x4(at, first, count, width, log_parts)
            shared_store_i32x4(int32(at + 16), size, int32(rows), times, int32(divide(65536, rows) + 1))
        if thread < warps:
            shared_store_i32(int32(memory + at_progress + 4 * thread), int32(0))
        i = thread
        while i < slots:
            barrier_init(int32(memory + at_full + 8 * i), 1)
            i = int32(i + threads)
        fence_for_copies()
        cuda.syncthreads()
        if warp >= warps:
            give_registers()
            if warp == warps:
                copy_weights(memory, layers, with_head, lane)
            return
        take_registers()

        position, token_id = positions[0], tokens[0]
        pages = address(page_table) + 4 * int64(sequences[0]) * pages_per_sequence
        if thread == 0:
            shared_store_i64(memory + at_pages, pages)
        i = thread
        while i < min(pages_per_sequence, int32(PAGES)):
            shared_store_i32(int32(memory + at_pages + 16 + 4 * i), load_i32(pages + 4 * i))
            i += threads
        known = 0 <= token_id < vocabulary
        launches, choices = state[0], state[1]
        i = thread
        while i < half:
            shared_store_f32(memory + at_angles + 4 * i, cos[position * half + i])
            shared_store_f32(memory + at_angles + 4 * (half + i), sin[position * half + i])
            i += threads

        v, weights = cuda.local.array(values, float32), cuda.local.array(norm_values, float32)
        words, word_scales = cuda.local.array(code_words, int32), cuda.local.array(copies, float32)
        four_codes, bits = cuda.local.array(slot_words, int32), cuda.local.array(copies, uint16)
        places = cuda.local.array(copies, int32)  # of a part's scales in a slot
        # Of the ring: where the next matrix begins, and how many slots were filled before.
        slot, parity, number = int32(0), int32(0), int32(0)
        turn = int32(launches * layers)  # how many layers came before, in all launches
        last_turn = int32(turn + layers)
        row_of_table = int32(memory + at_table)
        step = int32(QKV)
        while True:
            if step == ATTENTION:
                attend(
                    memory, int32(row_of_table + 8 * K_PAGES), turn, position, block, thread, warp, lane,
                    heads, kv_heads, units_per_key, scale, eps, half, parts_shift, address(qkv), address(mixed),
                    address(part_values), address(part_statistics),
                )  # fmt: skip
                step = int32(OUTPUT)
            # What a step does not set is zero: were it the last step's, it would keep its registers in between.
            for j in range(values):
                v[j] = float32(0)
            for j in range(norm_values):
                weights[j] = float32(0)
            is_head = turn == last_turn
            # m: which shape; the table has columns for QKV, output, gate, up and down.
            m = int32(0) if step == QKV else int32(step - 1)
            k = int32(HEAD_SHAPE) if is_head else m
            first, count, width, log_parts = shared_i32x4(int32(memory + at_shapes + 4 * SHAPE * k))
            of_block = count << log_parts  # parts
            gated, normed = step == GATE_UP, step == QKV or step == GATE_UP  # noqa: PLR1714 - Numba
            bias = shared_i64(int32(row_of_table + 8 * BIAS + 8 * (m + (step == DOWN))))
            early, early_up = float32(0), float32(0)
            if bias != 0 and thread < of_block:
                row = first + (thread >> log_parts)
                early = load_constant_f32(bias + 4 * row)
                if gated:
                    early_up = load_constant_f32(shared_i64(int32(row_of_table + 8 * UP_BIAS)) + 4 * row)
            if normed:
                norm = shared_i64(int32(row_of_table + 8 * (MLP_NORM if gated else NORM)))
                for j in range(norm_quads):
                    quad = int32(thread + int32(threads * j))
                    four = load_f32x4(norm + 16 * min(quad, int32((width >> 2) - 1)))
                    for b in range(4):
                        weights[4 * j + b] = four[b]

            # The step's input, quantized. A norm's factor is the same for all columns: it comes last.
            if step == QKV and row_of_table == memory + at_table:
                start = int64(token_id) * width if known else int64(0)
                embed(embedding, embedding_scales, start, known, width, v, thread)
                own, rows, _, _ = shared_i32x4(int32(memory + at_shapes + 4 * SHAPE * OUTPUT_SHAPE))
                if thread < rows:  # the residual of this block's rows stays here
                    at = start + own + thread
                    value = float32(embedding[at]) * half_to_float(embedding_scales[at >> shift])
                    shared_store_f32(memory + at_own + 4 * thread, value if known else float32(0))
            else:
                source, tag = address(x), int32(turn + turn - (step == QKV))
                if step == OUTPUT:
                    source, tag = address(mixed), turn
                elif step == DOWN:
                    source, tag = address(inner), turn
                await_numbers(source, tag, width, v, thread)
            if normed:
                squares = float32(0)
                for j in range(norm_quads):
                    quad = int32(thread + int32(threads * j))
                    for b in range(4):
                        if quad < width >> 2:
                            squares += v[4 * j + b] * v[4 * j + b]
                        v[4 * j + b] *= weights[4 * j + b]
                squares = warp_sum(squares)
                if lane == 0:
                    shared_store_f32(int32(memory + at_squares + 4 * warp), squares)
            quantize(memory, v, width, thread)
            synchronize()

            # Products: a warp's parts are of the same columns. Their codes stay in registers. Of a matrix, slot number
            # `batch` holds the rows from batch * rows on, and `times` slots hold all; inverse: 65536 / rows.
            size, rows, times, inverse = shared_i32x4(int32(memory + at_shapes + 4 * SHAPE * k + 16))
            start = (warp & ((int32(1) << log_parts) - 1)) * size
            bytes_of_part = min(size, int32(width - start))
            offset = int32(lane << 4)
            for i in range(copies):  # beyond the part: zeros, and any scale of it
                for b in range(8):
                    words[8 * i + b] = int32(0)
                word_scales[i], places[i] = float32(0), int32(slot_codes)
                if int32(offset + int32(512 * i)) < bytes_of_part:
                    at = int32(memory + at_codes + start + offset + 512 * i)
                    a, b, c, d = shared_i32x4(at)
                    words[8 * i], words[8 * i + 1], words[8 * i + 2], words[8 * i + 3] = a, b, c, d
                    a, b, c, d = shared_i32x4(int32(at + widest))
                    words[8 * i + 4], words[8 * i + 5], words[8 * i + 6], words[8 * i + 7] = a, b, c, d
                    group = (start + offset + 512 * i) >> shift
                    word_scales[i] = shared_f32(int32(memory + at_scales + 4 * group))
                    places[i] = int32(slot_codes + 2 * group)
            to, stride = int32(memory + at_sums + 4 * warp), int32(warps >> log_parts)
            scale_row = int32(width >> shift << 1)
            pass_number = int32(0)
            while True:  # gate and up are two passes
                scales = shared_i64(int32(row_of_table + 16 * (m + pass_number + (step == DOWN)) + 8))
                low = int32(int32(scales) + first * scale_row)
                row = warp >> log_parts
                batch = row * inverse >> 16  # row // rows: which slot of the run
                at_slot, of_slot = int32(slot + batch), parity
                while row < count:
                    while at_slot >= slots:
                        at_slot, of_slot = int32(at_slot - slots), int32(of_slot ^ 1)
                    barrier_wait(int32(memory + at_full + 8 * at_slot), of_slot)
                    begin = int32(batch * rows)
                    at = int32(memory + at_slot * slot_bytes)
                    codes_at = int32(at + (row - begin) * width + start + offset)
                    scales_at = int32(at + (row - begin) * scale_row + ((low + begin * scale_row) & 15))
                    for i in range(copies):
                        a, b, c, d = shared_i32x4(int32(codes_at + 512 * i))
                        four_codes[4 * i], four_codes[4 * i + 1] = a, b
                        four_codes[4 * i + 2], four_codes[4 * i + 3] = c, d
                        bits[i] = shared_u16(int32(scales_at + places[i]))
                    total = float32(0)
                    for i in range(copies):
                        if int32(512 * i) < bytes_of_part:
                            high, low_dot = int32(0), int32(0)
                            for b in range(4):
                                high = dp4a(four_codes[4 * i + b], words[8 * i + b], high)
                                low_dot = dp4a(four_codes[4 * i + b], words[8 * i + 4 + b], low_dot)
                            dot = float32((high << int32(8)) + low_dot)
                            total += dot * (half_to_float(bits[i]) * word_scales[i])
                    total = warp_sum(total)
                    row = int32(row + stride)
                    following = row * inverse >> 16
                    if lane == 0:
                        shared_store_f32(to, total)
                        if row < count:
                            shared_store_i32(int32(memory + at_progress + 4 * warp), int32(number + following))
                    at_slot, batch, to = int32(at_slot + following - batch), following, int32(to + 4 * warps)
                slot, number = int32(slot + times), int32(number + times)
                while slot >= slots:
                    slot, parity = int32(slot - slots), int32(parity ^ 1)
                if lane == 0:
                    shared_store_i32(int32(memory + at_progress + 4 * warp), number)
                if not gated or pass_number == 1:
                    break
                pass_number, to = int32(1), int32(memory + at_sums + 4 * (of_block + warp))
            synchronize()

            factor = float32(1)
            if normed:
                squares = float32(0)
                for w in range(warps // 4):
                    four = shared_f32x4(int32(memory + at_squares + 16 * w))
                    squares += (four[0] + four[1]) + (four[2] + four[3])
                factor = inverse_root(squares / float32(width) + eps)
            target, tag = address(x), int32(turn + turn + (step == DOWN))
            if step == QKV:
                target, tag = address(logits) if is_head else address(qkv), turn
            elif gated:
                target, tag = address(inner), turn
            best = SMALLEST
            i = thread
            while (i & int32(-32)) < of_block:
                value, up = float32(0), float32(0)
                if i < of_block:
                    value = shared_f32(int32(memory + at_sums + 4 * i))
                    if gated:
                        up = shared_f32(int32(memory + at_sums + 4 * (of_block + i)))
                across = int32(1) << log_parts >> 1
                while across > 0:  # the parts of a row
                    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, across)
                    up += cuda.shfl_xor_sync(0xFFFFFFFF, up, across)
                    across >>= 1
                r = int32(i >> log_parts)
                if i < of_block and i == r << log_parts:
                    value = value * factor + early  # where there is a bias, all rows are of this turn of the loop
                    if gated:
                        power = exp2(value * -LOG2_E)
                        value = value * reciprocal(float32(1) + power) * (up * factor + early_up)
                    elif step != QKV:
                        at = int32(memory + at_own + 4 * r)
                        value += shared_f32(at)
                        shared_store_f32(at, value)
                    word = as_int(value)
                    if is_head:
                        best = max(best, make_key(value, first + r))
                    else:
                        word = tagged(value, tag)
                    post_i32(target + 4 * int64(first + r), word)
                i = int32(i + threads)
            if is_head:
                break
            if step == DOWN:
                turn, step, row_of_table = int32(turn + 1), int32(QKV), int32(row_of_table + 8 * COLUMNS)
                if turn == last_turn and with_head == 0:
                    break
            else:
                step = int32(step + 1)

        if with_head != 0 and address(history) != 0:
            best, tag = largest_of_block(best, keys, warp, lane), choices & 3
            if thread == 0:
                post_i64(address(best_keys) + 8 * block, tagged_key(best, tag))
            if block == 0:
                best = SMALLEST
                if thread < blocks:
                    best = peek_i64(address(best_keys) + 8 * thread)
                    while best & 3 != tag:
                        best = peek_i64(address(best_keys) + 8 * thread)
                best = largest_of_block(best, block_keys, warp, lane)
                if thread == 0:
                    chosen = int32(int64(LAST_INDEX) - ((best & int64(0xFFFFFFFF)) >> 2))
                    tokens[0], positions[0] = chosen, position + 1
                    history[(position + 1) % history_size] = chosen
                    state[1] = choices + 1
        if block == 0 and thread == 0:
            state[0] = launches + 1

    return token
