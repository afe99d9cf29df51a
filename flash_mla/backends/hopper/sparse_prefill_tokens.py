"""The order in which sparse prefill takes query tokens, and how many leading indices of each count."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32


@dataclass(frozen=True)
class TokenList:
    """A word for each token: token * 2^length_bits + length; or, as they come, its length."""

    words: cute.Tensor  # [s_q] int32
    length_bits: Int32  # 0: tokens are taken as they come

    def read(self, place: Int32, word: Int32) -> tuple[Int32, Int32]:
        """(token, length) of the word at `place`."""
        is_listed = self.length_bits > 0
        token = cutlass.select_(is_listed, word >> self.length_bits, place)
        return token, cutlass.select_(is_listed, word & ((1 << self.length_bits) - 1), word)

    def token(self, place: Int32) -> Int32:
        return self.read(place, self.words[place])[0]
