"""Where the tensors of a pass lie: nothing on top of something that is still needed, and no more memory than was said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.parallel.runtime.memory import Request, find_places, rounded

requests = st.builds(
    lambda size, begin, length: Request(size, begin, begin + length),
    st.integers(0, 50),
    st.integers(0, 12),
    st.integers(0, 4),
)


@given(st.lists(requests, max_size=40))
def test_places_of_one_moment_do_not_overlap(wanted):
    offsets, size = find_places(wanted)
    assert all(offset + request.bytes <= size for offset, request in zip(offsets, wanted, strict=True))
    at_once = 0
    for moment in range(20):
        there = sorted(
            (offset, offset + request.bytes)
            for offset, request in zip(offsets, wanted, strict=True)
            if request.bytes and request.begin <= moment <= request.end
        )
        assert all(end <= begin for (_, end), (begin, _) in zip(there, there[1:], strict=False))
        at_once = max(at_once, sum(end - begin for begin, end in there))
    assert at_once <= size <= sum(request.bytes for request in wanted)


@given(st.integers(0, 1 << 42))
def test_arenas_have_few_sizes_and_waste_little(size):
    assert size <= rounded(size) <= max(size * 33 / 32, size + 512)
    assert rounded(rounded(size)) == rounded(size)


@pytest.mark.parametrize("low", [1 << 20, 3 << 28])
def test_batches_of_nearly_one_size_have_arenas_of_one_size(low):
    assert len({rounded(size) for size in range(low, 2 * low, low // 999)}) <= 34
