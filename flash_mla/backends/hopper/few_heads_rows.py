"""Rows of quantised caches, as they arrive in shared memory, to operands in registers: K and V^T as the A of wgmma.

A product's order of summation is free, and so is the order of the output's rows. Hence thread (g, t) = (lane / 4,
lane % 4) of a warp takes whole words for the elements that wgmma wants of it: of K's rows g and g + 8 every fourth 16
bytes, for whose order Q is permuted; of V^T four neighbouring columns of eight tokens, which are rows g and g + 8 of
two products.

Codes become fp16, exactly. A scale is either a factor, of scores and of probabilities, or, where too few columns share
it for that, a multiplier of codes: relative to the largest of its token, which then is the factor.

Rows lie an odd number of 16-byte units apart, so that no two threads of an access want the same bank.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Uint32

from flash_mla.backends.hopper.dequant import PACKED, Fp8V4, Fp8V32, Fp8V41, load_words
from flash_mla.backends.hopper.wgmma import CHUNK, ROWS

UNIT = 16  # bytes of a copy
UNIT_COLUMNS = 16  # that a thread takes of a chunk
TOKENS = ROWS  # of a block
WARP_TOKENS = TOKENS // 4
GROUP = 2 * CHUNK  # columns: eight units of codes, of which each of four threads takes two
LEAST_EXPONENT = 67  # biased, of a token's largest scale: 2^-60 stands for smaller ones

Part = tuple[tuple[int, ...], int | None]


class Rows:
    """How the rows of a format become operands; what is common to those of e4m3 codes.

    A chunk is 64 columns of K: four k-steps, the first two of a thread's first 16 bytes.

    parts: of the scores: (chunks, number of their factor or None).
    versions: of P: (dtype, number of its factor or None); `version` says which one a chunk of V takes.
    """

    d: int
    token_bytes: int  # of a row in the cache
    pitch: int  # bytes from a row to the next in shared memory
    scales_apart = False  # whether 8 bytes of scales are to be put behind a row
    parts: tuple[Part, ...]
    versions: tuple[tuple[type[cutlass.Numeric], int | None], ...] = ((Float16, 0),)
    multipliers = 0  # of a token
    multiplier_pitch = TOKENS * 2 + UNIT  # bytes from a multiplier's tokens to the next one's

    @property
    def table_bytes(self) -> int:
        """Of a block's multipliers, and of its tokens' factors behind them."""
        return self.multipliers * self.multiplier_pitch + TOKENS * 4 if self.multipliers else 0

    def units(self, chunk: int) -> tuple[int, int]:
        """(first, step): thread t of four takes the 16 columns from 16 (first + t step) on of a chunk.

        Columns 4 i + 2 h + {0, 1} of them are values 8 h + 2 t + {0, 1} of the chunk's k-step i; of bf16 columns, those
        of k-step i are 4 i + 2 h + {0, 1} likewise.
        """
        return chunk // 2 * 8 + chunk % 2, 2

    def write_table(self, raw: Int32, table: Int32, thread: Int32) -> None:
        """This thread's share of a block's table, in a warpgroup."""

    def factors(self, raw: Int32, table: Int32, token: Int32, r: int) -> tuple:
        """The factors of row `token` + 8 r."""
        offset = self.multipliers * self.multiplier_pitch + 32 * r
        return load_words(table + token * 4, offset, 1, Float32)

    def factor(self, raw: Int32, table: Int32, token: Int32, r: int, i: int) -> Float32:
        """The i-th of them."""
        return self.factors(raw, table, token, r)[i]

    def k_words(self, raw: Int32, table: Int32, chunk: int, warp: Int32, g: Int32, t: Int32) -> list:
        """Of each of this thread's two rows, what its part of a chunk of K is made of: (words, multiplier)."""
        token = warp * WARP_TOKENS + g
        start = raw + (token * self.pitch + t * (2 * UNIT))
        offset = chunk // 2 * GROUP + chunk % 2 * UNIT
        return [
            (load_words(start, offset + 8 * r * self.pitch, 4), self.k_multiplier(table, chunk, token, r, t))
            for r in range(2)
        ]

    def k_operand(self, chunk: int, rows: list) -> cute.Tensor:
        """A chunk of K, given this thread's words of its rows."""
        a = operand_a(Float16, 4)
        words = cute.recast_tensor(a, Uint32)
        for r, (codes, multiplier) in enumerate(rows):
            for i in range(4):
                pair = e4m3_to_fp16(codes[i])
                words[4 * i + r], words[4 * i + 2 + r] = (times(value, multiplier) for value in pair)
        return a

    def bf16_words(self, start: Int32) -> list:
        """Of each of a thread's two rows, 16 bf16 values."""
        at = [8 * r * self.pitch for r in range(2)]
        return [(*load_words(start, offset, 4), *load_words(start, offset + UNIT, 4)) for offset in at]

    def bf16_operand(self, rows: list) -> cute.Tensor:
        """The values of a thread's two rows as they are."""
        a = operand_a(BFloat16, 4)
        words = cute.recast_tensor(a, Uint32)
        for r, values in enumerate(rows):
            for i in range(8):
                words[2 * i + r] = values[i]
        return a

    def k_multiplier(self, table: Int32, chunk: int, token: Int32, r: int, t: Int32) -> Uint32 | None:
        """What this thread multiplies its codes in a chunk of row `token` + 8 r by, given twice."""
        return None

    def v_words(self, raw: Int32, table: Int32, group: int, first: int, warp: Int32, g: Int32, t: Int32) -> list:
        """What V^T of two chunks, 2 group and 2 group + 1, is made of, over two k-steps of 16 tokens from `first` on.

        Of each eight tokens: (words of this thread's two, multiplier).
        """
        start = raw + (t * (2 * self.pitch) + warp * 32 + g * 4)
        return [
            (
                [load_words(start, (token + i) * self.pitch + group * GROUP, 1)[0] for i in range(2)],
                self.v_multiplier(table, group, token, warp, t),
            )
            for token in range(16 * first, 16 * first + 32, 8)
        ]

    def v_operands(self, group: int, tokens: list) -> list:
        """V^T of two chunks, given this thread's words of its tokens."""
        a = [operand_a(Float16, 2) for _ in range(2)]
        words = [cute.recast_tensor(part, Uint32) for part in a]
        for i, (pair, multiplier) in enumerate(tokens):
            for half in range(2):
                rows = e4m3_to_fp16(interleave(*pair, 0x7362 if half else 0x5140))
                for r in range(2):
                    words[half][2 * i + r] = times(rows[r], multiplier)
        return a

    def v_multiplier(self, table: Int32, group: int, token: int, warp: Int32, t: Int32) -> Uint32 | None:
        """What this thread multiplies its columns by, of tokens `token` + 2 t + {0, 1}."""
        return None

    def version(self, chunk: int) -> int:
        return 0

    def column(self, chunk: int, warp: Int32, g: Int32) -> Int32:
        """The column of V that is row g of this warp in a chunk's product; row g + 8 is its right neighbour."""
        return chunk // 2 * GROUP + chunk % 2 * 2 + warp * 32 + g * 4

    def neighbours(self, group: int) -> bool:
        """Whether a thread's columns of two chunks are four neighbours."""
        return True


class Fp8V32Rows(Rows):
    """Four fp32 scales, of a group each: factors all."""

    d = Fp8V32.d
    token_bytes = pitch = Fp8V32.token_bytes
    parts = (((8,), None), *(((2 * i, 2 * i + 1), i) for i in range(4)))
    versions = tuple((Float16, i) for i in range(4))

    def units(self, chunk: int) -> tuple[int, int]:
        return super().units(chunk) if chunk < 8 else (4 * chunk, 1)

    def factors(self, raw: Int32, table: Int32, token: Int32, r: int) -> tuple:
        return load_words(raw + token * self.pitch, Fp8V32.scale_offset + 8 * r * self.pitch, 4, Float32)

    def factor(self, raw: Int32, table: Int32, token: Int32, r: int, i: int) -> Float32:
        return load_words(raw + token * self.pitch, Fp8V32.scale_offset + 8 * r * self.pitch + 4 * i, 1, Float32)[0]

    def k_words(self, raw: Int32, table: Int32, chunk: int, warp: Int32, g: Int32, t: Int32) -> list:
        if chunk < 8:
            return super().k_words(raw, table, chunk, warp, g, t)
        start = raw + ((warp * WARP_TOKENS + g) * self.pitch + t * (2 * UNIT))
        return self.bf16_words(start + Fp8V32.plain_offset)

    def k_operand(self, chunk: int, rows: list) -> cute.Tensor:
        return super().k_operand(chunk, rows) if chunk < 8 else self.bf16_operand(rows)

    def version(self, chunk: int) -> int:
        return chunk // 2


class PowersOfTwoRows(Rows):
    """Scales of e8m0: multipliers."""

    scale_offset: int  # bytes, from a row on

    def write_table(self, raw: Int32, table: Int32, thread: Int32) -> None:
        token, share = thread % TOKENS, thread // TOKENS  # two threads a token
        count = self.multipliers // 2
        address = raw + token * self.pitch
        scales = self.load_scales(address)
        largest = Int32(LEAST_EXPONENT)
        for exponent in scales:
            largest = cutlass.max(largest, exponent)
        start = table + share * (count * self.multiplier_pitch) + token * 2
        for i in range(count):
            exponent = cutlass.select_(share == 0, scales[i], scales[(count + i) % len(scales)])
            store_half(start, i * self.multiplier_pitch, power_of_two(cutlass.max(127 + exponent - largest, 1)))
        # Both threads write the same.
        factor = cutlass.select_(largest == 255, Float32.nan, power_of_two(largest))
        store_float(table + token * 4, self.multipliers * self.multiplier_pitch, factor)

    def load_scales(self, row: Int32) -> list:
        """The biased exponents of a row's scales."""
        words = load_words(row, self.scale_offset, self.multipliers // 4)
        return [Int32((word >> (8 * i)) & 0xFF) for word in words for i in range(4)]


class Fp8V41Rows(PowersOfTwoRows):
    """A scale for every 32 columns."""

    d = Fp8V41.d
    token_bytes = pitch = Fp8V41.token_bytes
    parts = ((tuple(range(8)), 0),)
    multipliers = 16
    scale_offset = Fp8V41.scale_offset

    def k_multiplier(self, table: Int32, chunk: int, token: Int32, r: int, t: Int32) -> Uint32:
        start = table + (t * self.multiplier_pitch + token * 2)
        return load_twice(start, chunk // 2 * (4 * self.multiplier_pitch) + 16 * r)

    def v_multiplier(self, table: Int32, group: int, token: int, warp: Int32, t: Int32) -> Uint32:
        start = table + (warp * self.multiplier_pitch + t * 4)
        return load_words(start, group * (4 * self.multiplier_pitch) + token * 2, 1)[0]


class Fp8V4Rows(PowersOfTwoRows):
    """A scale for every 64 of 448 columns; the last chunk is RoPE, of K and of V."""

    d = Fp8V4.d
    token_bytes = Fp8V4.token_bytes
    pitch = token_bytes + UNIT
    scales_apart = True
    parts = (((7,), None), (tuple(range(7)), 0))
    versions = ((Float16, 0), (BFloat16, None))
    multipliers = 8  # the last is of no use
    scale_offset = token_bytes

    def units(self, chunk: int) -> tuple[int, int]:
        return super().units(chunk) if chunk < 6 else (4 * chunk, 1)  # two chunks of different kinds

    def load_scales(self, row: Int32) -> list:
        return super().load_scales(row)[:7]

    def k_words(self, raw: Int32, table: Int32, chunk: int, warp: Int32, g: Int32, t: Int32) -> list:
        if chunk < 6:
            return super().k_words(raw, table, chunk, warp, g, t)
        token = warp * WARP_TOKENS + g
        row = raw + token * self.pitch
        if chunk == 7:
            return self.bf16_words(row + t * (2 * UNIT) + Fp8V4.plain_offset)
        multipliers = table + token * 2
        return [
            (
                load_words(row + t * UNIT, 3 * GROUP + 8 * r * self.pitch, 4),
                load_twice(multipliers, 6 * self.multiplier_pitch + 16 * r),
            )
            for r in range(2)
        ]

    def k_operand(self, chunk: int, rows: list) -> cute.Tensor:
        return super().k_operand(chunk, rows) if chunk < 7 else self.bf16_operand(rows)

    def k_multiplier(self, table: Int32, chunk: int, token: Int32, r: int, t: Int32) -> Uint32:
        start = table + (t // 2 * self.multiplier_pitch + token * 2)
        return load_twice(start, chunk // 2 * (2 * self.multiplier_pitch) + 16 * r)

    def v_multiplier(self, table: Int32, group: int, token: int, warp: Int32, t: Int32) -> Uint32:
        start = table + (warp // 2 * self.multiplier_pitch + t * 4)
        return load_words(start, group * (2 * self.multiplier_pitch) + token * 2, 1)[0]

    def v_words(self, raw: Int32, table: Int32, group: int, first: int, warp: Int32, g: Int32, t: Int32) -> list:
        if group < 3:
            return super().v_words(raw, table, group, first, warp, g, t)
        start = raw + t * (2 * self.pitch)
        codes, plain = start + (warp * 16 + g * 2), start + (warp * 32 + g * 4)
        tokens = []
        for token in range(16 * first, 16 * first + 32, 8):
            at = [(token + i) * self.pitch for i in range(2)]
            pair = [load_short(codes, offset + 3 * GROUP) for offset in at]
            multiplier = load_words(table + t * 4, 6 * self.multiplier_pitch + token * 2, 1)[0]
            tokens.append((pair, multiplier, [load_words(plain, offset + Fp8V4.plain_offset, 1)[0] for offset in at]))
        return tokens

    def v_operands(self, group: int, tokens: list) -> list:
        if group < 3:
            return super().v_operands(group, tokens)
        a = [operand_a(dtype, 2) for dtype in (Float16, BFloat16)]
        words = [cute.recast_tensor(part, Uint32) for part in a]
        for i, (pair, multiplier, plain) in enumerate(tokens):
            rows = e4m3_to_fp16(interleave(*pair, 0x5140))
            for r in range(2):
                words[0][2 * i + r] = times(rows[r], multiplier)
                words[1][2 * i + r] = interleave(*plain, 0x7632 if r else 0x5410)
        return a

    def version(self, chunk: int) -> int:
        return chunk // 7

    def column(self, chunk: int, warp: Int32, g: Int32) -> Int32:
        return super().column(chunk, warp, g) if chunk < 6 else chunk * CHUNK + warp * 16 + g * 2

    def neighbours(self, group: int) -> bool:
        return group < 3


def operand_a(dtype: type[cutlass.Numeric], k_steps: int) -> cute.Tensor:
    """Registers of an A operand: words 4 k ... 4 k + 3 are of k-step k, of (row, row + 8) x (early, late) values."""
    return cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, k_steps), stride=((1, 2, 4), 0, 8)), dtype)


def times(values: Uint32, multipliers: Uint32 | None) -> Uint32:
    """Two products of fp16."""
    if multipliers is None:
        return values
    return cute.arch.inline_ptx(
        "mul.rn.f16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[values, multipliers]
    )


def e4m3_to_fp16(word: Uint32) -> tuple:
    """Four e4m3 codes: two words of two fp16 values."""
    return cute.arch.inline_ptx(
        """{
.reg .b16 low, high;
mov.b32 {low, high}, {$r0};
cvt.rn.f16x2.e4m3x2 {$w0}, low;
cvt.rn.f16x2.e4m3x2 {$w1}, high;
}""",
        write_only_types=[Uint32, Uint32],
        read_only_args=[word],
    )


def interleave(a: Uint32, b: Uint32, order: int) -> Uint32:
    """Four of the eight bytes of a, b, in an order as prmt takes it."""
    return cute.arch.inline_ptx(
        f"prmt.b32 {{$w0}}, {{$r0}}, {{$r1}}, {order:#x};", write_only_types=[Uint32], read_only_args=[a, b]
    )


def pack(dtype: type[cutlass.Numeric], low: Float32, high: Float32) -> Uint32:
    """Two values rounded to 16 bits."""
    return cute.arch.inline_ptx(
        f"cvt.rn.{PACKED[dtype]}.f32 {{$w0}}, {{$r1}}, {{$r0}};", write_only_types=[Uint32], read_only_args=[low, high]
    )


def power_of_two(exponent: Int32) -> Float32:
    """2^(exponent - 127)."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 x; shl.b32 x, {$r0}, 23; mov.b32 {$w0}, x; }",
        write_only_types=[Float32],
        read_only_args=[exponent],
    )


def biased_exponent(x: Float32) -> Int32:
    """Of a number that is not negative."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 x; mov.b32 x, {$r0}; shr.u32 {$w0}, x, 23; }", write_only_types=[Int32], read_only_args=[x]
    )


def load_short(address: Int32, offset: int) -> Uint32:
    """16 bits of shared memory, zeros above."""
    return cute.arch.inline_ptx(
        f"{{ .reg .u16 x; ld.shared.u16 x, [{{$r0}}+{offset}]; cvt.u32.u16 {{$w0}}, x; }}",
        write_only_types=[Uint32],
        read_only_args=[address],
    )


def load_twice(address: Int32, offset: int) -> Uint32:
    """16 bits of shared memory, in both halves of a word."""
    return cute.arch.inline_ptx(
        f"{{ .reg .b16 x; ld.shared.b16 x, [{{$r0}}+{offset}]; mov.b32 {{$w0}}, {{x, x}}; }}",
        write_only_types=[Uint32],
        read_only_args=[address],
    )


def store_half(address: Int32, offset: int, value: Float32) -> None:
    """A number to shared memory as fp16."""
    cute.arch.inline_ptx(
        f"{{ .reg .b16 x; cvt.rn.f16.f32 x, {{$r1}}; st.shared.b16 [{{$r0}}+{offset}], x; }}",
        read_only_args=[address, value],
    )


def store_float(address: Int32, offset: int, value: Float32) -> None:
    """A number to shared memory."""
    cute.arch.inline_ptx(f"st.shared.f32 [{{$r0}}+{offset}], {{$r1}};", read_only_args=[address, value])
