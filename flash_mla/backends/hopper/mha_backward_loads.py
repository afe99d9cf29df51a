"""What dense MHA's backward loads: a warp brings K and V of a work tile, and Q and dO of one visit after the other."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, range_constexpr
from cutlass.cute.nvgpu import cpasync

from flash_mla.backends.hopper.mha_schedule import (
    TILE_KV,
    VISIT_Q,
    InRegisters,
    KeyTile,
    Window,
    find,
    take_number,
)
from flash_mla.backends.hopper.mha_tiles import expect, partition, release
from flash_mla.backends.hopper.wgmma import CHUNK

D_V = 128
V_CHUNKS = D_V // CHUNK
STAGES = 2  # of Q, dO and dS
K_COLUMNS = 32  # of a chunk of K: half of dQ's columns are a multiple of it
WORDS = 16  # of a work tile as the producer hands it to the consumers


@dataclass(frozen=True)
class Loads:
    """What TMA brings: (atom, tensor) of each."""

    q: tuple
    k: tuple
    v: tuple
    dout: tuple


class Visit(InRegisters):
    """64 query rows of a head."""

    def __init__(self, head: Int32, tile: Int32):
        self.head = head
        self.tile = tile  # of the sequence


class BackwardLoads:
    """The producer warp's part of the backward, and where the consumers find what it hands over."""

    def __init__(self, dtype: type[cutlass.Numeric], d: int):
        self.dtype = dtype
        self.d = d
        self.chunks = d // CHUNK
        self.k_chunks = d // K_COLUMNS

    @cute.jit
    def produce(self, sequences, shared, barriers, loads, row_values: cute.Tensor, next_tile: cute.Tensor):
        """Bring the operands of one work tile after the other, each as soon as there is room for it.

        The tile before frees Q and dO first, then V, and K last. Until then K and V come to the L2.
        """
        for tma, _ in (loads.q, loads.k, loads.v, loads.dout):
            cpasync.prefetch_descriptor(tma)
        visits = Int32(0)
        works = Int32(0)
        work, window = find(sequences, Window(Int32(0), Int32(0)), cute.arch.block_idx()[0])
        while work.tiles >= 0:
            self.prefetch_keys(work, shared, loads)
            q_to, q_from = partition(self.dtype, *loads.q, shared.q, VISIT_Q, STAGES * self.chunks, work.q_row)
            dout_to, dout_from = partition(self.dtype, *loads.dout, shared.dout, VISIT_Q, STAGES * V_CHUNKS, work.q_row)
            visit = Visit(work.kv_head * sequences.group, work.first)
            for i in cutlass.range(work.tiles, unroll=1):
                stage = visits % STAGES
                parity = (visits // STAGES & 1) ^ 1
                values = self.load_row_values(work, visit, row_values)
                cute.arch.mbarrier_wait(barriers.q_empty + stage, parity)
                expect(barriers.q_full + stage, VISIT_Q * self.d)
                for c in range_constexpr(self.chunks):
                    source, to = q_from[None, visit.tile, c, visit.head], q_to[None, stage * self.chunks + c]
                    cute.copy(loads.q[0], source, to, tma_bar_ptr=barriers.q_full + stage)
                self.store_row_values(values, shared, stage)
                release(barriers.q_full + stage)
                cute.arch.mbarrier_wait(barriers.dout_empty + stage, parity)
                expect(barriers.dout_full + stage, VISIT_Q * D_V)
                for c in range_constexpr(V_CHUNKS):
                    source, to = dout_from[None, visit.tile, c, visit.head], dout_to[None, stage * V_CHUNKS + c]
                    cute.copy(loads.dout[0], source, to, tma_bar_ptr=barriers.dout_full + stage)
                if i == 0:
                    self.load_v(work, works, shared, barriers, loads)
                    self.load_k(work, works, shared, barriers, loads)
                visits += 1
                visit = self.next_visit(work, visit)
            if work.tiles == 0:
                self.load_v(work, works, shared, barriers, loads)
                self.load_k(work, works, shared, barriers, loads)
            works += 1
            work, window = find(sequences, window, take_number(next_tile))
        cute.arch.mbarrier_wait(barriers.k_empty, (works & 1) ^ 1)
        self.hand_over(work, shared)
        release(barriers.k_full)

    @cute.jit
    def hand_over(self, work, shared):
        """Tell the consumers what their work is."""
        with cute.arch.elect_one():
            words = self.words(shared)
            for i, value in enumerate(vars(work).values()):
                words[i] = value

    def words(self, shared) -> cute.Tensor:
        """Where the consumers read their work, in the order of a KeyTile."""
        return cute.make_tensor(shared.work.data_ptr(), cute.make_layout(WORDS))

    @cute.jit
    def prefetch_keys(self, work, shared, loads):
        """Begin to bring K and V to the L2."""
        _, k = partition(self.dtype, *loads.k, shared.k, TILE_KV, self.k_chunks, work.kv_row, K_COLUMNS)
        _, v = partition(self.dtype, *loads.v, shared.v, TILE_KV, V_CHUNKS, work.kv_row)
        for c in range_constexpr(self.k_chunks):
            cute.prefetch(loads.k[0], k[None, 0, c, work.kv_head])
        for c in range_constexpr(V_CHUNKS):
            cute.prefetch(loads.v[0], v[None, 0, c, work.kv_head])

    @cute.jit
    def load_k(self, work, works: Int32, shared, barriers, loads):
        """Bring K, and with it what the work is."""
        cute.arch.mbarrier_wait(barriers.k_empty, (works & 1) ^ 1)
        self.hand_over(work, shared)
        expect(barriers.k_full, TILE_KV * self.d)
        to, source = partition(self.dtype, *loads.k, shared.k, TILE_KV, self.k_chunks, work.kv_row, K_COLUMNS)
        for c in range_constexpr(self.k_chunks):
            cute.copy(loads.k[0], source[None, 0, c, work.kv_head], to[None, c], tma_bar_ptr=barriers.k_full)

    @cute.jit
    def load_v(self, work, works: Int32, shared, barriers, loads):
        cute.arch.mbarrier_wait(barriers.v_empty, (works & 1) ^ 1)
        expect(barriers.v_full, TILE_KV * D_V)
        to, source = partition(self.dtype, *loads.v, shared.v, TILE_KV, V_CHUNKS, work.kv_row)
        for c in range_constexpr(V_CHUNKS):
            cute.copy(loads.v[0], source[None, 0, c, work.kv_head], to[None, c], tma_bar_ptr=barriers.v_full)

    def next_visit(self, work: KeyTile, visit: Visit) -> Visit:
        """The next rows of the head, or the first of the next head."""
        tile = visit.tile + 1
        last = tile * VISIT_Q >= work.seqlen_qo
        return Visit(
            cutlass.select_(last, visit.head + 1, visit.head),
            cutlass.select_(last, work.first, tile),
        )

    @cute.jit
    def load_row_values(self, work, visit, row_values: cute.Tensor):
        """-lse and -delta of this lane's rows, two of each; a row that does not exist has P = exp2(0 - inf) = 0."""
        values = cute.make_rmem_tensor(4, Float32)
        for half in range_constexpr(2):
            row = visit.tile * VISIT_Q + 32 * half + cute.arch.lane_idx()
            values[2 * half], values[2 * half + 1] = Float32(-Float32.inf), Float32(0.0)
            if row < work.seqlen_qo:
                values[2 * half] = row_values[0, visit.head, work.q_row + row]
                values[2 * half + 1] = row_values[1, visit.head, work.q_row + row]
        return values

    def store_row_values(self, values, shared, stage):
        to = self.row_values(shared, stage)
        for half in range(2):
            for kind in range(2):
                to[32 * half + cute.arch.lane_idx(), kind] = values[2 * half + kind]
        cute.arch.sync_warp()

    def row_values(self, shared, stage) -> cute.Tensor:
        """[64 rows, -lse or -delta] of a stage."""
        start = shared.row_values.data_ptr() + stage * (2 * VISIT_Q)
        return cute.make_tensor(start.align(16), cute.make_layout((VISIT_Q, 2)))
