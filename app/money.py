"""Hides how money is counted: in whole nano-USD, rounded once a call, and split without a remainder."""

from collections.abc import Sequence
from decimal import Decimal
from itertools import accumulate, pairwise
from typing import Final

NANO_USD: Final = 10**9
"""So many are a dollar."""

MOST_USD: Final = 9_000_000
"""The largest budget: all that counts nano-USD counts so far exactly, a double too."""

_PICO: Final = 1000
_PLACES = 9


def cost_nano_usd(tokens: int, pico_usd_per_token: int) -> int:
    """What so many tokens of one call cost; half a nano-USD goes to the even side."""
    whole, rest = divmod(tokens * pico_usd_per_token, _PICO)
    return whole + (rest > _PICO // 2 or (rest == _PICO // 2 and whole % 2 == 1))


def split(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole parts as the weights are, each off by less than one; they sum to it. Equal ones if all are 0."""
    weights = weights if any(weights) else [1] * len(weights)
    whole = sum(weights)
    upto = [0, *(weight * total // whole for weight in accumulate(weights))]
    return [end - start for start, end in pairwise(upto)]


def nano_usd_of(dollars: Decimal) -> int:
    """Exactly so many. ValueError where that would have to be rounded, or is no sum that a budget can be."""
    exponent = dollars.as_tuple().exponent
    if not isinstance(exponent, int) or exponent < -_PLACES or not 0 <= dollars <= MOST_USD:
        raise ValueError(f"must be dollars from 0 to {MOST_USD} with at most {_PLACES} decimals")
    return int(dollars * NANO_USD)


def usd(nano_usd: int) -> str:
    """For people: at least cents, and every digit that counts."""
    sign, whole = "-" if nano_usd < 0 else "", abs(nano_usd)
    digits = f"{whole % NANO_USD:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole // NANO_USD}.{digits}"
