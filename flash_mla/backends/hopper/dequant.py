"""Raw bytes of quantised KV rows to 16-bit values in swizzled shared memory.

Four threads share a row: thread u of them owns columns 16 u ... 16 u + 15 of each chunk of 64 columns. It copies its
bytes of half a row into slots of shared memory that no other thread touches, hence needs no barrier before it reads
them again, and waits on no scoreboard. A slot holds 16 bytes of every thread.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from flash_mla.backends.hopper.wgmma import CHUNK, ROWS

THREADS_PER_ROW = 4
SLOT_BYTES = 128 * 16
CHUNK_BYTES = ROWS * CHUNK * 2
HALF_CHUNKS = 4  # chunks of 64 columns in half a row of V

PACKED = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}


def copy_async(to: Int32, token: Int64, offset: Int32 | int, nbytes: int) -> None:
    """Start a copy of `nbytes` (16 or 8) to shared memory from `offset` in a token; of zeros if the token is 0."""
    cache = "cg" if nbytes == 16 else "ca"
    cute.arch.inline_ptx(
        f"""{{
.reg .pred absent;
setp.eq.s64 absent, {{$r1}}, 0;
cp.async.{cache}.shared.global.L2::128B [{{$r0}}], [{{$r2}}], {nbytes}, absent;
}}""",
        read_only_args=[to, token, token + Int64(offset)],
    )


def load_words(address: Int32, count: int) -> tuple:
    """`count` (1, 2 or 4) 32-bit words of shared memory."""
    vector = f".v{count}" if count > 1 else ""
    names = ", ".join(f"{{$w{i}}}" for i in range(count))
    words = cute.arch.inline_ptx(
        f"ld.shared{vector}.u32 {'{' * (count > 1)}{names}{'}' * (count > 1)}, [{{$r0}}];",
        write_only_types=[Uint32] * count,
        read_only_args=[address],
    )
    return words if count > 1 else (words,)


def store_words(address: Int32, words) -> None:
    """16 bytes to shared memory."""
    cute.arch.inline_ptx("st.shared.v4.u32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words])


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


def store_codes(to: Int32, codes: tuple, scale: Float32, dtype: type[cutlass.Numeric]) -> None:
    """16 e4m3 codes times a scale into the two 16-byte units of a swizzled row that begin at `to`."""
    for i in range(2):
        words = (*e4m3_to_16bit(codes[2 * i], scale, dtype), *e4m3_to_16bit(codes[2 * i + 1], scale, dtype))
        store_words(to ^ (16 * i), words)


class Fp8V32:
    """656 bytes: 512 e4m3, four fp32 scales, 64 bf16 of RoPE."""

    d = 576
    token_bytes = 656
    slots = 1 + HALF_CHUNKS + 2

    def __init__(self, dtype: type[cutlass.Numeric]):
        self.dtype = dtype

    def fetch(self, chunk: int, half: Int32, token: Int64, u: Int32, slots: Int32) -> None:
        """Start the copies that `convert` of this chunk of a half needs."""
        if chunk == 0:
            copy_async(slots, token, 512, 16)
        offset = (half * HALF_CHUNKS + chunk) * CHUNK + u * 16
        copy_async(slots + (1 + chunk) * SLOT_BYTES, token, offset, 16)

    def fetch_rope(self, token: Int64, u: Int32, slots: Int32) -> None:
        for i in range(2):
            copy_async(slots + (5 + i) * SLOT_BYTES, token, 528 + u * 32 + i * 16, 16)

    def scales(self, half: Int32, slots: Int32) -> tuple:
        """What `convert` multiplies by in each chunk of a half."""
        first, second = cute.arch.inline_ptx(
            "ld.shared.v2.f32 {{$w0}, {$w1}}, [{$r0}];",
            write_only_types=[Float32, Float32],
            read_only_args=[slots + 8 * half],
        )
        return first, first, second, second

    def read(self, chunk: int, slots: Int32) -> tuple:
        return load_words(slots + (1 + chunk) * SLOT_BYTES, 4)

    def store(self, codes: tuple, scale: Float32, to: Int32) -> None:
        store_codes(to, codes, scale, self.dtype)

    def read_rope(self, slots: Int32) -> tuple:
        return tuple(load_words(slots + (5 + i) * SLOT_BYTES, 4) for i in range(2))

    def store_rope(self, words: tuple, to: Int32) -> None:
        for i in range(2):
            store_words(to ^ (16 * i), words[i])
