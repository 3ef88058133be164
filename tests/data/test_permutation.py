"""The arithmetic permutation is a bijection, looks random, and never changes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.data.packing.permutation import derived_key, permuted
from distattn.ir.errors import DistattnError

SIZES = [1, 2, 3, 5, 7, 8, 13, 255, 256, 257, 997, 4095, 4096, 4097, 65535, 65536, 65537, 99991, (1 << 18) + 1]


@pytest.mark.parametrize("size", SIZES)
def test_every_number_is_at_one_position(size):
    for key in (0, 1, (1 << 64) - 1):
        order = permuted(np.arange(size), size, key)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(size))


@given(st.integers(1, 3000), st.integers(0, (1 << 64) - 1))
def test_every_number_is_at_one_position_whatever_the_key(size, key):
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


@given(st.integers(1, 1 << 40), st.integers(0, (1 << 64) - 1), st.data())
def test_a_position_has_the_same_number_whatever_else_is_requested(size, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permuted(positions, size, key)
    assert ((together >= 0) & (together < size)).all()
    assert together.tolist() == [int(permuted(np.array([position]), size, key)[0]) for position in positions]
    assert len(set(together.tolist())) == len(set(positions.tolist()))


def test_the_order_never_changes():
    golden = {
        (10, 0): GOLDEN_10,
        (1000, 1): GOLDEN_1000,
        (400_000_000, 12345): GOLDEN_400_M,
        ((1 << 40) + 7, (1 << 64) - 1): GOLDEN_2_40,
    }
    for (size, key), numbers in golden.items():
        assert permuted(np.arange(len(numbers)), size, key).tolist() == numbers
    assert [derived_key(0), derived_key(7, 1), derived_key(7, 1, 2), derived_key(7, 2, 1)] == GOLDEN_KEYS


def test_all_orders_of_few_numbers_are_about_equally_frequent():
    for size in (2, 3, 4):
        orders = [tuple(permuted(np.arange(size), size, derived_key(3, key)).tolist()) for key in range(600)]
        kinds = list(itertools.permutations(range(size)))
        counts = np.array([orders.count(kind) for kind in kinds])
        mean = len(orders) / len(kinds)
        # chi-square: the mean is the degrees of freedom, the standard deviation sqrt(2 x degrees of freedom); allow six
        # deviations
        freedom = len(kinds) - 1
        assert ((counts - mean) ** 2 / mean).sum() < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", [1000, 4096, 100_003])
def test_positions_and_numbers_are_independent(size):
    for key in range(4):
        order = permuted(np.arange(size), size, key)
        # correlations of n independent pairs have a standard deviation of 1 / sqrt(n); allow six deviations
        limit = 6 / size**0.5
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < limit
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < limit
        assert abs(np.corrcoef(order, permuted(np.arange(size), size, key + 1))[0, 1]) < limit
        # the number of neighbours that stay neighbours is roughly Poisson with mean 2
        assert (np.abs(np.diff(order)) == 1).sum() < 20
        # counts in a 10 x 10 grid of old and new positions
        cells = np.bincount(np.arange(size) * 10 // size * 10 + order * 10 // size, minlength=100)
        assert ((cells - size / 100) ** 2 / (size / 100)).sum() < 81 + 6 * (2 * 81) ** 0.5


def test_a_position_outside_is_refused():
    for position in (-1, 5):
        with pytest.raises(DistattnError, match=r"outside \[0, 5\)"):
            permuted(np.array([position]), 5, 0)
    assert permuted(np.array([], np.int64), 0, 0).tolist() == []


GOLDEN_10 = [2, 9, 5, 7, 4, 8, 3, 1, 6, 0]
GOLDEN_1000 = [225, 931, 118, 707, 642, 363, 103, 925, 586, 850, 933, 816]
GOLDEN_400_M = [215979488, 291135013, 94334370, 295444216, 243643269, 22249121, 107250333, 347054775]
GOLDEN_2_40 = [569962811272, 927559994199, 343915296919, 693740377720, 217681889172, 1036557990697]
GOLDEN_KEYS = [16294208416658607535, 4414019431610648415, 1650069959653123811, 7657004998645395394]
