"""Every code of every number format, and the rounding to codes and scales, against their definitions."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_mla.small_floats import Number, power_of_two_at_least


def small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a sign, exponent and mantissa with gradual underflow and no infinities."""
    mantissa = code & (1 << mantissa_bits) - 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    value = math.ldexp(mantissa, 1 - bias - mantissa_bits)
    if exponent:
        value = math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
    return -value if code >> (exponent_bits + mantissa_bits) & 1 else value


ALL_CODES = {
    Number.E2M1: [small_float(nibble, 2, 1, 1) for code in range(256) for nibble in (code & 15, code >> 4)],
    Number.E4M3: [math.nan if code & 0x7F == 0x7F else small_float(code, 4, 3, 7) for code in range(256)],
    Number.E8M0: [math.ldexp(1, code - 127) for code in range(255)] + [math.nan],
}


@pytest.mark.parametrize("number", ALL_CODES, ids=lambda number: number.name)
def test_every_code(number):
    got = number.from_bytes(torch.arange(256, dtype=torch.uint8))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(ALL_CODES[number]), rtol=0, atol=0, equal_nan=True)
    signs = torch.tensor(ALL_CODES[number]).signbit()
    assert torch.equal(got.signbit()[~got.isnan()], signs[~got.isnan()])
    again = number.to_bytes(got)
    first = 1 if number is Number.E8M0 else 0  # it takes no subnormals
    assert torch.equal(number.from_bytes(again)[first:].nan_to_num(7.25), got[first:].nan_to_num(7.25))


@pytest.mark.parametrize(("number", "exponent_bits", "bias"), [(Number.E2M1, 2, 1), (Number.E4M3, 4, 7)])
def test_midpoints_round_to_even_codes(number, exponent_bits, bias):
    mantissa_bits = number.bits - 1 - exponent_bits
    codes = range((1 << number.bits - 1) - (number is Number.E4M3))
    values = [small_float(code, exponent_bits, mantissa_bits, bias) for code in codes]
    for low, high in itertools.pairwise(codes):
        middle = (values[low] + values[high]) / 2
        x = torch.nextafter(torch.tensor([middle] * 4), torch.tensor([middle, 0.0, 999.0, middle]))
        x[3] = -middle
        got = number.from_bytes(number.to_bytes(x))
        even = values[low if low % 2 == 0 else high]
        assert got.tolist() == [even, values[low], values[high], -even]
    saturated = number.from_bytes(number.to_bytes(torch.tensor([number.largest * 1.04, 1e9, -1e9, math.inf])))
    assert saturated.tolist() == [number.largest, number.largest, -number.largest, number.largest]


@given(st.integers(-126, 126), st.floats(1, 2, exclude_max=True, width=32))
def test_power_of_two_at_least(exponent, mantissa):
    got = power_of_two_at_least(torch.tensor([math.ldexp(mantissa, exponent)]))
    assert got.item() == math.ldexp(1, exponent + (mantissa > 1))


def test_power_of_two_at_the_edges():
    above = torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))
    x = torch.stack([above, torch.tensor(2.0), torch.tensor(math.inf), torch.tensor(math.nan)])
    assert power_of_two_at_least(x).nan_to_num(-1, posinf=-2).tolist() == [4.0, 2.0, -2.0, -1.0]


def test_nan_stays_nan():
    nan = torch.tensor([math.nan])
    for number in Number:
        if number is not Number.E2M1:
            assert number.from_bytes(number.to_bytes(nan)).isnan().all()
