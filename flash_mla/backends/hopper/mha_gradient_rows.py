"""What dense MHA's backward does a query row at a time: values of rows before, sums of dQ during it, dQ after it.

dQ is summed in fp32 [h_q, total_q, d]. Within each 16 columns the sums lie in the order in which the threads of a
warpgroup's accumulator hold them: thread c of the four that share a row has columns 2 c, 2 c + 1, 8 + 2 c, 9 + 2 c.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, range_constexpr

from flash_mla.backends.hopper.softmax import LOG2_E

D_V = 128
LANES = 16  # of a row, before
ROWS = 16  # of a CTA
PERMUTED = 16  # columns


class GradientRows:
    def __init__(self, dtype: type[cutlass.Numeric], d: int):
        self.dtype = dtype
        self.d = d

    @cute.jit
    def before(
        self,
        dout: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        dlse: cute.Tensor,
        row_values: cute.Tensor,
        dq_sums: cute.Tensor,
        next_tile: cute.Tensor,
        stream,
    ):
        """lse in base 2 and delta = rowsum(dout out) - dlse of every row; sums and counter set to 0."""
        grid = ((out.shape[0] + (ROWS - 1)) // ROWS, out.shape[1], 1)
        self.before_kernel(dout, out, lse, dlse, row_values, dq_sums, next_tile).launch(
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
        if exists:
            if lane == 0:
                # A row that sees no key has P = exp2(0 - inf) = 0, whatever its dout.
                blind = lse[token, head] == -Float32.inf
                row_values[0, head, token] = cutlass.select_(blind, Float32.inf, lse[token, head] * LOG2_E)
                row_values[1, head, token] = cutlass.select_(blind, Float32(0.0), delta - dlse[token, head])
            zeros = cute.make_rmem_tensor(4, Float32)
            zeros.fill(0.0)
            sums = dq_sums[head, token, None].iterator + lane * 4
            for i in range_constexpr(self.d // (4 * LANES)):
                cute.autovec_copy(zeros, cute.make_tensor((sums + i * 4 * LANES).align(16), zeros.layout))
        if (thread == 0) & (block == 0) & (head == 0):
            next_tile[0] = 0

    @cute.jit
    def after(self, dq_sums: cute.Tensor, dq: cute.Tensor, scale: Float32, stream):
        """dq = scale times the sums."""
        grid = ((dq.shape[0] + (ROWS - 1)) // ROWS, dq.shape[1], 1)
        self.after_kernel(dq_sums, dq, scale).launch(
            grid=grid, block=(ROWS * (self.d // PERMUTED), 1, 1), stream=stream
        )

    @cute.kernel
    def after_kernel(self, dq_sums: cute.Tensor, dq: cute.Tensor, scale: Float32):
        thread, _, _ = cute.arch.thread_idx()
        block, head, _ = cute.arch.block_idx()
        row = block * ROWS + thread // (self.d // PERMUTED)
        column = thread % (self.d // PERMUTED) * PERMUTED
        if row < dq.shape[0]:
            sums = cute.make_rmem_tensor(PERMUTED, Float32)
            values = cute.make_rmem_tensor(PERMUTED, self.dtype)
            source = dq_sums[head, row, None].iterator + column
            cute.autovec_copy(cute.make_tensor(source.align(16), sums.layout), sums)
            for c in range_constexpr(4):
                for i in range_constexpr(4):
                    values[8 * (i // 2) + 2 * c + i % 2] = (sums[4 * c + i] * scale).to(self.dtype)
            to = dq[row, head, None].iterator + column
            cute.autovec_copy(values, cute.make_tensor(to.align(16), values.layout))


@cute.jit
def add_to_sums(dq: cute.Tensor, r: cutlass.Constexpr, sums: cute.Pointer, exists, c: Int32):
    """Add row r of this thread, the c-th of four, of an accumulator to the sums of its columns."""
    address = (sums + c * 4).toint()
    if exists:
        for j in range_constexpr(0, cute.size(dq) // 4, 2):
            values = [dq[4 * (j + half) + 2 * r + i] for half in range(2) for i in range(2)]
            cute.arch.inline_ptx(
                f"red.relaxed.gpu.global.add.v4.f32 [{{$r0}}+{j * 32}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
                read_only_args=[address, *values],
            )
