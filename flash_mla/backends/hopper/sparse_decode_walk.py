"""How sparse decode's roles walk their worker's share: from a unit to its tiles, and to the tokens that these name."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from flash_mla.backends.hopper.copies import copy_async, prefetch
from flash_mla.backends.hopper.divisor import Divisor
from flash_mla.backends.hopper.schedule import Piece, next_piece, piece_stop, remains, slot_of, uniform
from flash_mla.backends.hopper.wgmma import ROWS

TILE_BITS = 7
TILE = 1 << TILE_BITS  # tokens in a tile of the plan


@dataclass(frozen=True)
class Arguments:
    """What every role reads of the call; shapes at `SparseDecode.__call__`."""

    q: cute.Tensor
    main: "Source"
    extra: "Source"
    sink: cute.Tensor
    work: cute.Tensor
    splits: cute.Tensor
    partial_o: cute.Tensor
    partial_lse: cute.Tensor
    partial_scale: cute.Tensor | None  # None if partial outputs are fp32
    out: cute.Tensor
    lse: cute.Tensor
    scale_log2: Float32
    run: Divisor
    tokens: Divisor  # query tokens of a request
    passes: Divisor  # units that the heads of a query token make
    causal: Int32
    batch_invariant: Int32

    def prefetch(self):
        """Bring to the L2 what every worker reads first, before it is known where; for one warp."""
        prefetch(self.work[cute.arch.block_idx()[1], None].iterator.toint())
        for vector in (self.main.lengths, self.extra.lengths, self.splits, self.sink):
            first = cutlass.min(cute.arch.lane_idx() * 32, vector.shape[0] - 1)
            prefetch((vector.iterator + first * vector.stride[0]).toint())

    def prefetch_indices(self):
        """Bring to the L2 what are a worker's first indices if all units have as many tiles; for one warp."""
        worker, workers = cute.arch.block_idx()[1], cute.arch.grid_dim()[1]
        begin = Float32(worker * (self.splits.shape[0] - 1)) * cute.arch.rcp_approx(Float32(workers))  # in units
        unit = Int32(begin)
        request, token, _ = self.place(unit)
        for source in (self.main, self.extra):
            entries = source.indices.shape[2]
            # Where a unit is cut, tiles of two caches may begin up to a tile earlier.
            first = cutlass.max(Int32((begin - Float32(unit)) * Float32(entries)) - TILE, 0)
            entry = cutlass.max(cutlass.min(first + cute.arch.lane_idx() * 32, entries - 1), 0)
            prefetch((source.indices[request, token, None].iterator + entry).toint())

    def place(self, unit: Int32) -> tuple[Int32, Int32, Int32]:
        """(request, query token, pass over its heads) of a unit."""
        query = self.passes.quotient(unit)
        request = self.tokens.quotient(query)
        return request, query - request * self.tokens.value, unit - query * self.passes.value

    def rows(self, piece) -> "Rows":
        """The query rows of this CTA in the piece's unit."""
        request, token, turn = self.place(piece.unit)
        head_tile = turn * cute.arch.grid_dim()[0] + cute.arch.block_idx()[0]
        return Rows(request, token, head_tile, self.q.shape[2] - head_tile * ROWS)

    def lengths(self, piece) -> tuple[Int32, Int32]:
        """Entries of the indices into the main and the extra cache that count."""
        request, _, _ = self.place(piece.unit)
        return tuple(source.length(request, self.run.value) for source in (self.main, self.extra))

    def entries(self, piece) -> tuple[Int32, Int64, Int64]:
        """(last tokens that the query must not see, addresses of its indices into the main and the extra cache)."""
        request, token, _ = self.place(piece.unit)
        hidden = self.causal * (self.tokens.value - 1 - token)
        sources = (self.main, self.extra)
        return hidden, *(source.indices[request, token, None].iterator.toint() for source in sources)

    def slot(self, piece: Piece) -> Int32:
        """Where the piece's partial result goes, or -1 if it is a whole unit."""
        return slot_of(self.splits, piece)


@dataclass(frozen=True)
class Source:
    """A cache, and indices into it."""

    cache: cute.Tensor
    page_size: Divisor
    token_bytes: Int64 | int  # from one token of a page to the next
    indices: cute.Tensor
    lengths: cute.Tensor

    def length(self, request: Int32, run: Int32) -> Int32:
        return uniform(cutlass.max(0, cutlass.min(self.lengths[request], self.indices.shape[2] * run)))


@dataclass(frozen=True)
class Rows:
    """The heads of one query token that a CTA attends with."""

    request: Int32
    token: Int32
    head_tile: Int32
    count: Int32  # of heads that exist, from the tile's first on; may be <= 0


class Cursor:
    """A tile of a worker's share: in a piece of `unit` that ends before tile `stop`. Lives in registers, across loops.

    Behind the last piece, `exists` is false.
    """

    def __init__(self, unit, tile, stop, opens, length, extra_length, hidden, entries, extra_entries):
        self.unit, self.tile, self.stop = unit, tile, stop
        self.opens = opens  # 1 for the first tile of a piece
        self.length, self.extra_length = length, extra_length  # tokens of the unit
        self.hidden = hidden  # how many of the last ones its query must not see
        self.entries, self.extra_entries = entries, extra_entries  # addresses of the unit's indices

    def advanced(self) -> "Cursor":
        """The next tile of the piece."""
        of_unit = (self.length, self.extra_length, self.hidden, self.entries, self.extra_entries)
        return Cursor(self.unit, self.tile + 1, self.stop, Int32(0), *of_unit)

    @property
    def exists(self):
        return self.tile < self.stop

    @property
    def is_extra(self):
        """Whether the tile is of the extra cache; its tiles follow those of the main one."""
        return self.tile >= tiles_of(self.length)

    def position(self, token: Int32) -> Int32:
        """Of a token of the tile, among those of the tile's cache."""
        main_tiles = cutlass.select_(self.is_extra, tiles_of(self.length), Int32(0))
        return (self.tile - main_tiles) * TILE + token

    def __extract_mlir_values__(self):
        small = (self.unit, self.tile, self.stop, self.opens, self.length, self.extra_length, self.hidden)
        return [value.ir_value() for value in (*small, self.entries, self.extra_entries)]

    def __new_from_mlir_values__(self, values):
        return Cursor(*(Int32(value) for value in values[:7]), *(Int64(value) for value in values[7:]))


class Tokens:
    """The token that a producer lane looks up of a tile. Lives in registers, across loops.

    row: address, or 0 if it is not to be attended to. scales: how much farther its scales begin, if they are apart.
    extra: whether the tile is of the extra cache, if that is of another format.
    """

    def __init__(self, row: Int64, scales: Int32 | None, extra: Int32 | None):
        self.row, self.scales, self.extra = row, scales, extra

    @staticmethod
    def none(scales_apart: bool, two_formats: bool) -> "Tokens":
        """No token to attend to."""
        return Tokens(Int64(0), Int32(0) if scales_apart else None, Int32(0) if two_formats else None)

    def __extract_mlir_values__(self):
        return [value.ir_value() for value in (self.row, self.scales, self.extra) if value is not None]

    def __new_from_mlir_values__(self, values):
        rest = iter(values[1:])
        scales, extra = (None if value is None else Int32(next(rest)) for value in (self.scales, self.extra))
        return Tokens(Int64(values[0]), scales, extra)

    def of_lane(self, lane: Int32) -> tuple:
        """(row, its scales, extra) of the token of another lane."""
        row = cute.arch.shuffle_sync(self.row, lane)
        scales = row if self.scales is None else row + Int64(cute.arch.shuffle_sync(self.scales, lane))
        return row, scales, self.extra

    def unless(self, condition, other: "Tokens") -> "Tokens":
        """These tokens, or the others if the condition holds."""
        row, scales, extra = (
            None if mine is None else cutlass.select_(condition, theirs, mine)
            for mine, theirs in ((self.row, other.row), (self.scales, other.scales), (self.extra, other.extra))
        )
        return Tokens(row, scales, extra)


class TokenWalk:
    """How producers walk their worker's tiles and look tokens up; kernels inherit it."""

    dtype: type[cutlass.Numeric]
    loader: Any  # of `dequant`: how the main cache's rows lie in it
    extra_loader: Any = None  # of the extra cache, if it is of another format
    scales_apart = False  # whether a page holds its scales behind all its rows

    @cute.jit
    def settle(self, args, piece: Piece, end):
        """The first tile from the beginning of `piece` on."""
        stop, length, extra_length = Int32(0), Int32(0), Int32(0)
        while remains(piece, end) & (stop <= piece.tile):
            length, extra_length = args.lengths(piece)
            tiles = tiles_of(length) + tiles_of(extra_length)
            stop = piece_stop(piece, end, tiles, args.batch_invariant)
            if stop <= piece.tile:
                piece = next_piece(piece, stop, tiles)
                stop = Int32(0)
        hidden, entries, extra_entries = args.entries(piece)
        return Cursor(piece.unit, piece.tile, stop, Int32(1), length, extra_length, hidden, entries, extra_entries)

    @cute.jit
    def next_cursor(self, args, cursor: Cursor, end):
        following = cursor.advanced()
        if following.tile == following.stop:
            # Which piece of its unit it is, is of no concern here.
            tiles = tiles_of(cursor.length) + tiles_of(cursor.extra_length)
            piece = next_piece(Piece(cursor.unit, cursor.tile, Int32(0)), cursor.stop, tiles)
            following = self.settle(args, piece, end)
        return following

    def entry(self, args, position: Int32) -> Int32:
        """Of the indices: the one that names a token, by the token's position."""
        return cutlass.select_(args.run.value == 1, position, args.run.quotient(position))

    @cute.jit
    def fetch_index(self, args, cursor: Cursor, lane):
        """Start to bring the index that this lane looks up: of a run of slots, or less than 0 if there is none."""
        length = cutlass.select_(cursor.is_extra, cursor.extra_length, cursor.length)
        position = cursor.position(lane.token)
        if position < cutlass.select_(cursor.exists, length - cursor.hidden, Int32(0)):
            entry = self.entry(args, position)
            entries = cutlass.select_(cursor.is_extra, cursor.extra_entries, cursor.entries)
            copy_async((lane.index, 0), entries, (entries + Int64(entry) * 4, 0), 4)
        else:
            cute.arch.inline_ptx("st.shared.s32 [{$r0}], -1;", read_only_args=[lane.index])

    @cute.jit
    def locate(self, args, cursor: Cursor, lane):
        """The token whose index of the cursor's tile has arrived."""
        index = cute.arch.inline_ptx(
            "ld.shared.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[lane.index]
        )
        position = cursor.position(lane.token)
        slot = (index - self.entry(args, position)) * args.run.value + position
        extra = cursor.is_extra
        sources = (args.main, args.extra)
        page_size, inverse, num_pages, page_bytes, token_bytes, base = (
            cutlass.select_(extra, of_extra, of_main)
            for of_main, of_extra in (
                [source.page_size.value for source in sources],
                [source.page_size.inverse for source in sources],
                [source.cache.shape[0] for source in sources],
                [Int64(source.cache.stride[0]) for source in sources],
                [Int64(source.token_bytes) for source in sources],
                [source.cache.iterator.toint() for source in sources],
            )
        )
        page = Divisor(page_size, inverse).quotient(slot)
        offset = slot - page * page_size
        row = base + Int64(page) * page_bytes + Int64(offset) * token_bytes
        scales = None
        if const_expr(self.scales_apart):
            scales = (page_size - offset) * self.loader.token_bytes + offset * 8
        row = cutlass.select_((slot >= 0) & (page < num_pages), row, Int64(0))
        return Tokens(row, scales, None if self.extra_loader is None else Int32(extra))


def tiles_of(length: Int32) -> Int32:
    return (length + (TILE - 1)) >> TILE_BITS  # a division would round towards 0, and correct that
