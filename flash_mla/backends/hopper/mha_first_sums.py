"""Who is the first to add to sums of dQ in global memory: it stores, so that nobody need set them to 0 before.

Each half of a tile's columns has a word that says how far it is. Whoever is to add claims it; the first stores, and
tells the others, who wait until then. Words of sums that nobody adds to stay untouched.

What is added is never read, and only the L2 adds: a claim need not order what comes after it. To acquire would
invalidate the L1 at every claim.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

UNTOUCHED, CLAIMED, STORED = 0, 1, 2


@cute.jit
def claim(word: cute.Pointer) -> Int32:
    """Whether this thread is to store, and then to call `publish`; else adds may begin when this returns.

    Between a claim and `publish`, wait for nothing but the own CTA. Threads that claim several words, one after the
    other, do so in the same order.
    """
    state = cute.arch.inline_ptx(
        f"atom.relaxed.gpu.global.cas.b32 {{$w0}}, [{{$r0}}], {UNTOUCHED}, {CLAIMED};",
        write_only_types=[Int32],
        read_only_args=[word.toint()],
    )
    first = Int32(state == UNTOUCHED)
    while state == CLAIMED:
        state = cute.arch.inline_ptx(
            "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[word.toint()]
        )
    return first


def publish(word: cute.Pointer):
    """Let others add to what threads have stored that this one has waited for at a barrier."""
    cute.arch.inline_ptx(f"st.release.gpu.global.b32 [{{$r0}}], {STORED};", read_only_args=[word.toint()])
