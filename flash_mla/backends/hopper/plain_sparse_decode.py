"""Token-sparse MLA decode over a BF16 or FP16 cache: another producer than sparse_decode's, and two sorts of consumers.

Nothing is to be converted, so rows go by asynchronous copies straight to where the tensor cores read them. CTAs that
take other heads of the same query token run side by side and find its rows in L2, which is faster than to hand them
over within a cluster.
"""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass.cute.nvgpu import warpgroup

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.copies import copy_async, wait_copies
from flash_mla.backends.hopper.dequant import CHUNK_BYTES, UNIT
from flash_mla.backends.hopper.fragments import Registers
from flash_mla.backends.hopper.schedule import Piece, anew, end_of_work, first_piece, next_piece, piece_stop, remains
from flash_mla.backends.hopper.seesaw import LEFT, RIGHT, ROPE, Consumer, Position, Running
from flash_mla.backends.hopper.sparse_decode import (
    CHUNK_ELEMENTS,
    ROW_BYTES,
    WARPGROUP,
    SparseDecode,
    compile_for,
)
from flash_mla.backends.hopper.sparse_decode_walk import Arguments, Tokens

COMPUTE_BOUND_REGISTERS = (224, 56)  # of a consumer and of a producer thread: what ptxas fits without spilling

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
            rows: dict[int, list] = {}
            for block, group in self.load_order():
                if const_expr(block not in rows):
                    rows[block] = self.rows(tokens, block, lane)
                number = block * len(self.groups) + group
                full = barriers.k_full + number
                cute.arch.mbarrier_wait(barriers.k_empty + number, (tiles & 1) ^ 1)
                if const_expr((block, group) == (0, LEFT)):
                    if lane.warp == 0 and opened >= 0:
                        self.load_q(args, shared, barriers, tma_q, q_tma, opened, pieces)
                if const_expr(group == block):
                    self.note_attended(shared, attended, Int32(block), lane.warp)
                self.gather(lane, rows[block], block, self.chunks_with(block, group))
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

    def chunks_with(self, block: int, group: int) -> tuple[int, ...]:
        """The chunks of a group, and RoPE if it comes with that half of the block."""
        chunks = self.groups[group]
        part = ROPE if group == ROPE else group ^ block
        return chunks + self.parts[part][len(chunks) :]

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


@dataclass(frozen=True)
class Part:
    """What a piece's pairs are part of."""

    args: Arguments
    piece: Piece
    stop: Int32  # tile
    tiles: Int32  # of its unit

    def following(self) -> Piece:
        piece = Piece(anew(self.piece.unit), anew(self.piece.tile), anew(self.piece.split))
        return next_piece(piece, self.stop, self.tiles)


class ComputeBoundSparseDecode(PlainSparseDecode):
    """For rows that several CTAs attend to: all but one find them in L2, so that multiplying is what takes time.

    Then both sides' scores come before softmax, as in dense decode: 12 % faster with 128 heads. Where every row comes
    from memory, that is 2 to 4 % slower, since K is freed later.
    """

    stores_unfenced = False  # it is copies that arrive, when their bytes lie in shared memory

    def __init__(self, dtype: type[cutlass.Numeric], d: int):
        super().__init__(dtype, d, registers=COMPUTE_BOUND_REGISTERS, p_apart=True)

    @cute.jit
    def consume(self, side: Int32, args, shared, barriers, thread: Int32):
        """One consumer warpgroup: scores of block `side` of each pair, half `side` of the output columns.

        The sides have code of their own for pairs in a loop alone; the last pair is peeled.
        """
        running = Running.allocate(top=False)
        c = Consumer(side, shared, barriers, Registers.allocate(self.dtype), running, args.scale_log2, thread)
        parity, q_parity = Int32(0), Int32(0)  # of pairs and pieces
        piece, end = first_piece(args.work), end_of_work(args.work)
        ahead = cute.make_rmem_tensor(2, Int32)  # tiles of the next piece's unit, and its slot
        self.load_piece(args, c, piece, ahead)
        while remains(piece, end):
            tiles, slot = ahead[0], ahead[1]
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            part = Part(args, piece, stop, tiles)
            work = (part, ahead)
            running.reset()
            c.f.o.fill(0.0)  # a piece may be empty
            if stop > piece.tile:
                cute.arch.mbarrier_wait(barriers.q_full, q_parity)
                q_parity ^= 1
                warpgroup.fence()
                self.issue_scores(c, self.qk_order, parity)
                warpgroup.wait_group(0)
                if side == LEFT:
                    parity = self.pairs_before(replace(c, side=LEFT), part, parity, work)
                else:
                    parity = self.pairs_before(replace(c, side=RIGHT), part, parity, work)
                self.pair(c, parity, Position(piece.tile + 1 == stop, False, True), work)
                parity ^= 1
            else:
                self.load_ahead(c, work)
            rows = args.rows(piece)
            self.write(args, c, rows, self.sinks(args, c, rows), slot)
            piece = part.following()

    @cute.jit
    def pairs_before(self, c, part: Part, parity: Int32, work) -> Int32:
        """All pairs of a piece but its last one; returns the parity behind them."""
        tile = part.piece.tile
        while tile + 1 < part.stop:
            self.pair(c, parity, Position(tile == part.piece.tile, tile + 2 == part.stop, False), work)
            parity ^= 1
            tile += 1
        return parity

    def load_ahead(self, c: Consumer, work: tuple):
        part, ahead = work
        self.load_piece(part.args, c, part.following(), ahead)

    def load_piece(self, args: Arguments, c: Consumer, piece: Piece, ahead: cute.Tensor):
        """Start early what a piece needs from global memory; beyond the last piece that may be what any needs."""
        piece = Piece(cutlass.min(piece.unit, args.splits.shape[0] - 2), piece.tile, piece.split)
        self.load_q_rope(args, replace(c, thread=anew(c.thread)), piece)
        ahead[0], ahead[1] = self.extent(args, piece)

    def place_of_p(self, c: Consumer, of: int) -> cute.Pointer:
        return c.shared.k.data_ptr() + (2 * self.chunks + (c.side ^ of)) * CHUNK_ELEMENTS

    def free_p(self, c: Consumer):
        """P's place is used for nothing else."""


def compile_variant(dtype: str, d: int, compute_bound: bool) -> aot.Compiled:
    """Compile for tensors of any extents whose rows, tokens and pages are 16-byte aligned."""
    element = getattr(cutlass, dtype)
    caches = [
        aot.strided(Uint8, (cute.sym_int(), cute.sym_int(), d * element.width // 8), dense_last=True, align=16)
        for _ in range(2)
    ]
    kernel = ComputeBoundSparseDecode if compute_bound else PlainSparseDecode
    return compile_for(kernel(element, d), d, caches)
