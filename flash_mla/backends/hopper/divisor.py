"""Division, on the device also by a number that the host knows."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32


def ceil_div(a, b):
    return (a + b - 1) // b


@dataclass(frozen=True)
class Divisor:
    """A number above 0; a plain division by it takes dozens of instructions. Can be an argument of a kernel."""

    value: Int32
    inverse: Uint32  # (2^32 - 1) // value

    @staticmethod
    def of(value: Int32 | int) -> "Divisor":
        """For host code."""
        return Divisor(Int32(value), Uint32(0xFFFFFFFF) // Uint32(value))

    def quotient(self, n: Int32) -> Int32:
        """n // value of n >= 0."""
        q = cute.arch.inline_ptx(
            "mul.hi.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[n, self.inverse]
        )
        # The product falls short of the quotient by one at most.
        return q + cutlass.select_(n - q * self.value >= self.value, Int32(1), Int32(0))

    def divmod(self, n: Int32) -> tuple[Int32, Int32]:
        """(n // value, n % value) of n >= 0."""
        quotient = self.quotient(n)
        return quotient, n - quotient * self.value
