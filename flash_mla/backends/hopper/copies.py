"""Copies that run beside the code that starts them, in PTX, how long the L2 keeps what they bring, and pointers."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

# L2 cache hints, as CUTLASS encodes them.
EVICT_NORMAL, EVICT_FIRST, EVICT_LAST = 0x1000000000000000, 0x12F0000000000000, 0x14F0000000000000


def pointer_at(dtype: type[cutlass.Numeric], address: Int64, offset: Int32 | int, *, align: int) -> cute.Pointer:
    """A pointer to `offset` bytes beyond a global address, known to be aligned: `Pointer.align` would round it."""
    return cute.make_ptr(dtype, address + Int64(offset), cute.AddressSpace.gmem, assumed_align=align)


def prefetch(address: Int64) -> None:
    """Start to bring the line of a global address to the L2."""
    cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])


def discard_line(address: Int64) -> None:
    """Leave the 128 bytes at a global address, a multiple of 128, undefined; the L2 need not write them to memory."""
    cute.arch.inline_ptx("discard.global.L2 [{$r0}], 128;", read_only_args=[address])


def store_vector(address: Int64, offset: int, values: list[Float32], hint: int) -> None:
    """Store four fp32 values, 16-byte aligned; hint: how long the L2 keeps them."""
    cute.arch.inline_ptx(
        f"st.global.L2::cache_hint.v4.f32 [{{$r0}}+{offset}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}}, {{$r5}};",
        read_only_args=[address, *values, Int64(hint)],
    )


def copy_or_zeros(to: Int32, source: Int64, nbytes: Int32) -> None:
    """Start to fill 16 bytes of shared memory: with the first `nbytes` of 16 at `source`, then zeros."""
    cute.arch.inline_ptx("cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[to, source, nbytes])


def copy_async(
    to: tuple[Int32, int],
    token: Int64,
    source: tuple[Int64, int],
    nbytes: int,
    *,
    hint: int | None = None,
    whole_lines: bool = True,
) -> None:
    """Start a copy of 16, 8 or 4 bytes to shared memory; of zeros, reading nothing, if `token` is 0.

    hint: how long the L2 keeps what it brings. whole_lines: whether the L2 is to have all 128 bytes of a line.
    """
    cache = "cg" if nbytes == 16 else "ca"
    level = (".L2::cache_hint" if hint is not None else "") + (".L2::128B" if whole_lines else "")
    policy = ", {$r3}" if hint is not None else ""
    cute.arch.inline_ptx(
        f"""{{
.reg .pred absent;
setp.eq.s64 absent, {{$r1}}, 0;
cp.async.{cache}.shared.global{level} [{{$r0}}+{to[1]}], [{{$r2}}+{source[1]}], {nbytes}, absent{policy};
}}""",
        read_only_args=[to[0], token, source[0], *([] if hint is None else [Int64(hint)])],
    )


def wait_copies(pending: int) -> None:
    """Wait until at most `pending` of this thread's groups of asynchronous copies are under way."""
    cute.arch.inline_ptx(f"cp.async.wait_group {pending};")


def wait_for_staged(latest: int = 0):
    """Wait until all that this warp has staged for TMA has been read, but for the `latest` copies."""
    with cute.arch.elect_one():
        cute.arch.cp_async_bulk_wait_group(latest, read=True)
    cute.arch.sync_warp()
