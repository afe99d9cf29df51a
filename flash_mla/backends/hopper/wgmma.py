"""Warpgroup matrix multiplies and the shared-memory layouts that their operands take."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.nvgpu.warpgroup import OperandMajorMode, OperandSource

ROWS = 64  # rows of a warpgroup's product
CHUNK = 64  # columns of a K-major chunk: the 128 bytes that one swizzle atom spans


def qk_op(dtype: type[cutlass.Numeric], a_source: OperandSource) -> warpgroup.MmaF16BF16Op:
    """S[64, 64] += Q[64, 16] K[64, 16]^T."""
    return warpgroup.MmaF16BF16Op(dtype, Float32, (ROWS, 64, 16), a_source, OperandMajorMode.K, OperandMajorMode.K)


def pv_op(dtype: type[cutlass.Numeric], a_source: OperandSource) -> warpgroup.MmaF16BF16Op:
    """O[64, 256] += P[64, 16] V[16, 256], V as it lies in the K tile."""
    return warpgroup.MmaF16BF16Op(dtype, Float32, (ROWS, 256, 16), a_source, OperandMajorMode.K, OperandMajorMode.MN)


def gemm(
    op: warpgroup.MmaF16BF16Op,
    acc: cute.Tensor,
    a: cute.Tensor,
    b: cute.Tensor,
    *,
    overwrite: bool | Boolean = False,
    commits: bool = False,
):
    """Issue acc (+)= a b over all k-blocks of the fragments a, b (MMA, 1, K), without waiting.

    commits: each k-block as a group of its own.

    The tiled MMA is made here because setting ACCUMULATE mutates it, which must not cross a staged region.
    """
    tiled = cute.make_tiled_mma(op)
    for k in range(cute.size(a, mode=[2])):
        tiled.set(warpgroup.Field.ACCUMULATE, k > 0 or overwrite ^ True)
        cute.gemm(tiled, acc, a[None, None, k], b[None, None, k], acc)
        if commits:
            warpgroup.commit_group()


def k_major_layout(dtype: type[cutlass.Numeric], columns: int = CHUNK, rows: int = ROWS):
    """Swizzled layout of `rows` x `columns`, dense in the columns: a chunk of Q or K, or P."""
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)
    return cute.tile_to_shape(atom, (rows, columns), (0, 1))


def half_layout(dtype: type[cutlass.Numeric], by_octets: bool = False):
    """Four chunks of K: [64 tokens, 64 columns, chunk].

    They lie behind each other, or (by_octets) their first 8 tokens do, then the next.
    """
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)
    return cute.tile_to_shape(atom, (ROWS, CHUNK, 4), (2, 0, 1) if by_octets else (0, 1, 2))


def v_layout(dtype: type[cutlass.Numeric], by_octets: bool = False):
    """The bytes of those four chunks seen as V[256 columns, 64 tokens]."""
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.MN_SW128, dtype)
    return cute.tile_to_shape(atom, (4 * CHUNK, ROWS), (0, 1) if by_octets else (1, 0))


def tile_at(base: cute.Pointer, chunk: cutlass.Int32 | int, layout) -> cute.Tensor:
    """The tensor of `layout` that begins at chunk number `chunk` of shared memory."""
    start = (base + chunk * (ROWS * CHUNK)).align(1024)
    return cute.make_tensor(cute.recast_ptr(start, layout.inner), layout.outer)
