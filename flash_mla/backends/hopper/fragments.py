"""What a consumer warpgroup of an MLA kernel holds: 64 query rows against blocks of 64 tokens, half of V's columns.

Two consumers share a pair of K buffers: each scores one block and accumulates its half of the output's 512 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu.warpgroup import OperandSource

from flash_mla.backends.hopper.wgmma import CHUNK, ROWS, pv_op, qk_op

BLOCK = 64  # tokens
D_V = 512
V_CHUNKS = D_V // CHUNK


@dataclass(frozen=True)
class Registers:
    """Accumulators and operands that a consumer warpgroup holds."""

    q_rope: cute.Tensor  # Q's RoPE chunk
    p: cute.Tensor  # this side's probabilities as an A operand
    p_scores: cute.Tensor  # the same registers, in the scores' order
    store: tuple  # how to write them to shared memory: (tiled copy, the same registers in its order)
    s: cute.Tensor
    o: cute.Tensor

    @staticmethod
    def allocate(dtype: type[cutlass.Numeric]) -> Registers:
        qk = cute.make_tiled_mma(qk_op(dtype, OperandSource.SMEM))
        qk_slice = qk.get_slice(0)
        pv_slice = cute.make_tiled_mma(pv_op(dtype, OperandSource.SMEM)).get_slice(0)
        s = qk_slice.make_fragment_C(qk_slice.partition_shape_C((ROWS, BLOCK)))
        p_scores = cute.make_rmem_tensor(s.layout, dtype)
        # An A operand takes its registers in the order of the accumulator.
        p = cute.make_tensor(p_scores.iterator, cute.make_layout(((2, 2, 2), 1, 4), stride=((1, 2, 4), 0, 8)))
        store = cute.make_tiled_copy_C(cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), dtype), qk)
        return Registers(
            q_rope=cute.make_rmem_tensor(p.layout, dtype),
            p=p,
            p_scores=p_scores,
            store=(store, store.get_slice(0).retile(p_scores)),
            s=s,
            o=pv_slice.make_fragment_C(pv_slice.partition_shape_C((ROWS, D_V // 2))),
        )

    def load_q_rope(self, r: int, row: cute.Pointer, lane: Int32):
        """Q's RoPE chunk of this thread's row r straight into the registers of an A operand: its memory holds P.

        row: where the row of Q begins in global memory.
        """
        start = row + (D_V + 2 * (lane % 4))
        source = cute.make_tensor(start.align(4), cute.make_layout((2, 2, 4), stride=(1, 8, 16)))
        to = cute.make_tensor(self.q_rope.iterator + 2 * r, cute.make_layout((2, 2, 4), stride=(1, 4, 8)))
        cute.autovec_copy(source, to)
