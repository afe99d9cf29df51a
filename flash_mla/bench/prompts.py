"""How long prompts are that were sent to two services."""

import random

# Prompts' lengths in tokens, each the median of an equal share of the requests, of the Azure LLM inference traces 2023
# (Patel et al., "Splitwise", ISCA 2024; CC-BY).
PROMPTS = {
    "code": (51, 137, 245, 462, 700, 915, 1093, 1342, 1605, 1885, 2195, 2539, 2982, 3776, 5511, 7435),
    "conversation": (
        64, 181, 200, 212, 321, 378, 388, 394, 398, 403, 408, 419, 459, 910, 986, 1011, 1028, 1044, 1059, 1075, 1092,
        1110, 1133, 1164, 1233, 1315, 1479, 2019, 2584, 4074, 4084, 4107,
    ),
}  # fmt: skip


def shuffled(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """In an order as good as that of arrival, the same every time."""
    return tuple(random.Random(0).sample(lengths, len(lengths)))
