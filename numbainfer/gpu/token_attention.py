"""The attention step of the whole-token kernel: RoPE, the store into the cache, and attention over it.

A block is one unit of query heads, which share a key/value head, and one part of the keys; most blocks have none where
the text is short. Earlier tokens' keys and values come through the ring, as weights do, long before they are needed
(token_weights.py). Of a short text, each part has an area of the result, and who needs it adds them up
(token_input.py). Of a long one, each block leaves its part's sums to the others, as pairs of a number and of the turn
that it belongs to, and the first ones of a unit merge some columns of all parts each.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numpy import float32, int32, int64, uint32

from numbainfer.gpu.arithmetic import (
    LOG2_E,
    as_float,
    as_int,
    divide,
    exp2,
    float_to_half,
    half_to_float,
    inverse_root,
    reciprocal,
    shift_right,
    warp_max_i32,
)
from numbainfer.gpu.attention_core import KEYS, NOTHING, make_core, make_loads
from numbainfer.gpu.compile import device_function
from numbainfer.gpu.pipeline import barrier_wait, synchronize_threads
from numbainfer.gpu.ptx import (
    halves_at,
    load_constant_f32,
    peek_i32,
    peek_i64,
    post_i32,
    post_i64,
    shared_f32,
    shared_i32,
    shared_i32x4,
    shared_i64,
    shared_peek_i32,
    shared_store_f32,
    shared_store_i32,
    shared_store_u16,
    words_at,
)
from numbainfer.gpu.reduce import warp_sum
from numbainfer.gpu.rope import PAGE, PAGE_BITS, saturated
from numbainfer.gpu.token_input import tagged
from numbainfer.gpu.token_plan import AREAS, K_PAGES, MERGED_ROWS, Q_NORM, ROTATED, V_PAGES, WINDOW, Plan
from numbainfer.gpu.token_weights import make_in_ring


@device_function
def ordered(bits):
    """The bits of a float32 as an int32 that orders as it does; and back."""
    return int32(bits ^ int32(int32(bits >> 31) & int32(0x7FFFFFFF)))


@device_function
def marked(value, mark):
    """A number and the turn that it belongs to, in 64 bits."""
    return (mark << 32) | (int64(as_int(value)) & 0xFFFFFFFF)


def make_attention(plan: Plan) -> Any:
    """The step as a device function of the whole block."""
    head_dim, shared, threads = plan.head_dim, plan.shared, 32 * plan.warps
    layout, core = plan.attention, make_core(plan.head_dim, plan.shared, plan.attending)
    compare, soften, add_values, write_piece, dimension = (
        core.compare,
        core.soften,
        core.add_values,
        core.write_piece,
        core.dimension,
    )
    in_ring, at_keys = make_in_ring(plan.slots), plan.keys
    slot_bytes, half_chunk, halves = plan.slot, plan.chunk // 2, plan.halves
    attending, at_full, at_progress = plan.attending, plan.full, plan.progress
    at_copied = plan.copied
    area, at_angles = plan.area, plan.angles
    at_pages, at_position, at_before = plan.pages, plan.position, plan.before
    at_queries, row_bytes = plan.area + layout.queries, layout.row
    at_key, at_value = plan.area + 4 * shared * head_dim, plan.area + 4 * (shared + 1) * head_dim
    at_values, piece_bytes = plan.area + layout.values, layout.piece
    at_tops, at_totals = plan.area + layout.tops, plan.area + layout.totals
    head_shift = head_dim.bit_length() - 1
    width, words, per_lane, sums = shared * head_dim, head_dim // 4, head_dim // 32, head_dim // 4
    rounds, asks_first = -(-width // threads), plan.asks_first
    warps, at_rows, columns_shift = plan.warps, plan.area + MERGED_ROWS, plan.columns_shift

    @device_function
    def await_head(v, source, tag, lane):
        """One warp: a head from global memory, as soon as it has come, elements lane + 32 j."""
        late = int32(3)
        while late & 3:
            late = int32(0)
            for j in range(per_lane):
                bits = peek_i32(source + 4 * (lane + 32 * j))
                late |= bits ^ tag
                v[j] = as_float(bits)

    @device_function
    def turn_head(memory, v, norm, weights, eps, rotated, lane):
        """One warp: its norm and rotation (Su et al. 2021): element i goes with i + d / 2, which the lane has too."""
        if norm != 0:
            squares = float32(0)
            for j in range(per_lane):
                squares += v[j] * v[j]
            factor = inverse_root(warp_sum(squares) / float32(head_dim) + eps)
            for j in range(per_lane):
                v[j] *= factor * weights[j]
        if rotated:
            for j in range(per_lane // 2):
                at = int32(memory + at_angles + 4 * (lane + 32 * j))
                cos, sin = shared_f32(at), shared_f32(int32(at + 2 * head_dim))
                first, second = v[j], v[j + per_lane // 2]
                v[j], v[j + per_lane // 2] = first * cos - second * sin, second * cos + first * sin

    @device_function
    def row_at(start, base, end, i, offset):
        """In the chunk that begins at `start`, with key `base`."""
        return int32(start + 2 * head_dim * min(int32(i), int32(end - base - 1)) + offset)

    load_keys, load_values = make_loads(head_dim, shared_i32x4, row_at)

    @device_function
    def await_half(memory, first, half):
        """Where a half of a chunk is, as soon as it has come."""
        turns = int32(uint32(half) // uint32(halves))
        filled = int32(first + turns)
        while shared_peek_i32(int32(memory + at_copied)) <= filled:  # its slot's filling before may be under way
            pass
        slot, parity = in_ring(filled)
        barrier_wait(int32(memory + at_full + 8 * slot), parity)
        return int32(memory + slot * slot_bytes + half_chunk * int32(half - turns * halves))

    @device_function
    def attend(memory, first, behind, start, end, lowest, warp, lane):
        """A warp: every `attending`-th chunk of the part's keys. first: the slot of the first chunk; behind: the slot
        behind the last one. Writes the warp's piece."""
        acc, scores = cuda.local.array(sums, float32), cuda.local.array(8, float32)
        k, v = cuda.local.array(words, int32), cuda.local.array(words, int32)
        for i in range(sums):
            acc[i] = float32(0)
        top, total = float32(NOTHING), float32(0)
        chunk, base = warp, int32(start + KEYS * warp)
        while base < end:
            half = int32(2 * chunk)
            at = await_half(memory, first, half)
            load_keys(k, at, base, end, lane)
            compare(memory + area, k, scores, lane)
            at = int32(at + half_chunk) if halves % 2 == 0 else await_half(memory, first, int32(half + 1))
            load_values(v, at, base, end, lane)
            top, decay = soften(scores, top, base, end, lowest, lane)
            cuda.syncwarp()  # all lanes have read
            chunk, base = int32(chunk + attending), int32(base + KEYS * attending)
            if lane == 0:
                following = int32(first + int32(uint32(2 * chunk) // uint32(halves)))
                shared_store_i32(int32(memory + at_progress + 4 * warp), following if base < end else behind)
            total *= decay
            for i in range(4):
                total += scores[i]
            add_values(acc, v, scores, decay, lane)
        write_piece(memory + area, acc, top, total, warp, lane)

    @device_function
    def blend(memory, pieces, i, lane):
        """Element i of the pieces' sums, all together, by position in its head, which all lanes have in common; the
        largest score, and the lane's share of the sum of weights relative to it."""
        h, at = int32(i >> head_shift), int32(i & (head_dim - 1))
        inside = lane < pieces
        top = shared_f32(int32(memory + at_tops + 128 * h + 4 * lane)) if inside else float32(NOTHING)
        weights = shared_f32(int32(memory + at_totals + 128 * h + 4 * lane)) if inside else float32(0)
        top_bits = ordered(warp_max_i32(ordered(as_int(top))))
        largest = as_float(int32(top_bits & int32(-4)))  # as others will see it: it will have a tag
        factor = exp2(top - largest) if inside else float32(0)
        values, last = int32(memory + at_values + piece_bytes * h + 4 * at), int32(pieces - 1)
        value, p = float32(0), int32(0)
        while p < pieces:
            for j in range(4):
                part = shared_f32(int32(values + piece_bytes * shared * min(int32(p + j), last)))
                value += cuda.shfl_sync(0xFFFFFFFF, factor, int32(p + j)) * part
            p = int32(p + 4)
        return value, largest, factor * weights

    @device_function
    def merge(memory, values, statistics, place, part, active, mark, mixed, tag, thread, warp, lane):
        """Merges this block's columns of the unit's `active` parts into `mixed`. place: the block of the first part,
        from which on `values` [block, width] and `statistics` [block, head, 2] have sums; part: this block's."""
        log_columns = int32(columns_shift)
        while int32(active << log_columns) < width:
            log_columns = int32(log_columns + 1)
        columns, begin = int32(int32(1) << log_columns), int32(part << log_columns)
        if begin >= width:
            return
        if asks_first and warp == 0:
            sample = statistics + 16 * int32(
                int32(place + min(lane, int32(active - 1))) * shared + (begin >> head_shift)
            )
            while peek_i64(sample) >> 32 != mark:
                pass
        synchronize_threads(1, threads)
        row, column = int32(columns + 1), thread & int32(columns - 1)  # rows begin in different banks
        columns = min(columns, int32(width - begin))
        i, of_head = int32(begin + min(column, int32(columns - 1))), int32(column & (head_dim - 1)) == 0
        p, step = shift_right(thread, log_columns), shift_right(int32(threads), log_columns)
        while p < active:
            here = int32(place + p)
            at_statistic = statistics + 16 * int32(here * shared + (i >> head_shift))
            word, top_word, total_word, late = int64(0), int64(0), int64(0), int64(1)
            while late != 0:
                word = peek_i64(values + 8 * int32(here * width + i))
                top_word, total_word = peek_i64(at_statistic), peek_i64(at_statistic + 8)
                late = ((word >> 32) ^ mark) | ((top_word >> 32) ^ mark) | ((total_word >> 32) ^ mark)
            shared_store_f32(int32(memory + at_rows + 4 * int32(p * row + column)), as_float(int32(word)))
            if of_head:
                to = int32(memory + area + 256 * (column >> head_shift) + 4 * p)
                shared_store_f32(to, as_float(int32(top_word)))
                shared_store_f32(int32(to + 128), as_float(int32(total_word)))
            p = int32(p + step)
        synchronize_threads(1, threads)
        mine, column = min(lane, int32(active - 1)), warp
        while column < columns:
            at_top = int32(memory + area + 256 * (column >> head_shift) + 4 * mine)
            top = shared_f32(at_top)
            decay = exp2(top - as_float(ordered(warp_max_i32(ordered(as_int(top))))))
            decay = decay if lane < active else float32(0)
            value = decay * shared_f32(int32(memory + at_rows + 4 * int32(mine * row + column)))
            weight = decay * shared_f32(int32(at_top + 128))
            for step in (16, 8, 4, 2, 1):
                value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
                weight += cuda.shfl_xor_sync(0xFFFFFFFF, weight, step)
            if lane == 0:
                i = int32(begin + column)
                to = int32(int32(i & int32(-head_dim)) + dimension(i & (head_dim - 1)))
                post_i32(mixed + 4 * to, tagged(value * reciprocal(weight), tag))
            column = int32(column + warps)

    @device_function
    def attention(
        memory, entry, layer, block, thread, warp, lane, heads, kv_heads, scale, eps, parts_shift,
        qkv, mixed, part_values, part_statistics,
    ):  # fmt: skip
        """entry: where the layer's row of the table continues in shared memory."""
        position = shared_i32(int32(memory + at_position))
        turn = int32(shared_i32(int32(memory + at_before)) + layer)
        start, end, all_chunks, size = shared_i32x4(int32(memory + at_keys))  # what token_watch.py has left
        here, sources, unit, g = shared_i32x4(int32(memory + at_keys + 16))
        first_head, part = int32(unit * shared), int32(block & int32((int32(1) << parts_shift) - 1))
        # own: the block that sees the step's own key. Where it is the first part's too, it is alone. Every area that
        # may be read gets something in each turn, so that its numbers tell by their tags of which turn they are: those
        # of four turns ago, which have the same, are long overwritten.
        own, has_area = end == position, part < AREAS and first_head < heads
        alone, merged = own and part == 0, sources == 1 and not (own and part == 0)
        result = mixed + 4 * int64(int32(part * heads + first_head) * head_dim)
        result_statistics = mixed + 4 * int64(
            int32(AREAS * heads * head_dim) + int32(2 * int32(first_head * AREAS + part))
        )
        if has_area and (here == 0 or merged) and thread < 2 * shared:
            at = int32(int32(2 * AREAS * int32(thread >> 1)) + (thread & 1))
            post_i32(result_statistics + 4 * at, tagged(float32(0), turn))
        if has_area and (here == 0 or (merged and part > 0)):
            for r in range(rounds):
                i = int32(thread + r * threads)
                if i < width:
                    post_i32(result + 4 * i, tagged(float32(0), turn))
        if here == 0:
            return
        first = shared_i32(int32(memory + at_progress + 4 * warp))  # slot
        behind = int32(first + int32(uint32(2 * all_chunks + halves - 1) // uint32(halves)))
        if lane == 0 and (warp >= all_chunks or warp >= attending):
            shared_store_i32(int32(memory + at_progress + 4 * warp), behind)
        # Warps for the query heads, the key and the value; behind them some for the rows of zeros that tensor cores
        # take beside the queries.
        tag = int32(turn & 3)
        v_own, weights = cuda.local.array(per_lane, float32), cuda.local.array(per_lane, float32)
        norm = int64(0)
        if warp <= shared:
            norm = shared_i64(int32(entry + 8 * (Q_NORM - K_PAGES + (warp == shared))))
        for j in range(per_lane):
            v_own[j] = float32(0)
            weights[j] = load_constant_f32(norm + 4 * (lane + 32 * j)) if norm != 0 else float32(0)
        factor = scale * LOG2_E
        if warp < shared + 2:
            head = first_head + warp if warp < shared else heads + g if warp == shared else heads + kv_heads + g
            await_head(v_own, qkv + 4 * head_dim * int64(head), tag, lane)
            if warp <= shared:
                rotated = shared_i32(int32(entry + 8 * (ROTATED - K_PAGES))) != 0
                turn_head(memory, v_own, norm, weights, eps, rotated, lane)
        if warp < shared or (warp >= shared + 2 and warp < 10):
            # Where attention_core.Layout.queries has elements lane + 32 j.
            word = int32(lane >> 1)
            place = int32(((word & 2) << 3) + (word & 12) + 2 * (word & 1))
            row = warp if warp < shared else int32(warp - 2)
            to = int32(memory + at_queries + row_bytes * row + 4 * place + 2 * (lane & 1))
            for j in range(per_lane):
                value = v_own[j] * factor
                high = float_to_half(value)
                shared_store_u16(int32(to + 128 * j), high)
                shared_store_u16(int32(to + 128 * j + 4), float_to_half(value - half_to_float(high)))
        elif warp < shared + 2 and own:
            k_pages = halves_at(shared_i64(entry))
            v_pages = halves_at(shared_i64(int32(entry + 8 * (V_PAGES - K_PAGES))))
            table = words_at(shared_i64(int32(memory + at_pages)))
            own_page, in_page = int64(table[position >> PAGE_BITS]), position & (PAGE - 1)
            slot = ((own_page * kv_heads + g) * PAGE + in_page) * head_dim + lane
            for j in range(per_lane):
                bits = float_to_half(saturated(v_own[j]))
                shared_store_f32(
                    int32(memory + (at_key if warp == shared else at_value) + 4 * (lane + 32 * j)), half_to_float(bits)
                )
                if warp == shared:
                    k_pages[slot + 32 * j] = bits
                else:
                    v_pages[slot + 32 * j] = bits
        synchronize_threads(1, threads)
        pieces = min(all_chunks, int32(attending))  # warps that have keys
        if own and warp < shared:
            score = float32(0)
            to = int32(memory + at_values + piece_bytes * (shared * pieces + warp))
            for j in range(per_lane):
                i = int32(lane + 32 * j)
                score += v_own[j] * shared_f32(int32(memory + at_key + 4 * i))
                shared_store_f32(int32(to + 4 * dimension(i)), shared_f32(int32(memory + at_value + 4 * i)))
            score = warp_sum(score) * factor
            if lane == 0:
                at = int32(memory + 128 * warp + 4 * pieces)
                shared_store_f32(int32(at + at_tops), score)
                shared_store_f32(int32(at + at_totals), float32(1))
        if warp < pieces:
            window = shared_i32(int32(entry + 8 * (WINDOW - K_PAGES)))
            lowest = max(int32(0), int32(position + 1 - window)) if window else int32(0)
            attend(memory, first, behind, start, end, lowest, warp, lane)
        synchronize_threads(1, threads)

        pieces = int32(pieces + (1 if own else 0))
        mark = (int64(turn) & int64(0x3FFFFFFF)) + 1
        for r in range(rounds):
            i = int32(thread + r * threads)
            if i < width:  # of a warp all or none
                h, at = int32(i >> head_shift), int32(i & (head_dim - 1))
                value, largest, weight = blend(memory, pieces, i, lane)
                if merged:
                    post_i64(part_values + 8 * int32(block * width + i), marked(value, mark))
                else:
                    value *= reciprocal(warp_sum(weight)) if alone else float32(1)
                    post_i32(result + 4 * int32(h * head_dim + dimension(at)), tagged(value, tag))
                if int32(at & int32(-32)) == 0:  # the head's first warp
                    total = warp_sum(weight)
                    statistic = largest if at == 0 else total
                    if at < 2 and merged:
                        to = int32(int32(block * shared + h) * 2 + at)
                        post_i64(part_statistics + 8 * to, marked(statistic, mark))
                    elif at < 2:
                        post_i32(result_statistics + 4 * int32(2 * AREAS * h + at), tagged(statistic, tag))
        if merged:
            active = int32(part + divide(int32(position - start + size - 1), size))
            place, of_unit = int32(block - part), mixed + 4 * int64(int32(first_head * head_dim))
            merge(memory, part_values, part_statistics, place, part, active, mark, of_unit, tag, thread, warp, lane)

    return attention
