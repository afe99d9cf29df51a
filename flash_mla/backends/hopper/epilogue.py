"""From a warpgroup's 64 x 256 output accumulator to global memory in full sectors.

A thread holds columns 8 j + 2 (lane % 4) + {0, 1} of its rows lane / 4 + {0, 8} in elements 4 j + 2 r + {0, 1}: written
as they are, rows of 16-bit values would go out in 4-byte pieces.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, range_constexpr

from flash_mla.backends.hopper.softmax import largest, quad_max
from flash_mla.backends.hopper.wgmma import CHUNK

COLUMNS = 256
FP16_TOP = 2.0**15
LEAST_SCALE, MOST_SCALE = 2.0**-115, 2.0**113  # which have inverses, and times which FP16_TOP is fp32's range


@cute.jit
def chunk_of(o: cute.Tensor, chunk: cutlass.Constexpr, inv: cute.Tensor, to: cute.Tensor):
    """Columns 64 chunk ... + 63 of the accumulator, scaled by inv[r] and rounded, in the order of a 64 x 64 one."""
    for e in range_constexpr(cute.size(to)):
        to[e] = (o[32 * chunk + e] * inv[e // 2 % 2]).to(to.element_type)


@cute.jit
def copy_rows_of_warp(staging: cute.Pointer, first_row: Int32, destinations: list, lane: Int32):
    """16 staged rows of 64 columns (swizzled, written by this warp) to where `destinations` say, 16 bytes a lane.

    destinations: (exists, global pointer of the chunk's first column) of this lane's rows: first_row + lane / 8 + 4 i.
    """
    for i in range_constexpr(4):
        row = first_row + lane // 8 + 4 * i
        exists, to = destinations[i]
        if exists:
            unit = (lane % 8) ^ (row % 8)
            values = cute.make_rmem_tensor(8, staging.dtype)
            layout = cute.make_layout(8)
            cute.autovec_copy(cute.make_tensor((staging + row * CHUNK + unit * 8).align(16), layout), values)
            cute.autovec_copy(values, cute.make_tensor((to + lane % 8 * 8).align(16), layout))


@cute.jit
def write_fp32_row(o: cute.Tensor, r: cutlass.Constexpr, inv: Float32, to: cute.Pointer, exists, lane: Int32):
    """This thread's part of its row r as fp32: the 8 bytes each of four neighbouring lanes are a sector."""
    start = to + 2 * (lane % 4)
    if exists:
        for j in range_constexpr(COLUMNS // 8):
            values = cute.make_rmem_tensor(2, Float32)
            for c in range_constexpr(2):
                values[c] = o[4 * j + 2 * r + c] * inv
            cute.autovec_copy(values, cute.make_tensor((start + 8 * j).align(8), cute.make_layout(2)))


@cute.jit
def write_scaled_row(o: cute.Tensor, r: cutlass.Constexpr, to: cute.Pointer, exists, lane: Int32) -> Float32:
    """This thread's part of its row r as fp16, 16 bytes at once, in the order of a scaled `Combine`; returns the scale.

    It takes the row's largest magnitude to the top of fp16's range: what is at least 2^-29 of that keeps 11 bits, three
    more than P had when it went into o.
    """
    start = to + lane % 4 * 8
    magnitudes = []
    for i in range_constexpr(COLUMNS // 4):
        value = o[4 * (i // 2) + 2 * r + i % 2]
        magnitudes.append(cute.arch.fmax(value, -value))
    scale = quad_max(largest(magnitudes)) * (1.0 / FP16_TOP)
    scale = cute.arch.fmin(cute.arch.fmax(scale, LEAST_SCALE), MOST_SCALE)
    inv = cute.arch.rcp_approx(scale)
    if exists:
        for j in range_constexpr(0, COLUMNS // 8, 4):
            values = cute.make_rmem_tensor(8, Float16)
            for c in range_constexpr(8):
                values[c] = (o[4 * (j + c // 2) + 2 * r + c % 2] * inv).to(Float16)
            cute.autovec_copy(values, cute.make_tensor((start + 8 * j).align(16), cute.make_layout(8)))
    return scale


@cute.jit
def write_16bit_row(o: cute.Tensor, r: cutlass.Constexpr, factor: Float32, to: cute.Pointer, exists, lane: Int32):
    """This thread's part of its row r in `to`'s dtype, 16 bytes at once."""
    start = to + lane % 4 * 8
    for group in range_constexpr(COLUMNS // 32):
        values = cute.make_rmem_tensor(8, to.dtype)
        for j in range_constexpr(4):
            for c in range_constexpr(2):
                values[2 * j + c] = (o[16 * group + 4 * j + 2 * r + c] * factor).to(to.dtype)
        trade_words(cute.recast_tensor(values, Int32), lane)
        if exists:
            cute.autovec_copy(values, cute.make_tensor((start + group * 32).align(16), cute.make_layout(8)))


@cute.jit
def trade_words(words: cute.Tensor, lane: Int32):
    """Transpose words among four neighbouring lanes: word j of lane i becomes word i of lane j.

    If it is of columns 8 j + 2 i + {0, 1}, a lane ends up with columns 8 j ... 8 j + 7.
    """
    odd, upper = lane % 2 != 0, lane % 4 >= 2
    for j in range_constexpr(0, 4, 2):
        theirs = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, words[j], words[j + 1]), 1)
        low, high = words[j], words[j + 1]
        words[j], words[j + 1] = cutlass.select_(odd, theirs, low), cutlass.select_(odd, high, theirs)
    for j in range_constexpr(2):
        theirs = cute.arch.shuffle_sync_bfly(cutlass.select_(upper, words[j], words[j + 2]), 2)
        low, high = words[j], words[j + 2]
        words[j], words[j + 2] = cutlass.select_(upper, theirs, low), cutlass.select_(upper, high, theirs)
