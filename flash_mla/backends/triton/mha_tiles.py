"""What the Triton kernels of dense multi-head attention share: sequences, and tiles of their q, k, v and gradients.

Triton's tiles are powers of two wide, so a head dim of 192 is taken as 128 and the `rest` of 64 columns. Where there is
no rest, its stand-ins are never read and cost nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRST = tl.constexpr(128)  # columns before the rest
LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are of base 2, which is what the hardware has


@triton.jit
def sequence(cu_seqlens_ptr, i):
    """Where sequence `i` starts, in int64 as an offset built on it may need, and how many tokens it has."""
    start = tl.load(cu_seqlens_ptr + i)
    return start.to(tl.int64), tl.load(cu_seqlens_ptr + i + 1) - start


@triton.jit
def tile_at(ptr, row, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to the [ROWS, COLUMNS] elements from `row` on of a matrix that is dense along its columns."""
    first = ptr + tl.cast(row, tl.int64) * row_stride
    return first + tl.arange(0, ROWS).to(tl.int64)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_rows(ptr, row, num_rows, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `row` to row + ROWS of a matrix, zeros from num_rows on."""
    ptrs = tile_at(ptr, row, row_stride, ROWS, COLUMNS)
    return tl.load(ptrs, mask=(row + tl.arange(0, ROWS) < num_rows)[:, None], other=0.0)


@triton.jit
def load_rest(ptr, row, num_rows, row_stride, ROWS: tl.constexpr, REST: tl.constexpr):
    """The rest of the columns of `load_rows`, or a stand-in."""
    if REST > 0:
        return load_rows(ptr + FIRST, row, num_rows, row_stride, ROWS, REST)
    else:  # noqa: RET505 - or Triton would compile what follows the return
        return 0.0


@triton.jit
def first_of_tile(row, num_rows, ROWS: tl.constexpr):
    """Where the tile for the rows `row` to row + ROWS begins so that all its rows exist: the last of a matrix begins
    with rows of the tile before. A matrix with fewer than ROWS rows is one tile."""
    return tl.maximum(tl.minimum(row, num_rows - ROWS), 0)


@triton.jit
def offsets_in_tile(num_rows, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """From the first element of a tile of `first_of_tile` to its [ROWS, COLUMNS]; if the matrix has fewer rows, to its
    last row instead of those it lacks. All tiles share them, so that a loop spends two instructions on an address: with
    a mask or a bound for each row, addresses cost more than the loads themselves."""
    rows = tl.minimum(tl.arange(0, ROWS), num_rows - 1)
    return rows.to(tl.int64)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_tile(ptr, first, row_stride, offsets):
    """The tile of a matrix that begins with row `first`."""
    return tl.load(ptr + tl.cast(first, tl.int64) * row_stride + offsets)


@triton.jit
def store_rows(ptr, row, num_rows, row_stride, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write value [ROWS, COLUMNS] to the rows from `row` on that are under num_rows."""
    ptrs = tile_at(ptr, row, row_stride, ROWS, COLUMNS)
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=(row + tl.arange(0, ROWS) < num_rows)[:, None])


@triton.jit
def products(a, a_rest, b, b_rest, REST: tl.constexpr):
    """a b^T in fp32."""
    product = tl.dot(a, tl.trans(b))
    if REST > 0:
        product = tl.dot(a_rest, tl.trans(b_rest), product)
    return product
