"""The plan of flash_mla.plan.split_plan, made on the device by one CTA: the same integers from the same formulas."""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Int32, Int64, const_expr, range_constexpr

from flash_mla.backends.hopper import aot
from flash_mla.backends.hopper.divisor import ceil_div
from flash_mla.backends.hopper.warp_sums import inclusive_sum
from flash_mla.plan import FEW_PIECES, INVARIANT_PIECE_TILES, MAX_INVARIANT_PIECES, PIECE_SIZES

LANES = 32
WARPS = 16
THREADS = WARPS * LANES  # units planned at a time


class Planner:
    """Units are scanned THREADS at a time; workers whose cut falls into such a block find their unit by bisection."""

    def __init__(self, batch_invariant: bool):
        self.batch_invariant = batch_invariant

    @cute.jit
    def __call__(
        self,
        lengths: cute.Tensor,  # [b] int32
        extra_lengths: cute.Tensor,  # [b] int32
        work: cute.Tensor,  # [workers + 1, 4] int32, written
        splits: cute.Tensor,  # [units + 1] int32, written
        tile: Int32,
        fixed_cost: Int32,
        min_cost: Int32,
        cut_cost: Int32,
        slack: Int32,
        even_workers: Int32,
        units_per_request: Int32,
        stream,
    ):
        @cute.struct
        class Shared:
            warp_sums: cute.struct.MemRange[Int32, WARPS]
            begins: cute.struct.MemRange[Int32, THREADS]
            tiles: cute.struct.MemRange[Int32, THREADS]
            slots: cute.struct.MemRange[Int32, THREADS]

        self.Shared = Shared
        self.kernel(
            lengths, extra_lengths, work, splits, tile, fixed_cost, min_cost, cut_cost, slack, even_workers,
            units_per_request,
        ).launch(grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream)  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        lengths: cute.Tensor,
        extra_lengths: cute.Tensor,
        work: cute.Tensor,
        splits: cute.Tensor,
        tile: Int32,
        fixed_cost: Int32,
        min_cost: Int32,
        cut_cost: Int32,
        slack: Int32,
        even_workers: Int32,
        units_per_request: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        shared = utils.SmemAllocator().allocate(self.Shared)
        warp_sums = shared.warp_sums.get_tensor(cute.make_layout(WARPS))
        begins = shared.begins.get_tensor(cute.make_layout(THREADS))
        tiles = shared.tiles.get_tensor(cute.make_layout(THREADS))
        slots = shared.slots.get_tensor(cute.make_layout(THREADS))
        requests = lengths.shape[0]
        units = requests * units_per_request
        num_workers = work.shape[0] - 1

        first = self.request_tiles(lengths, extra_lengths, Int32(0), tile)
        total, longest, others = Int32(0), Int32(0), Int32(0)  # others: requests that are not as long as the first
        for request in cutlass.range(thread, requests, THREADS):
            n = self.request_tiles(lengths, extra_lengths, request, tile)
            total += self.cost(n, fixed_cost) * units_per_request
            longest = cutlass.max(longest, n)
            others += cutlass.select_(n != first, Int32(1), Int32(0))
        _, total = self.scan(total, warp_sums)
        _, others = self.scan(others, warp_sums)
        size, own = Int32(0), Int32(0)  # of the largest piece, and how many, where each unit has workers of its own
        if const_expr(not self.batch_invariant):
            if (slack > 0) & (units <= num_workers):
                workers = self.workers_for(total, units, min_cost, num_workers)
                of_requests = (lengths, extra_lengths, tile, units_per_request)
                size, own = self.own_workers(of_requests, total, workers, slack, warp_sums)
        most = num_workers
        cut_alike = Int32(0)
        if others == 0:
            most = even_workers
            if (first > 0) & (even_workers % units == 0):  # no unit without cost, and each worker starts one piece
                cut_alike = Int32(1)
                fixed_cost = Int32(0)
                total = self.cost(first, fixed_cost) * units
        workers = self.workers_for(total, units, min_cost, most)
        if const_expr(not self.batch_invariant):
            longest = self.largest(longest, warp_sums)
            is_short = Int64(longest + fixed_cost - cut_cost) * Int64(workers) < Int64(total)
            if (size == 0) & (cut_alike == 0) & (units <= workers) & is_short:
                size, own = cutlass.max(longest, 1), units
            if size > 0:
                fixed_cost, total, workers = Int32(0), own, own

        begin = Int32(0)  # of the first unit of the block, on the cost axis
        slot = Int32(0)
        for block in cutlass.range(0, units, THREADS):
            unit = block + thread
            n = Int32(0)
            cost = Int32(0)
            if unit < units:
                n = self.request_tiles(lengths, extra_lengths, unit // units_per_request, tile)
                cost = cutlass.select_(size > 0, self.own_pieces(n, size), self.cost(n, fixed_cost))
            before, block_cost = self.scan(cost, warp_sums)
            unit_begin = begin + before
            count = Int32(0)
            if unit < units:
                count = self.slot_count(n, unit_begin, cost, fixed_cost, workers, total)
            before, block_slots = self.scan(count, warp_sums)
            begins[thread] = unit_begin
            tiles[thread] = n
            slots[thread] = slot + before
            if unit < units:
                splits[unit] = slot + before
            cute.arch.sync_threads()

            block_units = cutlass.min(units - block, THREADS)
            for worker in cutlass.range(thread, workers, THREADS):
                cut = Int32(Int64(worker) * Int64(total) // Int64(workers))
                if cut >= begin and cut < begin + block_cost:
                    inside = self.bisect(begins, cut, block_units)
                    self.write_worker(
                        work, worker, cut, block + inside, begins[inside], tiles[inside], slots[inside], fixed_cost,
                        size, workers, total,
                    )  # fmt: skip
            begin += block_cost
            slot += block_slots
            cute.arch.sync_threads()

        for worker in cutlass.range(workers + thread, num_workers + 1, THREADS):
            self.write_row(work, worker, units, Int32(0), Int32(0), Int32(-1))
        if thread == 0:
            splits[units] = slot

    @cute.jit
    def request_tiles(self, lengths: cute.Tensor, extra_lengths: cute.Tensor, request: Int32, tile: Int32) -> Int32:
        return ceil_div(lengths[request], tile) + ceil_div(extra_lengths[request], tile)

    @cute.jit
    def piece_tiles(self, tiles: Int32) -> Int32:
        return cutlass.max(INVARIANT_PIECE_TILES, ceil_div(tiles, MAX_INVARIANT_PIECES))

    @cute.jit
    def own_pieces(self, tiles: Int32, size: Int32) -> Int32:
        """Pieces, of at most `size` tiles, of a unit that has workers of its own."""
        return cutlass.max(1, ceil_div(tiles, cutlass.max(size, 1)))  # 0 if units have none

    @cute.jit
    def own_workers(
        self, of_requests: tuple, total: Int32, workers: Int32, slack: Int32, warp_sums: cute.Tensor
    ) -> tuple[Int32, Int32]:
        """(tiles of the largest piece, number of pieces) of units with workers of their own; 0 if these do not suffice.

        of_requests: their lengths, extra lengths, tile and units.
        """
        lengths, extra_lengths, tile, units_per_request = of_requests
        thread, _, _ = cute.arch.thread_idx()
        size, pieces = Int32(0), Int32(0)
        largest = (4 * Int64(total) + Int64(slack * workers) - 1) // Int64(4 * workers)
        for smaller in range_constexpr(PIECE_SIZES):
            tried, count = cutlass.max(Int32(largest) - smaller, 1), Int32(0)
            for request in cutlass.range(thread, lengths.shape[0], THREADS):
                n = self.request_tiles(lengths, extra_lengths, request, tile)
                count += self.own_pieces(n, tried) * units_per_request
            _, count = self.scan(count, warp_sums)
            if count <= workers:
                size, pieces = tried, count
        return size, pieces

    @cute.jit
    def workers_for(self, total: Int32, units: Int32, min_cost: Int32, most: Int32) -> Int32:
        """How many of at most `most` workers share a cost."""
        wanted = cutlass.max(total // min_cost, cutlass.max(1, cutlass.min(total, FEW_PIECES * units)))
        return cutlass.min(wanted, most)

    @cute.jit
    def cost(self, tiles: Int32, fixed_cost: Int32) -> Int32:
        """A unit's extent on the cost axis."""
        pieces = Int32(1)
        if const_expr(self.batch_invariant):
            pieces = cutlass.max(1, ceil_div(tiles, self.piece_tiles(tiles)))
        return tiles + fixed_cost * pieces

    @cute.jit
    def first_piece_1(self, unit_begin: Int32, fixed_cost: Int32, workers: Int32, total: Int32) -> Int32:
        """The first worker whose cut lies beyond the unit's fixed cost; it begins piece 1."""
        return Int32(ceil_div(Int64(unit_begin + fixed_cost + 1) * Int64(workers), Int64(total)))

    @cute.jit
    def slot_count(
        self, tiles: Int32, unit_begin: Int32, cost: Int32, fixed_cost: Int32, workers: Int32, total: Int32
    ) -> Int32:
        """Partial results of a unit: its pieces, or 0 if it is whole."""
        count = Int32(0)
        if const_expr(self.batch_invariant):
            pieces = ceil_div(tiles, self.piece_tiles(tiles))
            count = cutlass.select_(pieces > 1, pieces, Int32(0))
        else:
            after = Int32(ceil_div(Int64(unit_begin + cost) * Int64(workers), Int64(total)))
            cuts = after - self.first_piece_1(unit_begin, fixed_cost, workers, total)
            count = cutlass.select_(cuts > 0, cuts + 1, Int32(0))
        return count

    @cute.jit
    def write_worker(
        self,
        work: cute.Tensor,
        worker: Int32,
        cut: Int32,
        unit: Int32,
        unit_begin: Int32,
        tiles: Int32,
        unit_slot: Int32,
        fixed_cost: Int32,
        size: Int32,
        workers: Int32,
        total: Int32,
    ):
        """Where `worker` begins, given the unit its cut falls into."""
        offset = cut - unit_begin
        if const_expr(self.batch_invariant):
            step = self.piece_tiles(tiles)
            split = ceil_div(offset, fixed_cost + step)
            next_unit = split >= cutlass.max(1, ceil_div(tiles, step))
            split = cutlass.select_(next_unit, Int32(0), split)
            tile = split * step
            unit = cutlass.select_(next_unit, unit + 1, unit)
        else:
            of_own = Int32(Int64(offset) * Int64(tiles) // Int64(self.own_pieces(tiles, size)))
            tile = cutlass.select_(size > 0, of_own, cutlass.max(offset - fixed_cost, 0))
            split = worker - self.first_piece_1(unit_begin, fixed_cost, workers, total) + 1
            split = cutlass.select_(tile > 0, split, Int32(0))
        slot = cutlass.select_(split > 0, unit_slot + split, Int32(-1))
        self.write_row(work, worker, unit, tile, split, slot)

    @cute.jit
    def write_row(self, work: cute.Tensor, worker: Int32, unit: Int32, tile: Int32, split: Int32, slot: Int32):
        row = cute.make_rmem_tensor(4, Int32)
        row[0], row[1], row[2], row[3] = unit, tile, split, slot
        cute.autovec_copy(row, work[worker, None])

    @cute.jit
    def bisect(self, begins: cute.Tensor, cut: Int32, count: Int32) -> Int32:
        """The last of `count` ascending begins that is <= cut."""
        low = Int32(0)
        for step in range_constexpr(THREADS.bit_length() - 1):
            probe = low + (THREADS >> (step + 1))
            if probe < count and begins[probe] <= cut:
                low = probe
        return low

    @cute.jit
    def scan(self, value: Int32, warp_sums: cute.Tensor):
        """(sum of the values of the threads before, sum over the CTA)."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.warp_idx()
        inclusive = inclusive_sum(value, lane)
        cute.arch.sync_threads()
        if lane == LANES - 1:
            warp_sums[warp] = inclusive
        cute.arch.sync_threads()
        before = inclusive - value
        total = Int32(0)
        for w in range_constexpr(WARPS):
            before += cutlass.select_(w < warp, warp_sums[w], Int32(0))
            total += warp_sums[w]
        return before, total

    @cute.jit
    def largest(self, value: Int32, warp_values: cute.Tensor) -> Int32:
        """The largest value of the CTA's threads."""
        value = cute.arch.warp_redux_sync(value, "max")
        cute.arch.sync_threads()
        if cute.arch.lane_idx() == 0:
            warp_values[cute.arch.warp_idx()] = value
        cute.arch.sync_threads()
        for w in range_constexpr(WARPS):
            value = cutlass.max(value, warp_values[w])
        return value


def compile_variant(batch_invariant: bool) -> aot.Compiled:
    """Compile for any number of requests, units and workers."""
    b = cute.sym_int()
    lengths = aot.strided(Int32, (b,))
    extra_lengths = aot.strided(Int32, (b,))
    work = aot.compact(Int32, (cute.sym_int(), 4), align=16)
    splits = aot.compact(Int32, (cute.sym_int(),))
    scalars = [Int32(1)] * 7
    return aot.compile_kernel(Planner(batch_invariant), lengths, extra_lengths, work, splits, *scalars)
