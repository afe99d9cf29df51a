"""Token-sparse MLA decode over a BF16 or FP16 cache: the consumers and the walk of sparse_decode, another producer.

Nothing is to be converted, so rows go by asynchronous copies straight to where the tensor cores read them. CTAs that
take other heads of the same query token run side by side and find its rows in L2, which is faster than to hand them
over within a cluster.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr, range_constexpr

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.copies import copy_async, wait_copies
from flash_mla.backends.hopper.dequant import CHUNK_BYTES, HALF_CHUNKS, UNIT
from flash_mla.backends.hopper.schedule import end_of_work, first_piece
from flash_mla.backends.hopper.sparse_decode import (
    ROW_BYTES,
    V_CHUNKS,
    WARPGROUP,
    SparseDecode,
    compile_for,
)
from flash_mla.backends.hopper.sparse_decode_walk import Tokens

LANES_PER_ROW = 8  # that bring the 128 bytes of a row's chunk
ROWS_PER_COPY = 32 // LANES_PER_ROW
WARP_ROWS = 16  # of a block, that a warp brings


@dataclass(frozen=True)
class CopyLane:
    """What a producer thread works on."""

    warp: Int32
    lane: Int32
    k: tuple  # addresses of its units in the first row that it brings of a block, and in the next: they take turns
    token: Int32  # of a tile: the one that it looks up
    index: Int32  # address of that token's index


class PlainSparseDecode(SparseDecode):
    def token_bytes(self, cache: cute.Tensor, is_extra: bool) -> Int64:
        return cache.stride[1]

    def copies(self, block: int, half: int) -> int:
        return WARPGROUP

    def copy_lane(self, shared, thread: Int32) -> CopyLane:
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        row, unit = lane // LANES_PER_ROW, lane % LANES_PER_ROW
        k = Int32(shared.k.data_ptr().toint()) + (warp * WARP_ROWS + row) * ROW_BYTES
        return CopyLane(
            warp=warp,
            lane=lane,
            # The swizzle permutes a row's units by its number modulo 8.
            k=tuple(k + (unit ^ (row + i * ROWS_PER_COPY)) * UNIT for i in range(2)),
            token=self.token(warp, lane),
            index=Int32(shared.indices.data_ptr().toint()) + thread * 4,
        )

    @cute.jit
    def produce(self, args, shared, barriers, tma_q: cute.CopyAtom, q_tma: cute.Tensor, thread: Int32):
        """Fill K blocks half by half, in the order in which the consumers need and free them: of block 0 the left half,
        then the right half and RoPE; of block 1 the right half, then the left half and RoPE."""
        lane = self.copy_lane(shared, thread)
        end = end_of_work(args.work)

        cursor = self.settle(args, first_piece(args.work), end)
        exists = cursor.exists
        self.fetch_index(args, cursor, lane)
        cute.arch.cp_async_commit_group()
        if exists & (lane.warp == 0):
            self.load_q(args, shared, barriers, tma_q, q_tma, cursor.unit, Int32(0))
        wait_copies(0)
        tokens = self.locate(args, cursor, lane)
        cursor = self.next_cursor(args, cursor, end)
        self.fetch_index(args, cursor, lane)
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_commit_group()  # as if of the rows of a tile before the first

        tiles, pieces, opened = Int32(0), Int32(1), Int32(-1)
        while exists:
            wait_copies(1)  # for the next tile's index, not for the last one's rows
            next_tokens = self.locate(args, cursor, lane)
            next_exists = cursor.exists
            next_opened = cutlass.select_(next_exists & (cursor.opens != 0), cursor.unit, Int32(-1))
            cursor = self.next_cursor(args, cursor, end)
            self.fetch_index(args, cursor, lane)
            cute.arch.cp_async_commit_group()
            attended = cute.arch.vote_ballot_sync(tokens.row != 0)
            for block in range_constexpr(2):
                rows = self.rows(tokens, block, lane)
                for late in range_constexpr(2):
                    half = block ^ late
                    full = barriers.k_full + (2 * block + half)
                    cute.arch.mbarrier_wait(barriers.k_empty + (2 * block + half), (tiles & 1) ^ 1)
                    if const_expr(block == 0 and late == 0):
                        if lane.warp == 0 and opened >= 0:
                            self.load_q(args, shared, barriers, tma_q, q_tma, opened, pieces)
                    if const_expr(late == 0):
                        self.note_attended(shared, attended, Int32(block), lane.warp)
                    self.gather(lane, rows, block, self.chunks_with(half, late))
                    cute.arch.cp_async_mbarrier_arrive_noinc(full)
                    cute.arch.sync_warp()
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(full)  # of what has been noted, too
            cute.arch.cp_async_commit_group()
            pieces += cutlass.select_(opened >= 0, Int32(1), Int32(0))
            tokens, exists, opened = next_tokens, next_exists, next_opened
            tiles += 1
        # The CTA's shared memory must outlast the copies into it.
        wait_copies(0)

    def chunks_with(self, half: int, late: int) -> tuple:
        """The chunks of half a block: RoPE comes with the late half."""
        first = half * HALF_CHUNKS
        return (*range(first, first + HALF_CHUNKS), *((V_CHUNKS,) if late and self.has_rope else ()))

    def rows(self, tokens: Tokens, block: int, lane: CopyLane) -> list:
        """Addresses of the rows of a block that this lane brings a part of, or 0."""
        first = block * WARP_ROWS + lane.lane // LANES_PER_ROW
        return [
            cute.arch.shuffle_sync(tokens.row, first + i * ROWS_PER_COPY) for i in range(WARP_ROWS // ROWS_PER_COPY)
        ]

    def gather(self, lane: CopyLane, rows: list, block: int, chunks: tuple) -> None:
        """Start to copy this warp's rows of some chunks; those of tokens that are not attended to become zeros."""
        unit = Int64(lane.lane % LANES_PER_ROW * UNIT)
        for chunk in chunks:
            number = block * self.chunks + chunk
            for i, row in enumerate(rows):
                to = (lane.k[i % 2], number * CHUNK_BYTES + i * ROWS_PER_COPY * ROW_BYTES)
                copy_async(to, row, (row + unit, chunk * ROW_BYTES), UNIT)


def compile_variant(dtype: str, d: int) -> aot.Compiled:
    """Compile for tensors of any extents whose rows, tokens and pages are 16-byte aligned."""
    element = getattr(cutlass, dtype)
    caches = [
        aot.strided(Uint8, (cute.sym_int(), cute.sym_int(), d * element.width // 8), dense_last=True, align=16)
        for _ in range(2)
    ]
    return compile_for(PlainSparseDecode(element, d), d, caches)
