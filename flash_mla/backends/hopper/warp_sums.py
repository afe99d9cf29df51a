"""Sums over the lanes of a warp."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


def inclusive_sum(value: Int32, lane: Int32) -> Int32:
    """Sum over this lane and those before it."""
    for i in range(5):
        other = cute.arch.shuffle_sync_up(value, 1 << i, mask_and_clamp=0)
        value = value + cutlass.select_(lane >= (1 << i), other, Int32(0))
    return value
