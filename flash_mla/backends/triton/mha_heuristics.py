"""Which tiles the Triton kernels of dense multi-head attention take: plain functions, testable without a GPU."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Tiles", "dkdv_tiles", "dq_tiles", "forward_tiles"]

Capability = tuple[int, int]

HOPPER, DATACENTER_BLACKWELL = 9, 10
SMALL_SHARED_MEMORY = (
    (8, 6),
    (8, 9),
    (12, 0),
    (12, 1),
)  # 99 KB a block, against 163 KB of sm_80 and 227 KB of the rest


class Tiles(NamedTuple):
    """A kernel's tile of queries, its tile of keys, and how Triton is to compile it."""

    tile_q: int
    tile_kv: int
    num_warps: int
    num_stages: int


def forward_tiles(capability: Capability, d_qk: int) -> Tiles:
    if capability[0] in (HOPPER, DATACENTER_BLACKWELL):
        return Tiles(128, 64, 8, 3)
    if capability in SMALL_SHARED_MEMORY:
        return Tiles(128, 32, 8, 2)
    return Tiles(128, 64, 8, 2)


def dq_tiles(capability: Capability, d_qk: int) -> Tiles:
    if capability[0] in (HOPPER, DATACENTER_BLACKWELL):
        return Tiles(128, 64, 8, 2)
    if capability in SMALL_SHARED_MEMORY:
        return Tiles(64, 32, 4, 2)
    return Tiles(128, 32, 8, 2)


def dkdv_tiles(capability: Capability, d_qk: int) -> Tiles:
    if capability[0] in (HOPPER, DATACENTER_BLACKWELL):
        return Tiles(64, 128, 8, 2)
    if capability in SMALL_SHARED_MEMORY:
        return Tiles(32, 64, 8, 2)
    return Tiles(32, 128, 8, 2)
