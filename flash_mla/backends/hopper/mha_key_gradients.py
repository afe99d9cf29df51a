"""dK and dV of dense MHA's backward: from where a warp has staged 16 keys, 64 columns at a time, to global memory."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, range_constexpr
from cutlass.cute.nvgpu import cpasync

from flash_mla.backends.hopper.epilogue import copy_rows_of_warp
from flash_mla.backends.hopper.mha_schedule import KeyTile
from flash_mla.backends.hopper.mha_tiles import chunk_layout, operand, tma
from flash_mla.backends.hopper.wgmma import CHUNK

WARP_KEYS = 16


@dataclass(frozen=True)
class KeyGradient:
    """dK or dV."""

    rows: cute.Tensor  # [total_kv, h_kv, columns]
    tma: cute.CopyAtom
    by_tma: cute.Tensor  # [total_kv, columns, h_kv]

    @staticmethod
    def of(rows: cute.Tensor) -> KeyGradient:
        return KeyGradient(rows, *tma(rows, WARP_KEYS, stores=True))


@cute.jit
def write_keys(
    staging: cute.Pointer, to: KeyGradient, work: KeyTile, first: Int32, chunk: cutlass.Constexpr, lane: Int32
):
    """Write columns 64 chunk ... + 63 of a work tile's keys first ... + 15 that exist.

    TMA, which knows no sequences, writes them only if all exist. It reads what is staged later: see wait_for_staged.

    Args:
        staging: of 64 keys, swizzled; this warp's 16 are fenced.
    """
    first_staged = first % CHUNK
    if first + WARP_KEYS <= work.keys:
        staged = operand(staging + first_staged * CHUNK, chunk_layout(staging.dtype, WARP_KEYS))
        tiles = cute.local_tile(
            cute.domain_offset((work.kv_row + first, 0, 0), to.by_tma), (WARP_KEYS, CHUNK), (None, None, None)
        )
        source, chunks = cpasync.tma_partition(
            to.tma, 0, cute.make_layout(1), cute.group_modes(staged, 0, 2), cute.group_modes(tiles, 0, 2)
        )
        cute.copy(to.tma, source, chunks[None, 0, chunk, work.kv_head])
        with cute.arch.elect_one():
            cute.arch.cp_async_bulk_commit_group()
    else:
        destinations = []
        for i in range_constexpr(4):
            key = first + lane // 8 + 4 * i
            exists = key < work.keys
            token = work.kv_row + cutlass.select_(exists, key, Int32(0))
            destinations.append((exists, to.rows[token, work.kv_head, None].iterator + chunk * CHUNK))
        copy_rows_of_warp(staging, first_staged, destinations, lane)
        cute.arch.sync_warp()
