"""Tiles of dense MHA's operands: how TMA brings them and how they lie in shared memory."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync, warpgroup

from flash_mla.backends.hopper.wgmma import CHUNK

ATOMS = {64: warpgroup.SmemLayoutAtomKind.K_SW128, 32: warpgroup.SmemLayoutAtomKind.K_SW64}  # by columns


def chunks_layout(dtype: type[cutlass.Numeric], rows: int, chunks: int, columns: int = CHUNK):
    """Swizzled layout of `chunks` chunks of rows x `columns`, as TMA writes them one by one."""
    atom = warpgroup.make_smem_layout_atom(ATOMS[columns], dtype)
    return cute.tile_to_shape(atom, (rows, columns, chunks), (0, 1, 2))


def chunk_layout(dtype: type[cutlass.Numeric], rows: int, columns: int = CHUNK):
    """Swizzled layout of one chunk of rows x `columns`."""
    return cute.select(chunks_layout(dtype, rows, 1, columns), mode=[0, 1])


def operand(pointer: cute.Pointer, layout) -> cute.Tensor:
    """The tensor of a swizzled layout that begins at `pointer`, which begins a swizzle atom."""
    return cute.make_tensor(cute.recast_ptr(pointer.align(1024), layout.inner), layout.outer)


def tma(x: cute.Tensor, rows: int, columns: int = CHUNK, *, stores: bool = False):
    """How to load, or store, chunks of rows x columns of x [tokens, heads, d], seen as [tokens, d, heads]."""
    op = cpasync.CopyBulkTensorTileS2GOp() if stores else cpasync.CopyBulkTensorTileG2SOp()
    tokens = cute.make_tensor(x.iterator, cute.select(x.layout, mode=[0, 2, 1]))
    layout = chunk_layout(x.element_type, rows, columns)
    return cpasync.make_tiled_tma_atom(op, tokens, layout, (rows, columns))


def partition(
    dtype: type[cutlass.Numeric], atom, x_tma, smem, rows: int, chunks: int, row, columns: int = CHUNK
) -> tuple:
    """Chunks in shared memory [., chunk] and those of x from `row` on [., block of rows, chunk, head]."""
    layout = chunks_layout(dtype, rows, chunks, columns)
    source = cute.local_tile(cute.domain_offset((row, 0, 0), x_tma), (rows, columns), (None, None, None))
    return cpasync.tma_partition(
        atom,
        0,
        cute.make_layout(1),
        cute.group_modes(smem.get_tensor(layout.outer, swizzle=layout.inner), 0, 2),
        cute.group_modes(source, 0, 2),
    )


def expect(full, elements: int):
    """The bytes of so many 16-bit elements are to arrive at the barrier `full`."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(full, elements * 2)


def release(empty):
    """This warp has read what the barrier `empty` guards."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(empty)
