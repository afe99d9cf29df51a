"""Token-sparse MLA decode over a quantised cache: the consumers of sparse_decode, and producers that convert.

The producer warpgroup gathers the named rows and converts them to 16 bits, half a row at a time, and has the raw bytes
of two or three more half rows on their way, across pieces too. In a cluster each CTA converts half of the rows and
copies them to the other.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Int32, Int64, Uint8, const_expr, range_constexpr

from flash_mla.backends.hopper import aot, dequant
from flash_mla.backends.hopper.copies import wait_copies
from flash_mla.backends.hopper.dequant import (
    CHUNK_BYTES,
    HALF_CHUNKS,
    THREADS_PER_ROW,
    UNIT,
    bf16_to_fp16,
    load_words,
    store_words,
)
from flash_mla.backends.hopper.schedule import end_of_work, first_piece
from flash_mla.backends.hopper.sparse_decode import (
    BLOCK,
    CHUNK_ELEMENTS,
    OCTET,
    REGISTERS,
    ROW_BYTES,
    V_CHUNKS,
    WARPGROUP,
    SparseDecode,
    compile_for,
)
from flash_mla.backends.hopper.sparse_decode_walk import Tokens

TWO_FORMAT_REGISTERS = (216, 72)  # of a consumer and of a producer thread: what ptxas fits without spilling


@dataclass(frozen=True)
class Lane:
    """What a producer thread works on."""

    warp: Int32
    row: Int32  # of the eight that its warp converts at a time
    slots: dequant.Slots  # of raw bytes
    k: Int32  # address of its columns in the first of eight rows of block 0
    plain: Int32  # address of its columns there in the chunk that is copied as it is
    token: Int32  # of a tile: the one that it looks up
    index: Int32  # address of that token's index


class QuantisedSparseDecode(SparseDecode):
    def __init__(self, dtype: type[cutlass.Numeric], kv_format: str, cluster: int, extra_format: str | None = None):
        self.loader = getattr(dequant, kv_format)(dtype)
        registers = REGISTERS if extra_format is None else TWO_FORMAT_REGISTERS
        super().__init__(dtype, self.loader.d, cluster, self.loader.raw_bytes(), registers)
        if extra_format is not None:  # its raw bytes take no other places than the main one's
            self.extra_loader = getattr(dequant, extra_format)(dtype)
        # Theirs would wait for their copies under way, too; but before they hand rows to the peer they need one anyway.
        self.stores_unfenced = cluster == 1
        self.scales_apart = self.loader.scales_apart
        # Whether the chunk that rows hold in bf16 has to become fp16, in its place.
        self.converts_plain = self.loader.plain_chunk is not None and dtype is Float16
        self.octets = BLOCK // OCTET // 4 // cluster  # that each producer warp converts of a block

    def token_bytes(self, cache: cute.Tensor, is_extra: bool) -> int:
        return ((self.extra_loader if is_extra else None) or self.loader).token_bytes

    def copies(self, block: int, half: int) -> int:
        # Every producer thread copies a part of what is not to be converted.
        return WARPGROUP if self.comes_with_copies(block, half) and not self.converts_plain else 0

    def comes_with_copies(self, block, half):
        """Whether a half of a block comes with the chunk that is copied to its place: RoPE with the late half."""
        if self.loader.plain_chunk is None:
            return False
        return (block ^ half) != 0 if self.loader.plain_chunk == V_CHUNKS else half != 0

    def lane(self, shared, thread: Int32) -> Lane:
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        u, row = lane % THREADS_PER_ROW, lane // THREADS_PER_ROW
        k = Int32(shared.k.data_ptr().toint()) + row * ROW_BYTES
        return Lane(
            warp=warp,
            row=row,
            slots=self.loader.slots(Int32(shared.raw.data_ptr().toint()), thread),
            # Columns 16 u are the units 2 u and 2 u + 1 of a chunk's row, which the swizzle permutes.
            k=k + ((2 * u) ^ row) * UNIT,
            plain=k + (self.loader.plain_chunk or 0) * CHUNK_BYTES + (u ^ row) * UNIT,
            token=self.token(warp, lane),
            index=Int32(shared.indices.data_ptr().toint()) + thread * 4,
        )

    @cute.jit
    def produce(self, args, shared, barriers, tma_q: cute.CopyAtom, q_tma: cute.Tensor, thread: Int32):
        lane = self.lane(shared, thread)
        end = end_of_work(args.work)

        cursor = self.settle(args, first_piece(args.work), end)
        self.fetch_index(args, cursor, lane)
        cute.arch.cp_async_commit_group()
        wait_copies(0)

        tiles, pieces, opened, slot = Int32(0), Int32(1), Int32(-1), Int32(0)
        # The first turn looks tokens up and converts none: code that is not there twice is sooner in the caches.
        tokens, exists = Tokens.none(self.scales_apart, self.extra_loader is not None), cutlass.Boolean(False)
        while exists | cursor.exists:
            next_tokens = self.locate(args, cursor, lane)
            next_exists = cursor.exists
            next_opened = cutlass.select_(exists & next_exists & (cursor.opens != 0), cursor.unit, Int32(-1))
            if not exists:
                for i in range_constexpr(self.loader.half_rows):
                    (block, late), octet = self.place(i)
                    token = next_tokens.of_lane(block * (2 * OCTET) + octet * OCTET + lane.row)
                    self.fetch(lane, i, Int32(block ^ late), Int32(late), token, range(HALF_CHUNKS))
                if lane.warp == 0:  # behind the rows, which take longer: they have to be converted
                    self.load_q(args, shared, barriers, tma_q, q_tma, cursor.unit, Int32(0))
            cursor = self.next_cursor(args, cursor, end)
            self.fetch_index(args, cursor, lane)
            if not exists:
                cute.arch.cp_async_commit_group()
                wait_copies(0)
            else:
                attended = cute.arch.vote_ballot_sync(tokens.row != 0)
                for step in cutlass.range(4, unroll=1):
                    block, late = step >> 1, step & 1
                    cute.arch.mbarrier_wait(barriers.k_empty + (2 * block + (block ^ late)), (tiles & 1) ^ 1)
                    if step == 0 and lane.warp == 0 and opened >= 0:
                        self.load_q(args, shared, barriers, tma_q, q_tma, opened, pieces)
                    if late == 0:
                        self.note_attended(shared, attended, block, lane.warp)
                    slot = self.fill(shared, barriers, lane, tokens, next_tokens, block, late, slot)
                pieces += cutlass.select_(opened >= 0, Int32(1), Int32(0))
                tiles += 1
            tokens, exists, opened = next_tokens, next_exists, next_opened

    def place(self, number):
        """((block, whether it is the late half), octet) of a tile's half rows, in the order of their conversion."""
        step, octet = (number >> 1, number & 1) if self.octets == 2 else (number, 0)
        return (step >> 1 & 1, step & 1), octet

    @cute.jit
    def fill(
        self, shared, barriers, lane: Lane, tokens: Tokens, next_tokens: Tokens, block: Int32, late: Int32, slot: Int32
    ):
        """Convert half a block of a tile, its first half, or the one that is `late`, out of slots from `slot` on.

        The slot that comes next is returned.
        """
        half = block ^ late
        full = barriers.k_full + (2 * block + half)
        half_rows = self.loader.half_rows
        pending = half_rows - 1 + self.converts_plain  # groups of copies behind the one that is needed
        if const_expr(self.loader.plain_chunk is not None):
            if self.comes_with_copies(block, half):
                self.copy_plain(lane, tokens, block, full)
        if const_expr(self.converts_plain):
            cute.arch.cp_async_commit_group()
        for i in range_constexpr(self.octets):
            index = i if const_expr(half_rows == self.octets) else slot
            ahead = (2 * block + late) * self.octets + (i + half_rows)
            (next_block, next_late), octet = self.place(ahead)
            sources = tokens.unless(ahead >= 4 * self.octets, next_tokens)
            token = sources.of_lane(next_block * (2 * OCTET) + octet * OCTET + lane.row)
            to = lane.k + block * (self.chunks * CHUNK_BYTES) + self.octet(lane.warp, i) * (OCTET * ROW_BYTES)
            wait_copies(pending)
            cute.arch.sync_warp()
            following = (next_block ^ next_late, next_late, token)
            if const_expr(self.extra_loader is not None):
                if tokens.extra != 0:
                    self.convert(self.extra_loader, lane, index, half, late, to, following)
                else:
                    self.convert(self.loader, lane, index, half, late, to, following)
            else:
                self.convert(self.loader, lane, index, half, late, to, following)
            slot = cutlass.select_(slot + 1 == half_rows, Int32(0), slot + 1)
        if const_expr(self.converts_plain):
            if self.comes_with_copies(block, half):
                wait_copies(self.octets)
                self.convert_plain(lane, block)
        if const_expr(self.cluster == 1):
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(full)
        else:
            self.push(shared, lane, block, half, full, barriers.peer)
        return slot

    @cute.jit
    def fetch(self, lane: Lane, index, half: Int32, late: Int32, token: tuple, chunks: cutlass.Constexpr):
        """Start the copies of some chunks of half a row, in order, into the slots number `index`."""
        row, scales, extra = token
        if const_expr(self.extra_loader is not None):
            if extra != 0:
                self.extra_loader.fetch(lane.slots, index, half, row, scales, chunks)
            else:
                self.loader.fetch(lane.slots, index, half, row, scales, chunks)
        else:
            self.loader.fetch(lane.slots, index, half, row, scales, chunks)
        if const_expr(HALF_CHUNKS - 1 in chunks):
            if const_expr(self.loader.rope_codes):
                if late != 0:
                    self.loader.fetch_rope(lane.slots, index, row)
            cute.arch.cp_async_commit_group()

    @cute.jit
    def convert(
        self, loader: cutlass.Constexpr, lane: Lane, index, half: Int32, late: Int32, to: Int32, following: tuple
    ):
        """Half a row out of its slots, which at once take the following (half, late, token), and into K at `to`."""
        if const_expr(loader.rope_codes):
            if late != 0:
                at = to + V_CHUNKS * CHUNK_BYTES
                self.loader.store_rope(lane.slots, index, (at, at ^ UNIT))
        scales = loader.read_scales(lane.slots, index, half)
        codes = [loader.read_codes(lane.slots, index, chunk) for chunk in range(2)]
        # What has been read makes room at once; where there are two slots only, that measured 0.7 % slower.
        early = len(codes) if self.loader.half_rows > 2 else 0
        if const_expr(early > 0):
            self.fetch(lane, index, *following, range(early))
        to += half * (HALF_CHUNKS * CHUNK_BYTES)
        for chunk in range_constexpr(HALF_CHUNKS):
            if const_expr(chunk + 2 < HALF_CHUNKS):  # two chunks ahead: registers do not suffice for more
                codes.append(loader.read_codes(lane.slots, index, chunk + 2))
            if const_expr(chunk + 3 == HALF_CHUNKS):
                self.fetch(lane, index, *following, range(early, HALF_CHUNKS))
            if const_expr(loader.plain_chunk == HALF_CHUNKS + chunk):
                if half == 0:
                    self.store(loader, lane, codes[chunk], scales, to, chunk)
            else:
                self.store(loader, lane, codes[chunk], scales, to, chunk)

    def store(self, loader: dequant.Loader, lane: Lane, codes: tuple, scales: tuple, to: Int32, chunk: int):
        """A chunk of half a row into K, the half beginning at `to`."""
        scale = loader.scale(scales, chunk, lane.slots.thread % THREADS_PER_ROW)
        loader.store(codes, scale, (to, to ^ UNIT), chunk * CHUNK_BYTES)

    @cute.jit
    def copy_plain(self, lane: Lane, tokens: Tokens, block: Int32, full: cute.Pointer):
        """Copy the values that need no conversion, of all tokens of a block that this warp looks up, into K."""
        u = lane.slots.thread % THREADS_PER_ROW
        for i in range_constexpr(2):
            row = cute.arch.shuffle_sync(tokens.row, block * (2 * OCTET) + i * OCTET + lane.row)
            to = self.plain_place(lane, block, i)
            for units in range_constexpr(0, 2 * THREADS_PER_ROW, THREADS_PER_ROW):
                source = (row + Int64(u * UNIT), self.loader.plain_offset + units * UNIT)
                self.loader.copy((to ^ (units * UNIT), 0), row, source, UNIT)
        if const_expr(not self.converts_plain):
            cute.arch.cp_async_mbarrier_arrive_noinc(full)

    def convert_plain(self, lane: Lane, block: Int32):
        """What this thread has copied of a block by `copy_plain`, to fp16, in place."""
        for i in range(2):
            for units in range(0, 2 * THREADS_PER_ROW, THREADS_PER_ROW):
                at = self.plain_place(lane, block, i) ^ (units * UNIT)
                store_words(at, 0, tuple(bf16_to_fp16(word) for word in load_words(at, 0, 4)))

    def plain_place(self, lane: Lane, block: Int32, i: int) -> Int32:
        return lane.plain + block * (self.chunks * CHUNK_BYTES) + self.octet(lane.warp, i) * (OCTET * ROW_BYTES)

    @cute.jit
    def push(self, shared, lane: Lane, block: Int32, half: Int32, full: cute.Pointer, peer: Int32):
        """Copy what this warp has converted, eight rows of half a block, to the same place in the peer's memory."""
        start = shared.k.data_ptr() + block * self.chunks * CHUNK_ELEMENTS
        source = Int32(start.toint()) + self.octet(lane.warp, 0) * (OCTET * ROW_BYTES)
        there = remote(source, peer) - source
        first = source + half * (HALF_CHUNKS * CHUNK_BYTES)
        full_there = Int32(full.toint()) + there
        # Of four chunks the last may not be converted.
        last_is_plain = self.loader.plain_chunk == V_CHUNKS - 1
        count = HALF_CHUNKS - (half if const_expr(last_is_plain) else 0)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            # The peer's warp of the same number sends as much.
            cute.arch.mbarrier_arrive_and_expect_tx(full, count * (OCTET * ROW_BYTES))
            for chunk in range_constexpr(HALF_CHUNKS - last_is_plain):
                push_octet(first + chunk * CHUNK_BYTES, there, full_there)
            if const_expr(last_is_plain):
                if half == 0:
                    push_octet(first + (HALF_CHUNKS - 1) * CHUNK_BYTES, there, full_there)


def push_octet(source: Int32, there: Int32, full_there: Int32) -> None:
    """Copy eight rows of a chunk, one swizzle atom, to the peer's shared memory, `there` farther."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        f"[{{$r0}}], [{{$r1}}], {OCTET * ROW_BYTES}, [{{$r2}}];",
        read_only_args=[source + there, source, full_there],
    )


def remote(address: Int32, peer: Int32) -> Int32:
    """The place of a shared-memory address in the peer's memory."""
    there = cute.arch.inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[address, peer]
    )
    return cute.arch.make_warp_uniform(there)


def compile_variant(dtype: str, kv_format: str, cluster: int, extra_format: str | None = None) -> aot.Compiled:
    """Compile for tensors of any extents whose rows, tokens and pages are 16-byte aligned."""
    kernel = QuantisedSparseDecode(getattr(cutlass, dtype), kv_format, cluster, extra_format)
    caches = [aot.strided(Uint8, (cute.sym_int(), cute.sym_int()), dense_last=True, align=16) for _ in range(2)]
    return compile_for(kernel, kernel.loader.d, caches)
