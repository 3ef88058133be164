"""Unique rows of integers are numbered as NumPy numbers them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distattn.ir.intervals import numbers_of_rows

# a few small values, so that rows repeat, and the largest possible values
VALUES = st.one_of(st.integers(-2, 2), st.sampled_from([-(2**62), 2**62, 2**40, -(2**63), 2**63 - 1]))


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width), max_size=30)))
def test_rows_have_the_numbers_that_numpy_gives_them(rows):
    columns = np.array(rows, np.int64).reshape(len(rows), -1 if rows else 1)
    _, wanted = np.unique(columns, axis=0, return_inverse=True)
    assert (numbers_of_rows(*columns.T) == wanted.reshape(-1)).all()
