"""Raw bytes of quantised KV rows to 16-bit values in swizzled shared memory, half a row at a time.

Four threads share a row: thread u of them owns columns 16 u ... 16 u + 15 of each chunk of 64 columns. It copies its
codes into slots of shared memory that no other thread touches, hence needs no barrier before it reads them again, and
waits on no scoreboard; the four share scales, for which their warp synchronises. There is room for two half rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from flash_mla.backends.hopper.wgmma import CHUNK, ROWS

THREADS = 128
THREADS_PER_ROW = 4
CHUNK_BYTES = ROWS * CHUNK * 2
HALF_CHUNKS = 4  # chunks of 64 columns in half a row of V
HALF_COLUMNS = HALF_CHUNKS * CHUNK
UNIT = 16  # bytes that the swizzle keeps together

PACKED = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}


@dataclass(frozen=True)
class Slots:
    """A thread's place in shared memory for the raw bytes of half rows; `index` (0 or 1) says which of two."""

    base: Int32
    thread: Int32
    code_bytes: int  # of a thread and chunk
    scale_bytes: int  # of a thread

    def codes(self, index, chunk: int) -> tuple[Int32, int]:
        """Address, and an offset that can be part of an instruction."""
        size = THREADS * self.code_bytes
        return self.base + self.thread * self.code_bytes + index * (HALF_CHUNKS * size), chunk * size

    def scales(self, index) -> Int32:
        first = self.base + 2 * HALF_CHUNKS * THREADS * self.code_bytes
        return first + self.thread * self.scale_bytes + index * (THREADS * self.scale_bytes)


def copy_async(to: tuple[Int32, int], token: Int64, source: tuple[Int64, int], nbytes: int) -> None:
    """Start a copy of 16, 8 or 4 bytes to shared memory; of zeros, reading nothing, if `token` is 0."""
    cache = "cg" if nbytes == 16 else "ca"
    cute.arch.inline_ptx(
        f"""{{
.reg .pred absent;
setp.eq.s64 absent, {{$r1}}, 0;
cp.async.{cache}.shared.global.L2::128B [{{$r0}}+{to[1]}], [{{$r2}}+{source[1]}], {nbytes}, absent;
}}""",
        read_only_args=[to[0], token, source[0]],
    )


def load_words(address: Int32, offset: int, count: int, dtype: type[cutlass.Numeric] = Uint32) -> tuple:
    """`count` (2 or 4) 32-bit words of shared memory."""
    names = ", ".join(f"{{$w{i}}}" for i in range(count))
    kind = "f32" if dtype is Float32 else "u32"
    return cute.arch.inline_ptx(
        f"ld.shared.v{count}.{kind} {{{names}}}, [{{$r0}}+{offset}];",
        write_only_types=[dtype] * count,
        read_only_args=[address],
    )


def store_words(address: Int32, offset: int, words: tuple) -> None:
    """16 bytes to shared memory."""
    cute.arch.inline_ptx(
        f"st.shared.v4.u32 [{{$r0}}+{offset}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
        read_only_args=[address, *words],
    )


def e4m3_to_16bit(word: Uint32, scale: Float32, dtype: type[cutlass.Numeric]) -> tuple:
    """Four e4m3 codes times a scale, rounded once: two words of two values each."""
    packed = PACKED[dtype]
    return cute.arch.inline_ptx(
        f"""{{
.reg .b16 low, high, h0, h1, h2, h3;
.reg .b32 x, y;
.reg .f32 f0, f1, f2, f3;
mov.b32 {{low, high}}, {{$r0}};
cvt.rn.f16x2.e4m3x2 x, low;
cvt.rn.f16x2.e4m3x2 y, high;
mov.b32 {{h0, h1}}, x;
mov.b32 {{h2, h3}}, y;
cvt.f32.f16 f0, h0;
cvt.f32.f16 f1, h1;
cvt.f32.f16 f2, h2;
cvt.f32.f16 f3, h3;
mul.f32 f0, f0, {{$r1}};
mul.f32 f1, f1, {{$r1}};
mul.f32 f2, f2, {{$r1}};
mul.f32 f3, f3, {{$r1}};
cvt.rn.{packed}.f32 {{$w0}}, f1, f0;
cvt.rn.{packed}.f32 {{$w1}}, f3, f2;
}}""",
        write_only_types=[Uint32, Uint32],
        read_only_args=[word, scale],
    )


class Fp8V32:
    """656 bytes: 512 e4m3, four fp32 scales, 64 bf16 of RoPE."""

    d = 576
    token_bytes = 656
    rope_offset = 528
    code_bytes, scale_bytes = 16, 4
    raw_bytes = 2 * THREADS * (HALF_CHUNKS * code_bytes + scale_bytes)

    def __init__(self, dtype: type[cutlass.Numeric]):
        self.dtype = dtype

    def slots(self, base: Int32, thread: Int32) -> Slots:
        return Slots(base, thread, self.code_bytes, self.scale_bytes)

    def fetch(self, slots: Slots, index, half: Int32, token: Int64) -> None:
        """Start the copies of half a row; of zeros if `token` is 0."""
        u = slots.thread % THREADS_PER_ROW
        # Thread u of a row brings scale u.
        copy_async((slots.scales(index), 0), token, (token + Int64(u * 4), 512), 4)
        source = token + Int64(half * HALF_COLUMNS + u * 16)
        for chunk in range(HALF_CHUNKS):
            copy_async(slots.codes(index, chunk), token, (source, chunk * CHUNK), 16)

    def read(self, slots: Slots, index, half: Int32) -> list:
        """(codes, scale) of this thread's columns of each chunk of the half row that has arrived."""
        row = slots.scales(index) - slots.thread % THREADS_PER_ROW * 4
        first, second = load_words(row + half * 8, 0, 2, Float32)
        codes = [load_words(*slots.codes(index, chunk), 4) for chunk in range(HALF_CHUNKS)]
        return list(zip(codes, (first, first, second, second), strict=True))

    def store(self, codes: tuple, scale: Float32, to: tuple[Int32, Int32], offset: int) -> None:
        """This thread's 16 values of a chunk, to shared memory: 16 bytes to each address in `to`."""
        for i in range(2):
            words = [value for word in codes[2 * i : 2 * i + 2] for value in e4m3_to_16bit(word, scale, self.dtype)]
            store_words(to[i], offset, tuple(words))
