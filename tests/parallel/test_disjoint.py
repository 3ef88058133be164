"""Overlap of rectangles: both methods agree with a check of all pairs, and are near-linear on random cuts."""

import time

import numpy as np
import pytest

from distattn.parallel.analysis import disjoint


def random_cuts(rng, count: int, size: int) -> np.ndarray:
    """Cut a square in two at random, again and again. Return the (count, 4) rectangles that tile it."""
    boxes = [(0, size, 0, size)]
    while len(boxes) < count:
        # take the largest of a few rectangles, so that none gets too small to cut
        i = max(rng.integers(0, len(boxes), 4), key=lambda i: (boxes[i][1] - boxes[i][0]) * (boxes[i][3] - boxes[i][2]))
        box = boxes.pop(i)
        axis = 0 if box[1] - box[0] > box[3] - box[2] else 2
        cut = int(rng.integers(box[axis] + 1, box[axis + 1]))
        left, right = list(box), list(box)
        left[axis + 1], right[axis] = cut, cut
        boxes += [tuple(left), tuple(right)]
    return np.array(boxes)


def overlap(a, b) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


@pytest.mark.parametrize("method", ["_clash_in_slabs", "_clash_in_levels"])
def test_any_overlap_is_found_and_none_invented(method):
    check = getattr(disjoint, method)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        boxes = random_cuts(rng, int(rng.integers(1, 20)), 60)
        group = rng.integers(0, 2, len(boxes))
        changed = boxes.copy()
        if seed % 2:
            # extend a few sides, often into a neighbour, sometimes of another group
            for row in rng.integers(0, len(boxes), 2):
                side = int(rng.integers(0, 4))
                changed[row, side] += (1 if side % 2 else -1) * int(rng.integers(0, 3))
            changed = np.clip(changed, 0, 70)
        pairs = [
            (i, j)
            for i in range(len(boxes))
            for j in range(i)
            if group[i] == group[j] and overlap(changed[i], changed[j])
        ]
        pair = check(group, *changed.T)
        assert (pair is not None) == bool(pairs), seed
        if pair is not None:
            assert tuple(sorted(pair, reverse=True)) in pairs, seed


def test_random_cuts_take_near_linear_time():
    def seconds(count: int) -> float:
        boxes = random_cuts(np.random.default_rng(0), count, 1 << 29)
        group = np.zeros(count, np.int64)
        best = float("inf")
        for _ in range(3):
            began = time.thread_time()
            assert disjoint._clash_in_levels(group, *boxes.T) is None
            best = min(best, time.thread_time() - began)
        return best

    # the slab method would take 16 ** 1.5 = 64 times as long
    assert seconds(80_000) < 40 * seconds(5_000)


def test_many_slabs_are_left_to_the_levels(monkeypatch):
    boxes = random_cuts(np.random.default_rng(0), 4000, 1 << 29)
    monkeypatch.setattr(disjoint, "_clash_in_slabs", None)
    assert disjoint.first_overlap(np.zeros(4000, np.int64), tuple(boxes.T)) is None
