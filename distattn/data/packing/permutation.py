"""A seeded permutation of n numbers, computed without storing it and independent of any library.

A Feistel network permutes the numbers of b bits. Numbers that land outside [0, n) are permuted again until they land inside
(cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Only additions, multiplications, shifts and
exclusive ors of 64-bit integers are used. Golden values in tests/data/test_permutation.py fix the order forever.
"""

from __future__ import annotations

import numpy as np

from distattn.ir.errors import DistattnError

_MASK = (1 << 64) - 1
# the odd constants of SplitMix64, a well-known 64-bit mixer (Steele, Lea, Flood 2014)
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = 6
# with fewer bits, half of a number has too few values to mix well
_FEWEST_BITS = 6
# how many numbers to permute at a time, so that the temporaries stay in cache
_BLOCK = 1 << 15


def permuted(position: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the numbers at the given positions of a pseudorandom permutation of 0 .. size - 1.

    position: integers in [0, size), any shape. Returns int64 of the same shape. For each (size, key) this is a bijection of
    [0, size). Memory and time depend on the number of positions, not on the size. Raises DistattnError if a position is out of
    range.
    """
    flat = np.ascontiguousarray(position, np.int64).ravel()
    if flat.size and (flat.min() < 0 or flat.max() >= size):
        raise DistattnError(f"a position is outside [0, {size:,}); there are only {size:,} numbers to permute.")
    # (0).bit_length() is 0, so the minimum also covers a size of 1
    bits = max(_FEWEST_BITS, (size - 1).bit_length())
    round_keys = [derived_key(key, number) for number in range(_ROUNDS)]
    out = np.empty(len(flat), np.uint64)
    for begin in range(0, len(flat), _BLOCK):
        numbers = _feistel(flat[begin : begin + _BLOCK].view(np.uint64), bits, round_keys)
        outside = np.flatnonzero(numbers >= size)
        while len(outside):
            again = _feistel(numbers[outside], bits, round_keys)
            numbers[outside] = again
            outside = outside[again >= size]
        out[begin : begin + _BLOCK] = numbers
    return out.view(np.int64).reshape(np.shape(position))


def derived_key(seed: int, *numbers: int) -> int:
    """Return a 64-bit key derived from the seed and `numbers`, such as (corpus, epoch). All arguments must be Python integers."""
    state = _mixed(seed & _MASK)
    for number in numbers:
        state = _mixed(state ^ number & _MASK)
    return state


def _mixed(x: int) -> int:
    """Return the output of SplitMix64's mixing function, which is a bijection of 64-bit integers."""
    x = (x + _GOLDEN) & _MASK
    x = (x ^ x >> 30) * _MIX_1 & _MASK
    x = (x ^ x >> 27) * _MIX_2 & _MASK
    return x ^ x >> 31


def _feistel(numbers: np.ndarray, bits: int, round_keys: list[int]) -> np.ndarray:
    """Permute uint64 numbers of `bits` bits, (N,). The halves are updated in turn, so they may differ in size."""
    low_bits = (bits + 1) // 2
    high_bits = bits - low_bits
    low = numbers & np.uint64((1 << low_bits) - 1)
    high = numbers >> np.uint64(low_bits)
    mixed = np.empty_like(low)
    shifted = np.empty_like(low)
    for number, key in enumerate(round_keys):
        source, target, target_bits = (low, high, high_bits) if number % 2 == 0 else (high, low, low_bits)
        np.add(source, np.uint64(key), out=mixed)
        np.multiply(mixed, np.uint64(_MIX_1), out=mixed)
        np.right_shift(mixed, np.uint64(32), out=shifted)
        np.bitwise_xor(mixed, shifted, out=mixed)
        np.multiply(mixed, np.uint64(_MIX_2), out=mixed)
        # take the highest bits of the product, which depend on all bits of its factors
        np.right_shift(mixed, np.uint64(64 - target_bits), out=mixed)
        np.bitwise_xor(target, mixed, out=target)
    return high << np.uint64(low_bits) | low
