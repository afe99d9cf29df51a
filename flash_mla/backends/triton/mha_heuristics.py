"""Which tiles the Triton kernels of dense multi-head attention take: plain functions, testable without a GPU.

Accumulators decide: a kernel keeps [rows, d] in fp32 in registers (on sm_100 in tensor memory), and spills cost more
than a larger tile gains. dk and dv together are 320 columns wide.
"""

from __future__ import annotations

from typing import NamedTuple

from flash_mla.backends.triton.variants import Capability

__all__ = ["DATACENTER_BLACKWELL", "HOPPER", "Tiles", "dkdv_tiles", "dq_tiles", "forward_tiles"]

HOPPER, DATACENTER_BLACKWELL = 9, 10  # major versions


class Tiles(NamedTuple):
    """A kernel's tile of queries, its tile of keys, and how Triton is to compile it."""

    tile_q: int
    tile_kv: int
    num_warps: int
    num_stages: int


def forward_tiles(capability: Capability, d_qk: int) -> Tiles:
    """acc [tile_q, 128]; q stays in shared memory, k and v are staged."""
    if capability[0] == HOPPER:
        # A fourth stage would fit, but an H200 is slower with it.
        return Tiles(128, 64, 8, 3) if d_qk == 192 else Tiles(64, 64, 4, 3)
    if capability[0] == DATACENTER_BLACKWELL:
        return Tiles(128, 64, 8, 3)
    return Tiles(128, 32, 8, 2)


def dq_tiles(capability: Capability, d_qk: int) -> Tiles:
    """dq [tile_q, d_qk]; q and dout stay in shared memory, k and v are staged."""
    if capability[0] == HOPPER:
        return Tiles(128, 64, 8, 3)
    if capability[0] == DATACENTER_BLACKWELL:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 32, 8, 2)


def dkdv_tiles(capability: Capability, d_qk: int) -> Tiles:
    """dk and dv [tile_kv, d_qk + 128]; k and v stay in shared memory, q and dout are staged."""
    if capability[0] == HOPPER:
        return Tiles(32, 64, 4, 2)
    if capability[0] == DATACENTER_BLACKWELL or d_qk == 128:
        return Tiles(32, 64, 8, 2)
    return Tiles(32, 32, 4, 2)
