"""Raw bytes of quantised KV rows to 16-bit values in swizzled shared memory, half a row at a time.

Four threads share a row: thread u of them owns columns 16 u ... 16 u + 15 of each chunk of 64 columns. It copies its
codes into slots of shared memory that no other thread touches, hence needs no barrier before it reads them again, and
waits on no scoreboard; the four share scales, for which their warp synchronises. There is room for two half rows, or
three: what is on its way to them is what keeps the memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from flash_mla.backends.hopper.copies import EVICT_FIRST, copy_async
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS

THREADS = 128
THREADS_PER_ROW = 4
CHUNK_BYTES = ROWS * CHUNK * 2
HALF_CHUNKS = 4  # chunks of 64 columns in half a row of V
UNIT = 16  # bytes that the swizzle keeps together

PACKED = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}
# The upper and the lower bytes of 0, 0.5, 1, 1.5; 2, 3, 4, 6.
E2M1_BYTES = {
    cutlass.BFloat16: ((0x3F3F3F00, 0x40404040), (0xC0800000, 0xC0804000)),
    cutlass.Float16: ((0x3E3C3800, 0x46444240), (0, 0)),
}


@dataclass(frozen=True)
class Slots:
    """A thread's place in shared memory for the raw bytes of half rows; `index` says which of `count`."""

    base: Int32
    thread: Int32
    code_bytes: int  # of a thread and chunk
    scale_bytes: int  # of a thread
    count: int

    def codes(self, index, chunk: int) -> tuple[Int32, int]:
        """Address, and an offset that can be part of an instruction."""
        size = THREADS * self.code_bytes
        return self.base + self.thread * self.code_bytes + index * (HALF_CHUNKS * size), chunk * size

    def scales(self, index) -> Int32:
        first = self.base + self.count * HALF_CHUNKS * THREADS * self.code_bytes
        return first + self.thread * self.scale_bytes + index * (THREADS * self.scale_bytes)


def load_words(address: Int32, offset: int, count: int, dtype: type[cutlass.Numeric] = Uint32) -> tuple:
    """`count` (1, 2 or 4) 32-bit words of shared memory."""
    names = ", ".join(f"{{$w{i}}}" for i in range(count))
    kind = "f32" if dtype is Float32 else "u32"
    vector, names = (f".v{count}", f"{{{names}}}") if count > 1 else ("", names)
    words = cute.arch.inline_ptx(
        f"ld.shared{vector}.{kind} {names}, [{{$r0}}+{offset}];",
        write_only_types=[dtype] * count,
        read_only_args=[address],
    )
    return words if count > 1 else (words,)


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


def e2m1_to_16bit(codes: Uint32, scale: Uint32, dtype: type[cutlass.Numeric]) -> tuple:
    """Four e2m1 codes, the low 16 bits of a word, times a scale given twice, exactly: two words of two values.

    The two bytes of a magnitude are looked up by its three bits; signs are put on the upper byte.
    """
    upper, lower = E2M1_BYTES[dtype]
    packed = PACKED[dtype]
    return cute.arch.inline_ptx(
        f"""{{
.reg .b32 magnitude, upper, lower, shifted, signs;
and.b32 magnitude, {{$r0}}, 0x7777;
prmt.b32 upper, {upper[0]:#x}, {upper[1]:#x}, magnitude;
prmt.b32 lower, {lower[0]:#x}, {lower[1]:#x}, magnitude;
shl.b32 shifted, {{$r0}}, 4;
prmt.b32 signs, shifted, {{$r0}}, 0xd9c8;
and.b32 signs, signs, 0x80808080;
or.b32 upper, upper, signs;
prmt.b32 shifted, lower, upper, 0x5140;
prmt.b32 signs, lower, upper, 0x7362;
mul.rn.{packed} {{$w0}}, shifted, {{$r1}};
mul.rn.{packed} {{$w1}}, signs, {{$r1}};
}}""",
        write_only_types=[Uint32, Uint32],
        read_only_args=[codes, scale],
    )


def e4m3_scale(word: Uint32, byte: Int32, dtype: type[cutlass.Numeric]) -> Uint32:
    """A byte of a word as e4m3, converted exactly, and given twice."""
    return cute.arch.inline_ptx(
        f"""{{
.reg .b32 x;
.reg .b16 code, h0, h1;
.reg .f32 f;
shr.u32 x, {{$r0}}, {{$r1}};
cvt.u16.u32 code, x;
cvt.rn.f16x2.e4m3x2 x, code;
mov.b32 {{h0, h1}}, x;
cvt.f32.f16 f, h0;
cvt.rn.{PACKED[dtype]}.f32 {{$w0}}, f, f;
}}""",
        write_only_types=[Uint32],
        read_only_args=[word, byte * 8],
    )


def bf16_to_fp16(word: Uint32) -> Uint32:
    """Two values; those beyond fp16's range become infinite."""
    return cute.arch.inline_ptx(
        """{
.reg .f32 low, high;
shl.b32 low, {$r0}, 16;
and.b32 high, {$r0}, 0xffff0000;
cvt.rn.f16x2.f32 {$w0}, high, low;
}""",
        write_only_types=[Uint32],
        read_only_args=[word],
    )


def e8m0_scale(word: Uint32, byte: Int32 | int) -> Float32:
    """A byte of a word as e8m0: a power of two, or NaN."""
    return cute.arch.inline_ptx(
        """{
.reg .b32 x, e;
.reg .pred p;
shr.u32 e, {$r0}, {$r1};
and.b32 e, e, 255;
shl.b32 x, e, 23;
max.u32 x, x, 0x00400000;
setp.eq.u32 p, e, 255;
selp.b32 x, 0x7fc00000, x, p;
mov.b32 {$w0}, x;
}""",
        write_only_types=[Float32],
        read_only_args=[word, Int32(byte * 8)],
    )


class Loader:
    """How the rows of a format are fetched and converted; a chunk is one of the four of a half row.

    plain_chunk: the chunk of K, if any, whose 64 values a row holds in bf16, at `plain_offset`.
    half_rows: of a thread, that there is room for; K without RoPE leaves room for three.
    """

    d: int
    token_bytes: int
    code_bytes: int  # of a thread and chunk
    scale_bytes: int  # of a thread
    scale_offset = 0  # of a row's scales
    scales_apart = False  # whether a page holds its scales behind all its rows
    plain_chunk: int | None = None
    plain_offset = 0
    rope_codes = False  # whether RoPE is converted, too
    half_rows = 2
    whole_lines = True  # whether the L2 is to have all of the lines that a row is part of

    def __init__(self, dtype: type[cutlass.Numeric]):
        self.dtype = dtype

    @classmethod
    def raw_bytes(cls) -> int:
        return cls.half_rows * THREADS * (HALF_CHUNKS * cls.code_bytes + cls.scale_bytes + UNIT * cls.rope_codes)

    def slots(self, base: Int32, thread: Int32) -> Slots:
        return Slots(base, thread, self.code_bytes, self.scale_bytes, self.half_rows)

    def fetch(self, slots: Slots, index, half: Int32, token: Int64, scales: Int64, chunks: range) -> None:
        """Start the copies of some chunks of half a row, of its scales with the first; of zeros if `token` is 0.

        scales: address of the row's scales.
        """
        u = slots.thread % THREADS_PER_ROW
        if 0 in chunks:  # thread u of a row brings a part of its scales
            self.copy(self.scale_slot(slots, index), token, self.scale_source(scales, u), self.scale_bytes)
        source = token + Int64(half * (HALF_CHUNKS * THREADS_PER_ROW * self.code_bytes) + u * self.code_bytes)
        for chunk in chunks:
            offset = chunk * THREADS_PER_ROW * self.code_bytes
            self.copy(slots.codes(index, chunk), token, (source, offset), self.code_bytes)

    def copy(self, to: tuple[Int32, int], token: Int64, source: tuple[Int64, int], nbytes: int) -> None:
        """Start to copy a part of a row, which hardly anybody else reads: the L2 had better keep all else."""
        copy_async(to, token, source, nbytes, hint=EVICT_FIRST, whole_lines=self.whole_lines)

    def scale_slot(self, slots: Slots, index) -> tuple[Int32, int]:
        return slots.scales(index), 0

    def scale_source(self, scales: Int64, u: Int32) -> tuple[Int64, int]:
        return scales + Int64(u * self.scale_bytes), self.scale_offset

    def row_scales(self, slots: Slots, index) -> Int32:
        """Address of the scales that the four threads of a row have brought."""
        return slots.scales(index) - slots.thread % THREADS_PER_ROW * self.scale_bytes

    def read_codes(self, slots: Slots, index, chunk: int) -> tuple:
        """This thread's codes of a chunk of the half row that has arrived."""
        return load_words(*slots.codes(index, chunk), self.code_bytes // 4)

    def read_scales(self, slots: Slots, index, half: Int32) -> tuple:
        """The scales of the half row that has arrived, as they are stored."""
        raise NotImplementedError

    def scale(self, stored: tuple, chunk: int, u: Int32) -> Float32:
        """What thread u multiplies its codes of a chunk by."""
        raise NotImplementedError

    def store(self, codes: tuple, scale: Float32, to: tuple[Int32, Int32], offset: int) -> None:
        """This thread's 16 values of a chunk, to shared memory: 16 bytes to each address in `to`."""
        for i in range(2):
            words = [value for word in codes[2 * i : 2 * i + 2] for value in e4m3_to_16bit(word, scale, self.dtype)]
            store_words(to[i], offset, tuple(words))


class Fp8V32(Loader):
    """656 bytes: 512 e4m3, four fp32 scales, 64 bf16 of RoPE."""

    d = 576
    token_bytes = 656
    code_bytes, scale_bytes = 16, 4
    scale_offset = 512
    plain_chunk, plain_offset = 8, 528
    whole_lines = False  # rows begin anywhere in a line: 20 % more bytes

    def read_scales(self, slots: Slots, index, half: Int32) -> tuple:
        return load_words(self.row_scales(slots, index) + half * 8, 0, 2, Float32)

    def scale(self, stored: tuple, chunk: int, u: Int32) -> Float32:
        return stored[chunk // 2]


class Fp8V4(Loader):
    """576 bytes: 448 e4m3 and 64 bf16 of RoPE; behind the rows of a page, 8 bytes for each: 7 e8m0 scales."""

    d = 512
    token_bytes = 576
    code_bytes, scale_bytes = 16, 4
    scales_apart = True
    plain_chunk, plain_offset = 7, 448
    half_rows = 3

    def scale_source(self, scales: Int64, u: Int32) -> tuple[Int64, int]:
        return scales + Int64(u % 2 * 4), 0

    def read_scales(self, slots: Slots, index, half: Int32) -> tuple:
        return load_words(self.row_scales(slots, index) + half * 4, 0, 1)

    def scale(self, stored: tuple, chunk: int, u: Int32) -> Float32:
        return e8m0_scale(stored[0], chunk)


class Fp8V41(Loader):
    """528 bytes: 512 e4m3, 16 e8m0 scales."""

    d = 512
    token_bytes = 528
    code_bytes, scale_bytes = 16, 4
    scale_offset = 512
    half_rows = 3

    def read_scales(self, slots: Slots, index, half: Int32) -> tuple:
        return load_words(self.row_scales(slots, index) + half * 8, 0, 2)

    def scale(self, stored: tuple, chunk: int, u: Int32) -> Float32:
        return e8m0_scale(stored[chunk // 2], chunk % 2 * 2 + u // 2)


class E2m1(Loader):
    """512 e2m1 and 32 e4m3 scales."""

    code_bytes, scale_bytes = 8, 8

    def scale(self, stored: tuple, chunk: int, u: Int32) -> Uint32:
        return e4m3_scale(stored[chunk], u, self.dtype)

    def store(self, codes: tuple, scale: Uint32, to: tuple[Int32, Int32], offset: int) -> None:
        for i in range(2):
            words = [value for half in (codes[i], codes[i] >> 16) for value in e2m1_to_16bit(half, scale, self.dtype)]
            store_words(to[i], offset, tuple(words))


class Fp4V41(E2m1):
    """288 bytes: 512 e2m1, 32 e4m3 scales; in the slots of Fp8V41, half of whose codes' room takes the scales."""

    token_bytes = 288
    scale_offset = 256

    def scale_slot(self, slots: Slots, index) -> tuple[Int32, int]:
        address, offset = slots.codes(index, 0)
        return address, offset + self.code_bytes

    def read_scales(self, slots: Slots, index, half: Int32) -> tuple:
        address, offset = self.scale_slot(slots, index)
        first = address + (2 * half - slots.thread % THREADS_PER_ROW) * slots.code_bytes
        return (*load_words(first, offset, 2), *load_words(first, offset + slots.code_bytes, 2))


class Nvfp4(E2m1):
    """352 bytes: 512 e2m1, 64 e4m3 of RoPE without a scale, 32 e4m3 scales."""

    d = 576
    token_bytes = 352
    scale_offset = 320
    rope_offset = 256
    rope_codes = True

    def rope_slot(self, slots: Slots, index) -> Int32:
        first = slots.base + slots.count * THREADS * (HALF_CHUNKS * self.code_bytes + self.scale_bytes)
        return first + slots.thread * UNIT + index * (THREADS * UNIT)

    def fetch_rope(self, slots: Slots, index, token: Int64) -> None:
        u = slots.thread % THREADS_PER_ROW
        source = (token + Int64(u * UNIT), self.rope_offset)
        self.copy((self.rope_slot(slots, index), 0), token, source, UNIT)

    def read_scales(self, slots: Slots, index, half: Int32) -> tuple:
        return load_words(self.row_scales(slots, index) + half * 16, 0, 4)

    def store_rope(self, slots: Slots, index, to: tuple[Int32, Int32]) -> None:
        Loader.store(self, load_words(self.rope_slot(slots, index), 0, 4), Float32(1.0), to, 0)
