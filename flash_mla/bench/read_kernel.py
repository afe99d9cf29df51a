"""A Triton kernel that only reads, for the ceiling that memory sets."""

import triton
import triton.language as tl

__all__ = ["read"]


@triton.jit
def read(source, sink, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(source + offsets), 0)
    # A condition that random data never meets keeps the load without costing a write.
    tl.store(sink, total, mask=total == 12345.678)
