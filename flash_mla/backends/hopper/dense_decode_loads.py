"""How dense decode brings K by TMA from pages: chunk by chunk in boxes of a block, or in boxes of 8 tokens.

Of a small box one load brings four chunks, a half of V: with a load for each chunk, a call waited for TMA. They come to
lie in shared memory octet by octet, as they do in the box.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync

from flash_mla.backends.hopper.fragments import BLOCK, V_CHUNKS
from flash_mla.backends.hopper.seesaw import CHUNK_ELEMENTS
from flash_mla.backends.hopper.wgmma import CHUNK, k_major_layout

# Small boxes that are located together: one after the other, a call took 5 to 10 % longer.
BOXES_AT_ONCE = 4


@dataclass(frozen=True)
class Load:
    """How TMA brings a group of a block's chunks, a box of tokens at a time."""

    tma: cute.CopyAtom
    source: cute.Tensor  # [one copy, row of boxes, number, KV head, page]
    to: cute.Tensor  # [one copy, number in the group, box, buffer]
    first: int  # number in source, of the group's first copy
    copies: int  # of each box
    nbytes: int  # of the group


class KLoads:
    """What the CTAs of a cluster load of K, each its share for both."""

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        groups: tuple[tuple[int, ...], ...],  # of chunks of a block: halves of V and, if there is one, the RoPE chunk
        cluster: int,
        box: int,  # tokens of which one load brings a chunk or more: 8 or a block
    ):
        self.dtype = dtype
        self.groups = groups
        self.chunks = sum(map(len, groups))
        self.cluster = cluster
        self.box = box
        self.boxes = BLOCK // box  # in a block
        is_block = box == BLOCK
        self.v_at_once = 1 if is_block else V_CHUNKS // 2  # chunks of V that a load brings
        self.boxes_at_once = 1 if is_block else BOXES_AT_ONCE
        # CTAs of a cluster load a half each of a box that is a whole block; of smaller boxes they load every other.
        self.shares_of_box = cluster if is_block else 1
        self.shares_of_block = cluster // self.shares_of_box

    @property
    def v_chunk(self) -> int:
        """Elements of shared memory from a token's chunk of V to its next one."""
        return self.box * CHUNK

    def v_row(self, token: Int32) -> Int32:
        """Elements of shared memory from a half of V to a token's row of its first chunk."""
        return (token // self.box * (self.v_at_once * self.box) + token % self.box) * CHUNK

    def atoms(self, k_cache: cute.Tensor) -> list[tuple]:
        """What brings K: (TMA atom, what it sees of the cache), of any chunk or of V and of RoPE."""
        if self.v_at_once == 1:
            return [self._atom(k_cache, 0, self.chunks, 1)]
        v = self._atom(k_cache, 0, V_CHUNKS, self.v_at_once)
        return [v, self._atom(k_cache, V_CHUNKS, 1, 1)] if self.chunks > V_CHUNKS else [v]

    def _atom(self, k_cache: cute.Tensor, first: int, chunks: int, at_once: int) -> tuple:
        (pages, page_size, h_kv, _), (page, token, head, _) = k_cache.shape, k_cache.stride
        layout = cute.make_layout((page_size, CHUNK, chunks, h_kv, pages), stride=(token, 1, CHUNK, head, page))
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SMulticastOp() if self.cluster > 1 else cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(k_cache.iterator + first * CHUNK, layout),
            self._box_layout(at_once),
            (self.box, CHUNK, at_once),
            num_multicast=self.shares_of_box,
        )

    def _box_layout(self, at_once: int):
        """What one load brings, in shared memory: [token, column, chunk], swizzled by address as a chunk is."""
        box = cute.make_layout((self.box, CHUNK, at_once), stride=(CHUNK, 1, self.box * CHUNK))
        return cute.make_composed_layout(k_major_layout(self.dtype).inner, 0, box)

    def of_groups(self, k: cute.Pointer, atoms: list[tuple], rank: Int32) -> list[Load]:
        """How each group of chunks is brought to two buffers, from `k` on, by the CTA of this rank in its cluster."""
        return [self._load(k, atoms, rank, chunks) for chunks in self.groups]

    def _load(self, k: cute.Pointer, atoms: list[tuple], rank: Int32, chunks: tuple[int, ...]) -> Load:
        is_rope = chunks[0] == V_CHUNKS
        tma, view = atoms[-1 if is_rope else 0]
        at_once = 1 if is_rope else self.v_at_once
        box = self._box_layout(at_once)
        start = (k + chunks[0] * CHUNK_ELEMENTS).align(1024)
        buffers = cute.make_layout(
            (*box.outer.shape, len(chunks) // at_once, self.boxes, 2),
            stride=(
                *box.outer.stride,
                at_once * CHUNK_ELEMENTS,
                at_once * self.box * CHUNK,
                self.chunks * CHUNK_ELEMENTS,
            ),
        )
        to, source = cpasync.tma_partition(
            tma,
            rank if self.shares_of_box > 1 else 0,
            cute.make_layout(self.shares_of_box),
            cute.group_modes(cute.make_tensor(cute.recast_ptr(start, box.inner), buffers), 0, 3),
            cute.group_modes(cute.local_tile(view, (self.box, CHUNK, at_once), (None, 0, None, None, None)), 0, 3),
        )
        nbytes = len(chunks) * CHUNK_ELEMENTS * self.dtype.width // 8
        return Load(tma, source, to, chunks[0] % view.shape[2] // at_once, len(chunks) // at_once, nbytes)

    @cute.jit
    def prefetch(self, loads: list, boxes, kv_head: Int32):
        """Bring the next pair of blocks into L2, shared among the CTAs of this worker."""
        turn, turns = cute.arch.block_idx()[0] // self.shares_of_box, cute.arch.grid_dim()[0] // self.shares_of_box
        for box in cutlass.range(turn, 2 * self.boxes, turns, unroll=self.boxes_at_once):
            row, page = boxes.get(2 * self.boxes + box)
            for load in loads:
                for i in cutlass.range(load.copies, unroll=1):
                    cute.prefetch(load.tma, load.source[None, row, load.first + i, kv_head, page])

    @cute.jit
    def load(self, load: Load, boxes, kv_head: Int32, buffer: cutlass.Constexpr, full: cute.Pointer, cache_policy):
        """Bring this CTA's share of a group of chunks of a block, for both CTAs of a cluster."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, load.nbytes)
        multicast = {"mcast_mask": cutlass.Int16(3)} if self.cluster > 1 else {}
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster()) if self.cluster > 1 else Int32(0)
        turn = rank if const_expr(self.shares_of_block > 1) else Int32(0)
        for j in cutlass.range(self.boxes // self.shares_of_block, unroll=self.boxes_at_once):
            box = turn + j * self.shares_of_block
            row, page = boxes.get(buffer * self.boxes + box)
            for i in range_constexpr(load.copies):
                cute.copy(
                    load.tma,
                    load.source[None, row, load.first + i, kv_head, page],
                    load.to[None, i, box, buffer],
                    tma_bar_ptr=full,
                    cache_policy=cache_policy,
                    **multicast,
                )
