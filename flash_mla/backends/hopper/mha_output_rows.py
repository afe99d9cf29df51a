"""What dense MHA writes: from where a warp has staged 16 rows, 64 columns at a time, to global memory."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, range_constexpr
from cutlass.cute.nvgpu import cpasync

from flash_mla.backends.hopper.epilogue import copy_rows_of_warp
from flash_mla.backends.hopper.mha_tiles import chunk_layout, operand, tma
from flash_mla.backends.hopper.wgmma import CHUNK

WARP_ROWS = 16


@dataclass(frozen=True)
class OutputRows:
    """The output, or a gradient by keys or values."""

    rows: cute.Tensor  # [tokens, heads, columns]
    tma: cute.CopyAtom
    by_tma: cute.Tensor  # [tokens, columns, heads]

    @staticmethod
    def of(rows: cute.Tensor) -> OutputRows:
        return OutputRows(rows, *tma(rows, WARP_ROWS, stores=True))


@cute.jit
def write_rows(
    staged: cute.Pointer, to: OutputRows, token: Int32, count: Int32, head: Int32, chunk: cutlass.Constexpr, lane: Int32
):
    """Write columns 64 chunk ... + 63 of tokens `token` ... + 15 of a sequence, of which `count` exist.

    TMA, which knows no sequences, writes them only if all exist. It reads what is staged later: see wait_for_staged.

    Args:
        staged: the rows, swizzled and fenced.
        count: may be < 0 or > 16.
    """
    if count >= WARP_ROWS:
        tile = operand(staged, chunk_layout(staged.dtype, WARP_ROWS))
        tiles = cute.local_tile(cute.domain_offset((token, 0, 0), to.by_tma), (WARP_ROWS, CHUNK), (None, None, None))
        source, chunks = cpasync.tma_partition(
            to.tma, 0, cute.make_layout(1), cute.group_modes(tile, 0, 2), cute.group_modes(tiles, 0, 2)
        )
        cute.copy(to.tma, source, chunks[None, 0, chunk, head])
        with cute.arch.elect_one():
            cute.arch.cp_async_bulk_commit_group()
    else:
        destinations = []
        for i in range_constexpr(4):
            row = lane // 8 + 4 * i
            exists = row < count
            start = to.rows[token + cutlass.select_(exists, row, Int32(0)), head, None].iterator
            destinations.append((exists, start + chunk * CHUNK))
        copy_rows_of_warp(staged, Int32(0), destinations, lane)
        cute.arch.sync_warp()
