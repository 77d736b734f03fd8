"""One token through the whole model in one kernel: a block on every multiprocessor, from the embedding to the choice.

A layer is five steps: norm and QKV; RoPE, store and attention; attention's output; norm, gate, up and SwiGLU; down.
Every block has a share of each step's rows. Between steps the blocks exchange vectors through global memory, and wait
for each other by nothing else: each number carries in its two lowest bits which one of the vectors that its place has
held it belongs to (a tag), so whoever reads it until the bits are right has the number too. No number is overwritten
too early: every block has rows of every matrix, so who has a step's whole input knows that all blocks are done with the
inputs of the steps before (attention's output is complete only if QKV was, which all blocks wrote).

Weights do not depend on any of this, nor do the keys and values of earlier tokens. One warp of each block does nothing
but copy the block's rows of all matrices and its part of the keys, of all layers, in the order of their use, to a ring
in shared memory, as far ahead as the ring is long: across steps and layers. Another brings what comes after that to the
second-level cache. So memory is busy while blocks wait for each other, and what they wait for finds its weights there.
A third watches for the next step's input, while the 16 that multiply are still busy (token_watch.py).

What a step costs beside its weights are two trips through the second-level cache and a chain of instructions, each of
which needs the one before: it is kept short, and in 32 bits (Numba's integers have 64, unless int32() says that the
rest does not matter).
Steps with one token of int8 models; token_plan.py cuts a model's matrices for it. Needs sm_90: bulk copies.
"""

from __future__ import annotations

from numba import cuda
from numpy import float32, int32, int64, uint32

from numbainfer.gpu.arithmetic import (
    LOG2_E,
    as_int,
    exp2,
    half_to_float,
    reciprocal,
    shift_right,
    warp_max_i32,
    warp_max_u32,
)
from numbainfer.gpu.compile import Kernel, device_function, family, kernel
from numbainfer.gpu.pipeline import (
    arrive_threads,
    barrier_init,
    fence_for_copies,
    fewer_registers,
    more_registers,
    synchronize_threads,
)
from numbainfer.gpu.ptx import (
    add_at,
    address,
    load_constant_f32,
    load_f32x4,
    load_i32,
    multiprocessor,
    peek_i64,
    post_i32,
    post_i64,
    shared_address,
    shared_f32,
    shared_i32,
    shared_i32x4,
    shared_i64,
    shared_store_f32,
    shared_store_i32,
    shared_store_i64,
)
from numbainfer.gpu.select import SMALLEST, key_index, make_key
from numbainfer.gpu.token_attention import make_attention
from numbainfer.gpu.token_input import make_input, tagged
from numbainfer.gpu.token_plan import (
    BIAS,
    COLUMNS,
    HEAD_SHAPE,
    K_PAGES,
    MLP_NORM,
    MULTIPLIED,
    NORM,
    NUMBERS,
    OUTPUT_SHAPE,
    PAGES,
    QUANTIZED,
    ROLE,
    SHAPE,
    UP_BIAS,
    Plan,
)
from numbainfer.gpu.token_products import make_products
from numbainfer.gpu.token_watch import make_watch
from numbainfer.gpu.token_weights import make_movers

QKV, ATTENTION, OUTPUT, GATE_UP, DOWN = range(5)  # the steps of a layer; the head is one more QKV
LAST_INDEX = (1 << 29) - 1  # of a vocabulary


@device_function
def uniform(value):
    """The value, which all lanes have: the compiler sees it now, and that branches on it do not divide a warp."""
    return int32(cuda.shfl_sync(0xFFFFFFFF, int32(value), 0))


@device_function
def largest_of_warp(key):
    """The largest key of the lanes."""
    top, low = int32(key >> 32), int32(key)
    largest = warp_max_i32(top)
    low = warp_max_u32(low if top == largest else int32(0))
    return (int64(largest) << 32) | (int64(low) & int64(0xFFFFFFFF))


@device_function
def tagged_key(key, tag):
    """A key of select.py with two bits of tag below it: it orders as before."""
    index = int64(LAST_INDEX) - int64(key_index(key))
    return (key >> 32 << 32) | (index << 2) | int64(tag)


@family(
    (64, 4, 16, 2048, 2048, 8192, 64, 2048, 972, 12288, 15, 4, 3234, 16),
    (64, 7, 24, 896, 896, 4864, 64, 1216, 1152, 8192, 20, 6, 3234, 16),
    (128, 4, 32, 4096, 4096, 14336, 64, 2048, 1944, 12288, 14, 4, 3234, 16),
)
def _token(*numbers: int) -> Kernel:
    plan = Plan(*numbers)
    warps, threads, slots, copies = plan.warps, 32 * plan.warps, plan.slots, plan.copies
    values, norm_quads, norm_values, code_words = 4 * plan.quads, plan.norm_quads, 4 * plan.norm_quads, 8 * copies
    at_full, at_progress, at_copied, at_table = plan.full, plan.progress, plan.copied, plan.table
    at_shapes, at_role, at_angles, at_squares = plan.shapes, plan.role, plan.angles, plan.squares
    at_own, at_sums = plan.own, plan.sums
    at_pages, at_position, at_before = plan.pages, plan.position, plan.before
    at_keys, at_factor, at_begun, at_page_numbers = plan.keys, plan.factor, plan.begun, plan.page_numbers
    shift = plan.group.bit_length() - 1
    attend, (copy_all, fetch_ahead) = make_attention(plan), make_movers(plan)
    find_pieces, load_part, multiply = make_products(plan)
    (await_numbers, await_parts, embed, quantize), watch = make_input(plan), make_watch(plan)
    # In all what the block has, 96 for each thread: who asks for more waits for ever.
    give_registers, take_registers = fewer_registers(32), more_registers(112)

    @device_function
    def synchronize():
        """All warps that multiply."""
        synchronize_threads(1, threads)

    @device_function
    def largest_of_block(key, keys, warp, lane):
        """The largest key, in every thread. keys: shared int64 [32]."""
        key = largest_of_warp(key)
        if lane == 0:
            keys[warp] = key
        synchronize()
        return largest_of_warp(keys[lane] if lane < warps else SMALLEST)

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
        thread, blocks = int32(cuda.threadIdx.x), int32(cuda.gridDim.x)
        warp, lane = uniform(thread >> 5), int32(thread & 31)

        # All that comes from far at once: nothing else goes on meanwhile.
        sequence, position, turn = sequences[0], positions[0], state[0]
        i = thread
        while i < (layers + 1) * COLUMNS:
            shared_store_i64(memory + at_table + 8 * i, table[i])
            i += threads
        if warp == warps + 3:
            # Which of the blocks this is goes by the multiprocessor: launches put blocks here or there. Each counts one
            # launch of its row. The first to do so finds as many as there were launches, and the row is its own; others
            # take their count back and try the next row (two blocks that see one number, more multiprocessors than
            # blocks). By adding, not by comparing too: that had to wait until it is known how many launches there were.
            row = int32(uint32(uniform(multiprocessor())) % uint32(blocks))
            while True:
                low, high = shapes[row * NUMBERS + lane], shapes[row * NUMBERS + 32 + lane]
                launches, others = address(state) + 4 * (2 + row), int32(0)
                if lane == 0:
                    others = int32(add_at(launches, int32(1)) - turn)
                if uniform(others) == 0:
                    break
                if lane == 0:
                    add_at(launches, int32(-1))
                row = int32(row + 1) if row + 1 < blocks else int32(0)
            shared_store_i32(int32(memory + at_shapes + 4 * lane), low)
            shared_store_i32(int32(memory + at_shapes + 4 * (32 + lane)), high)
            shared_store_i32(int32(memory + at_role + 4 * lane), cuda.shfl_sync(0xFFFFFFFF, high, ROLE - 32))
        if thread < warps:
            shared_store_i32(int32(memory + at_progress + 4 * thread), int32(0))
        pages = address(page_table) + 4 * int64(sequence) * pages_per_sequence
        if thread == 0:
            shared_store_i32(int32(memory + at_copied), int32(0))
            shared_store_i32(int32(memory + at_begun), int32(0))
            shared_store_i64(memory + at_pages, pages)
            shared_store_i32(int32(memory + at_position), position)
            shared_store_i32(int32(memory + at_before), int32(turn * layers))
        i = thread
        while i < slots:
            barrier_init(int32(memory + at_full + 8 * i), 1)
            i = int32(i + threads)
        fence_for_copies()
        cuda.syncthreads()
        if warp >= warps:
            block = uniform(shared_i32(int32(memory + at_role)))
            give_registers()
            if warp == warps:
                copy_all(memory, layers, with_head, lane, block, heads, kv_heads, units_per_key, parts_shift)
            elif warp == warps + 1:
                fetch_ahead(memory, layers, with_head, lane, block, heads, kv_heads, units_per_key, parts_shift)
            elif warp == warps + 2:
                watch(
                    memory, layers, with_head, lane, block, heads, units_per_key, parts_shift, eps,
                    address(x), address(mixed), address(inner),
                )  # fmt: skip
            return
        take_registers()

        i = thread
        while i < min(pages_per_sequence, int32(PAGES)):
            shared_store_i32(int32(memory + at_page_numbers + 4 * i), load_i32(pages + 4 * i))
            i += threads
        i = thread
        while i < half:
            shared_store_f32(memory + at_angles + 4 * i, cos[position * half + i])
            shared_store_f32(memory + at_angles + 4 * (half + i), sin[position * half + i])
            i += threads

        v, weights = cuda.local.array(values, float32), cuda.local.array(norm_values, float32)
        words, word_scales = cuda.local.array(code_words, int32), cuda.local.array(copies, float32)
        layer = int32(0)
        step = int32(QKV)
        # Each lane asks which block this is. What follows from a number that the compiler sees to be the same for all,
        # it keeps in registers that a warp's lanes share: then a token takes 1 to 3% longer.
        at_block = int32(memory + at_role + 4 * lane)
        place = int32(int32(int32(warps - 1) - warp) * 32 + lane)  # the last warps have fewer rows: they post
        while True:
            row_of_table = int32(memory + at_table + 8 * COLUMNS * layer)
            if step == ATTENTION:
                attend(
                    memory, int32(row_of_table + 8 * K_PAGES), layer, shared_i32(at_block), thread, warp, lane,
                    heads, kv_heads, scale, eps, parts_shift, address(qkv), address(mixed), address(part_values),
                    address(part_statistics),
                )  # fmt: skip
                step = int32(OUTPUT)
            # What a step does not set is zero: were it the last step's, it would keep its registers in between.
            for j in range(values):
                v[j] = float32(0)
            for j in range(norm_values):
                weights[j] = float32(0)
            is_head = layer == layers
            turn = int32(shared_i32(int32(memory + at_before)) + layer)  # layers that came before, in all launches
            # m: which shape; the table has columns for QKV, output, gate, up and down.
            m = int32(0) if step == QKV else int32(step - 1)
            k = int32(HEAD_SHAPE) if is_head else m
            first, count, width, log_parts = shared_i32x4(int32(memory + at_shapes + 4 * SHAPE * k))
            of_block = int32(count << log_parts)  # parts
            gated, normed = step == GATE_UP, step == QKV or step == GATE_UP  # noqa: PLR1714 - `in` would be a loop
            bias = shared_i64(int32(row_of_table + 8 * BIAS + 8 * (m + (step == DOWN))))
            early, early_up = float32(0), float32(0)
            if bias != 0 and place < of_block:
                row = int32(first + shift_right(place, log_parts))
                early = load_constant_f32(bias + 4 * row)
                if gated:
                    early_up = load_constant_f32(shared_i64(int32(row_of_table + 8 * UP_BIAS)) + 4 * row)
            if normed:
                norm = shared_i64(int32(row_of_table + 8 * (MLP_NORM if gated else NORM)))
                for j in range(norm_quads):
                    quad = int32(thread + int32(threads * j))
                    four = load_f32x4(norm + 16 * min(quad, int32(int32(width >> 2) - 1)))
                    for b in range(4):
                        weights[4 * j + b] = four[b]

            # Others are still at the step before: time for what needs none of its numbers. `times` slots hold a
            # matrix's pieces of rows, so many `of_slot` each; `number` is the warp's next slot.
            size, log_split, times, inverse = shared_i32x4(int32(memory + at_shapes + 4 * SHAPE * k + 16))
            _, pieces, piece, of_slot = shared_i32x4(int32(memory + at_shapes + 4 * SHAPE * k + 32))
            part = int32(warp & int32((int32(1) << log_parts) - 1))
            start = int32(part * size)
            end, of_row = min(int32(start + size), width), shift_right(part, int32(log_parts - log_split))
            start_in_piece = int32(start - of_row * piece)
            stride = int32(shift_right(int32(warps), log_parts) << log_split)
            number = shared_i32(int32(memory + at_progress + 4 * warp))
            target, target_tag = address(x), int32(turn + turn + (step == DOWN))
            if step == QKV:
                target, target_tag = address(logits) if is_head else address(qkv), turn
            elif gated:
                target, target_tag = address(inner), turn
            target += 4 * int64(first)
            scales_of = int32(row_of_table + 16 * (m + (step == DOWN)) + 8)
            before = int32(first * int32(int32(width >> shift) << 1))
            lead, up_lead = int32(shared_i32(scales_of) + before), int32(shared_i32(int32(scales_of + 16)) + before)

            matrix = stride, piece, start_in_piece, of_slot, inverse, number, gated, lead, up_lead
            first_piece = int32(int32(shift_right(warp, log_parts) << log_split) + of_row)  # of the warp
            find_pieces(memory, first_piece, matrix, warp, lane)

            sources = int32(1)
            if step == OUTPUT:
                sources = shared_i32(int32(memory + at_keys + 20))

            # The step's input, quantized. A norm's factor is the same for all columns: it comes last.
            if step == QKV and layer == 0:
                token_id = tokens[0]
                known = 0 <= token_id < vocabulary
                begin = int64(token_id) * width if known else int64(0)
                embed(embedding, embedding_scales, begin, known, width, v, thread)
                own, own_rows, _, _ = shared_i32x4(int32(memory + at_shapes + 4 * SHAPE * OUTPUT_SHAPE))
                if thread < own_rows:  # the residual of this block's rows stays here
                    at = begin + own + thread
                    value = float32(embedding[at]) * half_to_float(embedding_scales[at >> shift])
                    shared_store_f32(memory + at_own + 4 * thread, value if known else float32(0))
            else:
                source, tag = address(x), int32(turn + turn - (step == QKV))
                if step == OUTPUT:
                    source, tag = address(mixed), turn
                elif step == DOWN:
                    source, tag = address(inner), turn
                if step == OUTPUT and sources > 1:
                    await_parts(source, tag, width, sources, v, thread)
                else:
                    await_numbers(source, tag, width, v, thread)
            squares = float32(0)
            if normed:
                for j in range(norm_quads):
                    quad = int32(thread + int32(threads * j))
                    for b in range(4):
                        if quad < int32(width >> 2):
                            squares += v[4 * j + b] * v[4 * j + b]
                        v[4 * j + b] *= weights[4 * j + b]
            squares = quantize(memory, v, squares, width, thread)
            if lane == 0:
                shared_store_f32(int32(memory + at_squares + 4 * warp), squares)
            synchronize_threads(QUANTIZED, threads + 32)
            if layer == 0 and thread == 0:
                shared_store_i32(int32(memory + at_begun), int32(1))

            # Products: a warp's parts are of the same columns, whose activations stay in registers.
            load_part(memory, words, word_scales, start, end, lane)
            multiply(memory, words, word_scales, first_piece, matrix, int32(end - start), pieces, of_block, warp, lane)
            if lane == 0:
                number = int32(number + (2 * times if gated else times))
                shared_store_i32(int32(memory + at_progress + 4 * warp), number)
            cuda.syncwarp()
            # Who posts nothing goes on to prepare the next step. Not to attention: that writes where others may not yet
            # have read their activations.
            if step == QKV or int32(place & int32(-32)) < of_block:
                synchronize_threads(MULTIPLIED, threads + 32)
            else:
                arrive_threads(MULTIPLIED, threads + 32)

            factor = shared_f32(int32(memory + at_factor)) if normed else float32(1)
            best = SMALLEST
            i = place
            while int32(i & int32(-32)) < of_block:
                value, up = float32(0), float32(0)
                if i < of_block:
                    value = shared_f32(memory + at_sums + 4 * i)
                    if gated:
                        up = shared_f32(memory + at_sums + 4 * (of_block + i))
                across = int32(int32(int32(1) << log_parts) >> 1)
                while across > 0:  # the parts of a row
                    value += cuda.shfl_xor_sync(0xFFFFFFFF, value, across)
                    up += cuda.shfl_xor_sync(0xFFFFFFFF, up, across)
                    across = int32(across >> 1)
                r = shift_right(i, log_parts)
                if i < of_block and i == int32(r << log_parts):  # of the row's first part
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
                        word = tagged(value, target_tag)
                    post_i32(target + 4 * r, word)
                i = int32(i + threads)
            if is_head:
                break
            if step == DOWN:
                layer, step = int32(layer + 1), int32(QKV)
                if layer == layers and with_head == 0:
                    break
            else:
                step = int32(step + 1)

        block = shared_i32(at_block)
        if with_head != 0 and address(history) != 0:
            choices, position = state[1], positions[0]  # block 0 changes them when all have posted theirs
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
            state[0] += 1

    return token
