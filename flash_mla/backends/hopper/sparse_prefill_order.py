"""Sparse prefill takes query tokens that differ in length by their length, the longest first.

CTAs take pieces in turns, so each has one of every round. Every other round runs backwards: whoever had the longest
piece of one has the shortest of the next, and all end at about the same time. Tokens of as many tiles stay in their
order, in which neighbours name much the same rows of KV.

A token's length is what the caller says, or the end of its last index that names a row: those of a short context are
often filled up to topk with -1.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Int32, range_constexpr

from flash_mla.backends.hopper.divisor import Divisor, ceil_div
from flash_mla.backends.hopper.seesaw import TILE
from flash_mla.backends.hopper.warp_sums import inclusive_sum

LANES = 32
TOKENS = 8  # of a CTA that looks for lengths, a warp each
LOADS = 4  # indices that a lane reads at once
WARPS = 16  # of the one CTA that sorts, each thread for tokens that follow each other
BATCH = 8  # of these, whose lengths it reads at once
LEVELS = 32  # that lengths are told apart by
FRACTION_BITS = 20  # of what turns tiles into levels
SHARE = WARPS  # threads, of whose counts of a level a lane takes the sum
PITCH = SHARE + 1  # of these, so that lanes read different banks


class TokenOrder:
    """Lists tokens as words: token * 2^length_bits + length."""

    @cute.jit
    def __call__(
        self,
        indices: cute.Tensor,  # [s_q, topk] int32
        s_kv: Int32,
        lengths: cute.Tensor,  # [s_q] int32, written if they are looked for
        words: cute.Tensor,  # [s_q] int32, written
        length_bits: Int32,
        whole_tokens: Int32,
        round_tokens: Int32,
        finds_lengths: Int32,
        stream,
    ):
        """Launch what is to run before the attention kernel, which waits for it.

        Of the list, the first whole_tokens are taken in rounds of round_tokens each.
        """
        s_q, topk = indices.shape
        if finds_lengths != 0:
            self.find_lengths(indices, s_kv, lengths).launch(
                grid=(ceil_div(s_q, TOKENS), 1, 1), block=(TOKENS * LANES, 1, 1), stream=stream
            )

        @cute.struct
        class Shared:
            counts: cute.struct.MemRange[Int32, LEVELS * LANES * PITCH]
            totals: cute.struct.MemRange[Int32, LEVELS]

        self.Shared = Shared
        # Tiles of a token to levels, without a division for each.
        scale = ((LEVELS - 1) << FRACTION_BITS) // ceil_div(topk, TILE)
        self.sort(lengths, words, topk, scale, length_bits, whole_tokens, Divisor.of(round_tokens)).launch(
            grid=(1, 1, 1), block=(WARPS * LANES, 1, 1), stream=stream, use_pdl=finds_lengths
        )

    @cute.kernel
    def find_lengths(self, indices: cute.Tensor, s_kv: Int32, lengths: cute.Tensor):
        """The end of each token's last index that names a row, looked for from behind."""
        cute.arch.griddepcontrol_launch_dependents()
        block, _, _ = cute.arch.block_idx()
        lane = cute.arch.lane_idx()
        token = block * TOKENS + cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if token < indices.shape[0]:
            end, length = Int32(indices.shape[1]), Int32(0)
            while (end > 0) & (length == 0):
                found = cute.make_rmem_tensor(LOADS, Int32)
                found.fill(-1)
                begin = end - LOADS * LANES
                for i in range_constexpr(LOADS):
                    if begin + i * LANES + lane >= 0:
                        found[i] = indices[token, begin + i * LANES + lane]
                for i in range_constexpr(LOADS):
                    named = cute.arch.vote_ballot_sync((found[i] >= 0) & (found[i] < s_kv))
                    last = begin + i * LANES + (LANES - Int32(cute.arch.clz(named)))
                    length = cutlass.select_(named != 0, last, length)
                end = begin
            if lane == 0:
                lengths[token] = length

    @cute.kernel
    def sort(
        self,
        lengths: cute.Tensor,
        words: cute.Tensor,
        topk: Int32,
        scale: Int32,
        length_bits: Int32,
        whole_tokens: Int32,
        rounds: Divisor,
    ):
        """A stable counting sort: of each level, what each thread's tokens have of it, and where these go."""
        cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = utils.SmemAllocator().allocate(self.Shared)
        counts = shared.counts.get_tensor(cute.make_layout((PITCH, LANES, LEVELS)))
        totals = shared.totals.get_tensor(cute.make_layout(LEVELS))
        mine = counts[thread % SHARE, thread // SHARE, None]
        share = ceil_div(lengths.shape[0], WARPS * LANES)
        first = cutlass.min(thread * share, lengths.shape[0])
        after = cutlass.min(first + share, lengths.shape[0])

        for level in range_constexpr(LEVELS):
            mine[level] = 0
        cute.arch.griddepcontrol_wait()
        for begin in cutlass.range(first, after, BATCH, unroll=1):
            batch = self.batch(lengths, begin, after, topk)
            for i in range_constexpr(BATCH):
                if begin + i < after:
                    level = self.level(batch[i], scale)
                    mine[level] = mine[level] + 1
        cute.arch.sync_threads()

        # Some levels for each warp. What a lane adds up of each begins behind the lanes before and the longer levels.
        before = cute.make_rmem_tensor(LEVELS // WARPS, Int32)
        for i in range_constexpr(LEVELS // WARPS):
            level = warp * (LEVELS // WARPS) + i
            before[i] = Int32(0)
            for j in range_constexpr(SHARE):
                before[i] = before[i] + counts[j, lane, level]
            before[i], total = self.scan(before[i], lane)
            if lane == 0:
                totals[level] = total
        cute.arch.sync_threads()
        levels_before, _ = self.scan(totals[lane], lane)
        for i in range_constexpr(LEVELS // WARPS):
            level = warp * (LEVELS // WARPS) + i
            place = before[i] + cute.arch.shuffle_sync(levels_before, level)
            for j in range_constexpr(SHARE):
                count = counts[j, lane, level]
                counts[j, lane, level] = place
                place += count
        cute.arch.sync_threads()

        for begin in cutlass.range(first, after, BATCH, unroll=1):
            batch = self.batch(lengths, begin, after, topk)
            for i in range_constexpr(BATCH):
                if begin + i < after:
                    level = self.level(batch[i], scale)
                    place = mine[level]
                    mine[level] = place + 1
                    number = rounds.quotient(place)
                    opens, closes = number * rounds.value, (number + 1) * rounds.value - 1
                    backwards = (number % 2 == 1) & (closes < whole_tokens)
                    place = cutlass.select_(backwards, opens + closes - place, place)
                    words[place] = ((begin + i) << length_bits) + batch[i]

    @cute.jit
    def batch(self, lengths: cute.Tensor, begin: Int32, after: Int32, topk: Int32) -> cute.Tensor:
        """How many indices count, of some tokens from `begin` on."""
        batch = cute.make_rmem_tensor(BATCH, Int32)
        for i in range_constexpr(BATCH):
            if begin + i < after:
                batch[i] = cutlass.min(cutlass.max(lengths[begin + i], 0), topk)
        return batch

    def level(self, length: Int32, scale: Int32) -> Int32:
        """By tiles; 0 for the longest."""
        return LEVELS - 1 - (ceil_div(length, TILE) * scale >> FRACTION_BITS)

    def scan(self, value: Int32, lane: Int32) -> tuple[Int32, Int32]:
        """(sum of the values of the lanes before, sum over the warp)."""
        through = inclusive_sum(value, lane)
        return through - value, cute.arch.shuffle_sync(through, LANES - 1)
