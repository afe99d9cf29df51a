"""Numbers of 4 to 32 bits as bytes, in integer arithmetic and casts: no lookup tables, nothing that leaves the device.

The formats are those of the OCP Microscaling (MX) specification v1.0: e2m1 and e4m3 elements, e8m0 scales. torch has
e4m3 everywhere, e8m0 from 2.7 and e2m1 nowhere as something one can cast to, so those two are done by hand.
"""

from __future__ import annotations

import enum

import torch

__all__ = ["Number", "power_of_two_at_least"]


class Number(enum.Enum):
    """How one number is stored. Wider numbers are little-endian; of two e2m1 in a byte, the first is the low nibble."""

    E2M1 = "e2m1"
    E4M3 = "e4m3"
    E8M0 = "e8m0"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def bits(self) -> int:
        return _BITS[self]

    @property
    def largest(self) -> float:
        """The largest finite value; larger ones saturate in E2M1 and E4M3."""
        return _LARGEST[self]

    def to_bytes(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [..., n], last dimension dense -> uint8 [..., n * bits / 8], rounded to nearest, ties to even.

        E8M0 takes powers of two from 2^-126 up. NaN stays NaN, except in E2M1, which has none and stores 0.
        """
        if self is Number.E2M1:
            return _e2m1_to_bytes(x)
        if self is Number.E8M0:
            return torch.where(x.isnan(), 0xFF, x.view(torch.int32) >> 23).to(torch.uint8)
        if self is Number.E4M3:
            # Some versions of torch turn what overflows into NaN; a cache must saturate.
            x = x.clamp(-self.largest, self.largest)
        return x.to(_TORCH_DTYPES[self]).view(torch.uint8)

    def from_bytes(self, data: torch.Tensor) -> torch.Tensor:
        """uint8 [..., n * bits / 8] -> fp32 [..., n], exactly; `data` is aligned to the number's size."""
        if self is Number.E2M1:
            return _e2m1_from_bytes(data)
        if self is Number.E8M0:
            return _e8m0_from_bytes(data)
        return data.view(_TORCH_DTYPES[self]).to(torch.float32)


_BITS = {Number.E2M1: 4, Number.E4M3: 8, Number.E8M0: 8, Number.BF16: 16, Number.FP16: 16, Number.FP32: 32}
_TORCH_DTYPES = {
    Number.E4M3: torch.float8_e4m3fn,
    Number.BF16: torch.bfloat16,
    Number.FP16: torch.float16,
    Number.FP32: torch.float32,
}
_LARGEST = {number: torch.finfo(dtype).max for number, dtype in _TORCH_DTYPES.items()}
_LARGEST |= {Number.E2M1: 6.0, Number.E8M0: 2.0**127}


def power_of_two_at_least(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two >= x, for fp32 x >= 2^-126; infinity and NaN stay."""
    up = (x.view(torch.int32) + 0x007FFFFF) & 0x7F800000
    return torch.where(x.isfinite(), up.view(torch.float32), x)


def _e2m1_to_bytes(x: torch.Tensor) -> torch.Tensor:
    # The magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 are codes 0..7. A code counts the midpoints below the magnitude; a
    # midpoint itself goes to the even code of its neighbours, hence > and >= in turn.
    magnitude = x.abs()
    code = (magnitude > 0.25).to(torch.uint8)
    code += magnitude >= 0.75
    code += magnitude > 1.25
    code += magnitude >= 1.75
    code += magnitude > 2.5
    code += magnitude >= 3.5
    code += magnitude > 5.0
    code |= x.signbit().to(torch.uint8) << 3
    return code[..., 0::2] | (code[..., 1::2] << 4)


def _e2m1_from_bytes(data: torch.Tensor) -> torch.Tensor:
    # Sign, exponent and mantissa at their places in fp16 are the value but for the exponent's bias, 15 instead of 1;
    # that holds for the subnormal 0.5 too.
    pair = data.to(torch.int16)
    low = ((pair << 12) & -0x8000) | ((pair << 9) & 0x0E00)
    high = ((pair << 8) & -0x8000) | ((pair << 5) & 0x0E00)
    return torch.stack((low, high), dim=-1).flatten(-2).view(torch.float16).to(torch.float32) * 2.0**14


def _e8m0_from_bytes(data: torch.Tensor) -> torch.Tensor:
    exponent = data.to(torch.int32)
    # 2^-127 is an fp32 subnormal and 255 means NaN; between them the byte is the fp32 exponent.
    bits = torch.where(exponent == 0, 0x00400000, torch.where(exponent == 0xFF, 0x7FC00000, exponent << 23))
    return bits.view(torch.float32)
