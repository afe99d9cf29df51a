"""Which tiles and which splits serve a problem on a GPU: plain functions of shapes, testable without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "START_COST",
    "DenseDecodeConfig",
    "Gpu",
    "SparseConfig",
    "Tiles",
    "combine_tile",
    "dense_decode_config",
    "gpu_of_arch",
    "sparse_config",
    "tiles_for",
]

KB = 1024
# Bytes of shared memory that a program can have, by compute capability (CUDA programming guide, technical
# specifications).
SHARED_MEMORY = {(8, 0): 163 * KB, (8, 7): 163 * KB, (9, 0): 227 * KB, (10, 0): 227 * KB, (10, 3): 227 * KB}
LEAST_SHARED_MEMORY = 99 * KB

# What starting a program on a range of tiles costs, and what merging ranges does, in tiles.
START_COST = 4
COMBINE_COST = 4
# Batch-invariant sparse calls give a program this many tiles, whatever else is in the batch.
INVARIANT_SHARE = 16
# From so many query rows on, programs of combine take several each.
ROWS_TO_FILL_A_GPU = 2048


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on."""

    num_sms: int
    shared_memory: int  # bytes that a program can have
    has_fp8: bool  # converts e4m3 in hardware
    has_wgmma: bool  # multiplies 64 rows at a time, from shared memory


@dataclass(frozen=True)
class Tiles:
    """How one program works: `rows` query rows by `tile` tokens at a time."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@dataclass(frozen=True)
class DenseDecodeConfig:
    """How dense decode is laid out."""

    tiles: Tiles
    row_tiles: int  # programs of a worker: tiles of query rows taken side by side
    passes: int  # turns a worker takes over the rows of a request and KV head
    num_workers: int

    @property
    def unit_rows(self) -> int:
        """Query rows of a unit of the plan."""
        return self.row_tiles * self.tiles.rows


@dataclass(frozen=True)
class SparseConfig:
    """How token-sparse attention is laid out."""

    tiles: Tiles
    row_tiles: int
    splits: int  # equal ranges that the indices of a query token are cut into

    @property
    def unit_rows(self) -> int:
        return self.row_tiles * self.tiles.rows


def gpu_of_arch(major: int, minor: int, num_sms: int) -> Gpu:
    """The GPU of a compute capability."""
    return Gpu(
        num_sms,
        SHARED_MEMORY.get((major, minor), LEAST_SHARED_MEMORY),
        has_fp8=(major, minor) >= (8, 9),
        has_wgmma=major == 9,
    )


def tiles_for(rows: int, gpu: Gpu, *, quantised: bool) -> Tiles:
    """The shape of a program's work where there are `rows` query rows to a token.

    The output [rows, 512] stays in registers and q [rows, 576] in shared memory or registers, so many rows are what a
    large GPU wants and a small one cannot hold.
    """
    # Registers hold a quantised tile twice while it is converted: more warps then, or fewer tokens.
    narrow = 8 if quantised else 4
    if gpu.shared_memory < 160 * KB:
        return Tiles(16, 16, narrow, 2, 1)
    if not gpu.has_wgmma:
        tile = 16 if quantised else 32
        return Tiles(16, tile, narrow, 3, 1) if rows <= 16 else Tiles(32, tile, 8, 2, 1)
    if rows <= 16:
        return Tiles(16, 32, narrow, 3, 1) if quantised else Tiles(16, 64, narrow, 2, 2)
    if rows <= 32:
        return Tiles(32, 32 if quantised else 64, 8, 3, 1)
    return Tiles(64, 64, 8, 2, 1)


def dense_decode_config(rows: int, gpu: Gpu, *, quantised: bool) -> DenseDecodeConfig:
    """The layout for `rows` packed query rows (query tokens x heads) of each request and KV head."""
    tiles = tiles_for(rows, gpu, quantised=quantised)
    num_tiles = -(-rows // tiles.rows)
    programs = gpu.num_sms * tiles.programs_per_sm

    def busy(row_tiles: int) -> float:
        passes = -(-num_tiles // row_tiles)
        return num_tiles / (passes * row_tiles) * (programs // row_tiles * row_tiles) / programs

    # Programs that take different rows of a unit side by side find its KV in L2.
    row_tiles = max(range(1, min(num_tiles, 8, programs) + 1), key=lambda n: (round(busy(n), 2), n))
    return DenseDecodeConfig(tiles, row_tiles, -(-num_tiles // row_tiles), programs // row_tiles)


def sparse_config(
    h_q: int, num_units: int, topk: int, extra_topk: int, gpu: Gpu, *, quantised: bool, batch_invariant: bool = False
) -> SparseConfig:
    """The layout for `num_units` query tokens of h_q heads and up to topk + extra_topk indices."""
    tiles = tiles_for(h_q, gpu, quantised=quantised)
    row_tiles = -(-h_q // tiles.rows)
    num_tiles = -(-topk // tiles.tile) + -(-extra_topk // tiles.tile)
    if batch_invariant:
        return SparseConfig(tiles, row_tiles, max(1, -(-num_tiles // INVARIANT_SHARE)))
    at_once = gpu.num_sms * tiles.programs_per_sm

    def cost(splits: int) -> int:
        waves = -(-num_units * row_tiles * splits // at_once)
        return waves * (-(-num_tiles // splits) + START_COST) + (COMBINE_COST if splits > 1 else 0)

    return SparseConfig(tiles, row_tiles, min(range(1, max(1, min(num_tiles, at_once)) + 1), key=cost))


def combine_tile(num_rows: int, *, batch_invariant: bool) -> tuple[int, int]:
    """(rows of a program, slots it reads at a time) where results of `num_rows` query rows are to be merged.

    Slots read together are summed up before the sum so far is added: for a result whose bits do not depend on the
    batch, their number must not either.
    """
    return (4, 2) if num_rows >= ROWS_TO_FILL_A_GPU and not batch_invariant else (1, 16)
