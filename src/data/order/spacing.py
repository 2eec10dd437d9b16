"""The round of an epoch in which a frame is read, chosen so that neighbouring frames never share a batch.

The frames of a source, in archive order, are cut into blocks of L (a prime) consecutive frames. A group of blocks is
read in L rounds; round r takes from each block the frame at index p(r) = (a + r m) mod L. The indices of neighbouring
frames f and f + 1 differ by 1 (mod L), also across the border of two blocks. Their rounds are therefore d = |1/m mod L|
apart (cyclically), with at least d - 1 whole rounds between them.

The last rounds of an epoch are followed by the first of the next. With the same a and m in both, the cycle continues.
With different values, some starts and steps would bring neighbours together and are rejected: even epochs draw freely,
odd epochs draw values that fit the epochs before and after.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from src.data.rng import stream

_MAX_TRY = 1000
_ROOM = 12  # starts and steps vary if a block has at least this many frames per round of required distance


class Rounds(NamedTuple):
    """Round r of an epoch reads the frame at index (start + r step) mod block of each block."""

    block: int  # L, a prime (or 1)
    start: int
    step: int

    def place(self, number: int) -> int:
        """The index within a block that round `number` reads; negative numbers count from the epoch's end."""
        return (self.start + number * self.step) % self.block


def largest_prime(limit: int) -> int:
    """The largest prime up to `limit`; 1 if there is none."""
    return next((n for n in range(limit, 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1))), 1)


def distance(block: int, step: int) -> int:
    """Cyclic distance, in rounds, between neighbouring frames."""
    if block < 3:
        return block - 1
    inverse = pow(step, -1, block)
    return min(inverse, block - inverse)


@lru_cache(maxsize=256)
def _steps(block: int, apart: int) -> tuple[int, ...]:
    """Steps that keep neighbouring frames `apart` rounds apart (or as far as possible), best first.

    The best steps also keep frames of nearby rounds far apart in the clip, since not only neighbours look alike.
    """

    def spread(step: int) -> int:
        return min(min(k * step % block, -k * step % block) * k for k in range(1, 9) if k < block)

    if block < 3:
        return (1,)
    steps = sorted(range(1, block), key=lambda step: (spread(step), step), reverse=True)
    good = [step for step in steps if distance(block, step) >= apart]
    return tuple(good) or (max(steps, key=lambda step: distance(block, step)),)


def _fit(first: Rounds, second: Rounds, apart: int) -> bool:
    """Whether neighbours stay `apart` rounds apart if epoch `second` follows `first`."""
    block = first.block
    return all(
        1 < (second.place(i) - first.place(-j)) % block < block - 1 for j in range(1, apart) for i in range(apart - j)
    )


@lru_cache(maxsize=64)
def rounds_of_epoch(block: int, apart: int, seed: int, epoch: int, tag: int) -> Rounds:
    """The rounds of an epoch: neighbouring frames are `apart` rounds apart, within it and across epochs.

    If the block is too short for `apart`, they are as far apart as possible.
    """
    steps = _steps(block, apart)
    if block < _ROOM * apart:  # too short to vary: all epochs have the same rounds
        return Rounds(block, int(stream("rounds", seed, tag).integers(block)), steps[0])
    rng, choice = stream("rounds of epoch", seed, epoch, tag), steps[: max(1, len(steps) // 4)]
    adjacent = [rounds_of_epoch(block, apart, seed, e, tag) for e in (epoch - 1, epoch + 1)] if epoch % 2 else []
    for _ in range(_MAX_TRY):
        rounds = Rounds(block, int(rng.integers(block)), choice[int(rng.integers(len(choice)))])
        if not adjacent or (_fit(adjacent[0], rounds, apart) and _fit(rounds, adjacent[1], apart)):
            return rounds
    raise AssertionError(f"no rounds of {block} fit between two epochs")
