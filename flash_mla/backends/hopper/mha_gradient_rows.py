"""What dense MHA's backward does a query row at a time: values of rows before, sums of dQ during it, dQ after it.

dQ is summed in fp32 [h_q, tiles, 64 * d], each warp adding what it holds, or storing it if it is the first to
(mha_first_sums): a tile is 64 rows of one sequence, in the order of the accumulators, so that a warp's part of it is
contiguous. Of every 16 rows x 16 columns, thread c of the four that share a row of an accumulator holds columns 2 c,
2 c + 1, 8 + 2 c and 9 + 2 c: 16 bytes.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr, range_constexpr

from flash_mla.backends.hopper.mha_first_sums import UNTOUCHED
from flash_mla.backends.hopper.mha_schedule import VISIT_Q, first_tile
from flash_mla.backends.hopper.softmax import LOG2_E

D_V = 128
LANES = 16  # of a row, before
ROWS = 16  # of a CTA, before
ROWS_AFTER = 32  # of a CTA, after
COLUMNS = 16  # of a thread, after
SIDES = 2  # halves of dQ's columns
UNIT = 128  # fp32 values that a warp stores at once, 16 bytes a lane: 8 rows of 16 columns


class GradientRows:
    def __init__(self, dtype: type[cutlass.Numeric], d: int, zeroed: bool):
        self.dtype = dtype
        self.d = d
        self.zeroed = zeroed  # sums are set to 0 before; else the first part is stored

    @cute.jit
    def before(
        self,
        dout: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        dlse: cute.Tensor,
        row_values: cute.Tensor,
        dq_sums: cute.Tensor,
        dq_states: cute.Tensor,
        next_tile: cute.Tensor,
        stream,
    ):
        """-lse in base 2 and -delta = dlse - rowsum(dout out) of every row; nothing is summed yet, no tile taken."""
        grid = (dq_states.shape[1] * (VISIT_Q // ROWS), out.shape[1], 1)
        self.before_kernel(dout, out, lse, dlse, row_values, dq_sums, dq_states, next_tile).launch(
            grid=grid, block=(ROWS * LANES, 1, 1), stream=stream
        )

    @cute.kernel
    def before_kernel(
        self,
        dout: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        dlse: cute.Tensor,
        row_values: cute.Tensor,
        dq_sums: cute.Tensor,
        dq_states: cute.Tensor,
        next_tile: cute.Tensor,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, head, _ = cute.arch.block_idx()
        lane = thread % LANES
        row = block * ROWS + thread // LANES
        exists = row < out.shape[0]
        token = cutlass.select_(exists, row, Int32(0))

        a, b = (cute.make_rmem_tensor(D_V // LANES, self.dtype) for _ in range(2))
        for source, to in ((dout, a), (out, b)):
            start = source[token, head, None].iterator + lane * (D_V // LANES)
            cute.autovec_copy(cute.make_tensor(start.align(16), to.layout), to)
        delta = Float32(0.0)
        for i in range_constexpr(D_V // LANES):
            delta += a[i].to(Float32) * b[i].to(Float32)
        for i in range_constexpr(4):
            delta += cute.arch.shuffle_sync_bfly(delta, 1 << i)
        if exists & (lane == 0):
            # A row that sees no key has P = exp2(0 - inf) = 0, whatever its dout.
            blind = lse[token, head] == -Float32.inf
            row_values[0, head, token] = cutlass.select_(blind, -Float32.inf, lse[token, head] * -LOG2_E)
            row_values[1, head, token] = cutlass.select_(blind, Float32(0.0), dlse[token, head] - delta)
        if const_expr(self.zeroed):
            zeros = cute.make_rmem_tensor(4, Float32)
            zeros.fill(0.0)
            sums = dq_sums[head, row // VISIT_Q, None].iterator + row % VISIT_Q * self.d + lane * 4
            for i in range_constexpr(self.d // (4 * LANES)):
                cute.autovec_copy(zeros, cute.make_tensor((sums + i * 4 * LANES).align(16), zeros.layout))
        elif (thread < SIDES) & (block % (VISIT_Q // ROWS) == 0):
            dq_states[head, block // (VISIT_Q // ROWS), thread] = UNTOUCHED
        if (thread == 0) & (block == 0) & (head == 0):
            next_tile[0] = 0

    @cute.jit
    def after(
        self,
        dq_sums: cute.Tensor,
        dq_states: cute.Tensor,
        cu_seqlens_qo: cute.Tensor,
        dq: cute.Tensor,
        scale: Float32,
        stream,
    ):
        """dq = scale times the sums, 0 where nothing was added."""
        self.after_kernel(dq_sums, dq_states, cu_seqlens_qo, dq, scale).launch(
            grid=(dq_sums.shape[1] * (VISIT_Q // ROWS_AFTER), dq.shape[1], 1),
            block=(ROWS_AFTER * (self.d // COLUMNS), 1, 1),
            stream=stream,
        )

    @cute.kernel
    def after_kernel(
        self,
        dq_sums: cute.Tensor,
        dq_states: cute.Tensor,
        cu_seqlens_qo: cute.Tensor,
        dq: cute.Tensor,
        scale: Float32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, head, _ = cute.arch.block_idx()
        tile = block // (VISIT_Q // ROWS_AFTER)
        row = block % (VISIT_Q // ROWS_AFTER) * ROWS_AFTER + thread // (self.d // COLUMNS)
        group = thread % (self.d // COLUMNS)
        half = self.d // COLUMNS // SIDES  # column groups of a side
        warp = group // half * (VISIT_Q // 16) + row // 16
        unit = warp * (2 * half) + group % half * 2 + row // 8 % 2
        # Whether there are such a row and such sums is found out while they are on their way.
        sums = cute.make_rmem_tensor(COLUMNS, Float32)
        source = dq_sums[head, tile, None].iterator + unit * UNIT + row % 8 * COLUMNS
        cute.autovec_copy(cute.make_tensor(source.align(16), sums.layout), sums)
        added = self.has_sums(dq_states, head, tile, group // half)
        sequence = sequence_of(cu_seqlens_qo, tile)
        begin, end = cu_seqlens_qo[sequence], cu_seqlens_qo[sequence + 1]
        token = begin + (tile - first_tile(begin, sequence)) * VISIT_Q + row
        if token < end:
            values = cute.make_rmem_tensor(COLUMNS, self.dtype)
            for c in range_constexpr(4):
                for i in range_constexpr(4):
                    value = Float32(cutlass.select_(added, sums[4 * c + i] * scale, Float32(0.0)))
                    values[8 * (i // 2) + 2 * c + i % 2] = value.to(self.dtype)
            to = dq[token, head, None].iterator + group * COLUMNS
            cute.autovec_copy(values, cute.make_tensor(to.align(16), values.layout))

    def has_sums(self, dq_states: cute.Tensor, head: Int32, tile: Int32, side: Int32):
        """Whether anything was set or added."""
        return Boolean(True) if self.zeroed else dq_states[head, tile, side] != UNTOUCHED


@cute.jit
def sequence_of(cu_seqlens: cute.Tensor, tile: Int32) -> Int32:
    """The sequence whose rows a tile of the sums may hold."""
    low, high = Int32(0), cu_seqlens.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        begins_after = first_tile(cu_seqlens[middle], middle) > tile
        low = cutlass.select_(begins_after, low, middle)
        high = cutlass.select_(begins_after, middle, high)
    return low


def units_of(dq: cute.Tensor) -> list[cute.Tensor]:
    """This thread's registers of a warp's part of dQ [64, half of d], four for each unit."""
    units = []
    for unit in range(cute.size(dq) // 4):
        j, r = unit // 2 * 2, unit % 2
        values = cute.make_rmem_tensor(4, Float32)
        for e in range(4):
            values[e] = dq[4 * (j + e // 2) + 2 * r + e % 2]
        units.append(values)
    return units


def store_registers(to: cute.Pointer, dq: cute.Tensor, lane: Int32):
    """Let this warp's part of dQ be the first of its sums."""
    for i, values in enumerate(units_of(dq)):
        cute.autovec_copy(values, cute.make_tensor((to + i * UNIT + lane * 4).align(16), values.layout))


def add_registers(to: cute.Pointer, dq: cute.Tensor, lane: Int32, begin: int):
    """Add this warp's part of dQ, from its value `begin` on, to its sums."""
    start = (to + lane * 4).toint()
    for i, values in list(enumerate(units_of(dq)))[begin // UNIT :]:
        cute.arch.inline_ptx(
            "red.global.add.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
            read_only_args=[start + Int64(i * UNIT * 4), *(values[e] for e in range(4))],
        )


def stage_sums(dq: cute.Tensor, room: cute.Pointer, lane: Int32, count: int):
    """Put the first `count` values of this warp's part of dQ where `add_staged` adds them from after a fence."""
    for i, values in enumerate(units_of(dq)[: count // UNIT]):
        cute.autovec_copy(values, cute.make_tensor((room + i * UNIT + lane * 4).align(16), values.layout))


def add_staged(to: cute.Pointer, room: cute.Pointer, count: int):
    """Begin to add the `count` values that this warp has staged to their sums."""
    with cute.arch.elect_one():
        cute.arch.inline_ptx(
            f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{{$r0}}], [{{$r1}}], {count * 4};",
            read_only_args=[to.toint(), Int32(room.toint())],
        )
        cute.arch.cp_async_bulk_commit_group()
