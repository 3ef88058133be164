"""The placement of a pass's tensors: live tensors do not overlap, and the memory matches the announced size."""

import itertools
import random
from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense, random_inputs, run_all_ranks
from random_plans import random_plan

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.kernels.registry import KERNELS
from distattn.parallel.make_plan import make_plan
from distattn.parallel.runtime.communication.transport import InProcessNetwork
from distattn.parallel.runtime.execution import execute
from distattn.parallel.runtime.execution.buffers import Buffers
from distattn.parallel.runtime.lowering import lower as lowering
from distattn.parallel.runtime.lowering import memory
from distattn.parallel.runtime.lowering.memory import Request, find_places, rounded_arena_bytes

requests = st.builds(
    lambda size, begin, length: Request(size, begin, begin + length),
    st.integers(0, 50),
    st.integers(0, 12),
    st.integers(0, 4),
)


@given(st.lists(requests, max_size=40))
def test_tensors_that_live_at_the_same_time_do_not_overlap(wanted):
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
    assert size <= rounded_arena_bytes(size) <= max(size * 33 / 32, size + 512)
    assert rounded_arena_bytes(rounded_arena_bytes(size)) == rounded_arena_bytes(size)


@pytest.mark.parametrize("low", [1 << 20, 3 << 28])
def test_batches_of_nearly_one_size_have_arenas_of_one_size(low):
    assert len({rounded_arena_bytes(size) for size in range(low, 2 * low, low // 999)}) <= 34


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("strategy", ["ring", "allgather", "usp", "cad"])
def test_an_arena_is_hardly_larger_than_the_peak_of_live_tensors(strategy, ranks):
    lengths = [5000, 300, 9000, 40, 2000] * ranks
    layout = Layout.contiguous(lengths, ranks) if strategy == "cad" else Layout.zigzag(lengths, ranks)
    shape = dict(heads=16, kv_heads=8, head_dim=128, dtype="bfloat16")
    plan = make_plan(Mask.documents(lengths), layout, strategy=strategy, **shape)
    passes = []

    def recorded(call, steps, bundles):
        passes.append((steps, bundles, memory.assign_places(call, steps, bundles)))
        return passes[-1][-1]

    with mock.patch.object(lowering, "assign_places", recorded):
        lowering.lower(plan, 1, lambda mask: None)
    for steps, bundles, size in passes:
        change = Counter()
        for _, _, fields, rows, heads, begin, end in memory._tensors(plan.call, steps, bundles):
            change[begin] += (bytes := memory.place_fields(fields, rows, heads, 0)[1])
            change[end + 1] -= bytes
        most = max(itertools.accumulate(change[moment] for moment in sorted(change)), default=0)
        assert most <= size <= 1.13 * most


class LateNetwork(InProcessNetwork):
    """A network that delivers at the wait, as NCCL may. Sent tensors are read then, and received tensors are NaN until
    then.
    """

    def __init__(self):
        super().__init__()
        self.pairs = []

    def post(self, sent, wanted):
        for _, _, tensor in wanted:
            tensor.fill_(torch.nan)
        for queue, others, packets in ((self._sent, self._wanted, sent), (self._wanted, self._sent, wanted)):
            for src, dst, tensor in packets:
                if others[src, dst]:
                    other = others[src, dst].popleft()
                    self.pairs.append((tensor, other) if queue is self._sent else (other, tensor))
                else:
                    queue[src, dst].append(tensor)

    def has_pending(self, rank):
        for source, target in self.pairs:
            target.copy_(source)
        self.pairs.clear()
        return super().has_pending(rank)


@pytest.fixture
def places_die(monkeypatch):
    """Fill every tensor with NaN when it is placed and when its lifetime ends."""
    place, release, accumulate, end_step = Buffers.place, Buffers.release, execute._accumulate, execute._end_step

    def nan(tensors):
        for tensor in tensors:
            tensor.fill_(torch.nan)
        return tensors

    def end(buffers, of_step, kinds, number=None):
        for key, places in of_step.places.items():
            if key[0] in kinds and number in (None, key[1]):
                nan(place(buffers, places))

    def accumulated(of_step, number, buffers, *rest):
        accumulate(of_step, number, buffers, *rest)
        end(buffers, of_step, ("operand", "result"), number)

    def ended(of_step, buffers, *rest):
        end_step(of_step, buffers, *rest)
        end(buffers, of_step, ("send", "receive"))

    monkeypatch.setattr(Buffers, "place", lambda self, places: nan(place(self, places)))
    monkeypatch.setattr(Buffers, "release", lambda self, key: (nan(self.fields[key]), release(self, key)))
    monkeypatch.setattr(execute, "_accumulate", accumulated)
    monkeypatch.setattr(execute, "_end_step", ended)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kernel", ["reference", "in_place"])
def test_nothing_is_used_before_it_is_written_or_after_its_life(kernel, places_die):
    with mock.patch.dict(KERNELS, {"in_place": "in_place_kernel"}):
        for seed in range(60):
            plan = random_plan(random.Random(seed))
            inputs = random_inputs(plan.call.mask.n, plan.call.heads, plan.call.kv_heads, 4, seed=seed)
            got = run_all_ranks(plan, inputs, kernel, network=lambda: LateNetwork().transport)
            wanted = dense(plan.call.mask, inputs)
            # use an absolute tolerance, since a row with one key has gradients of exactly zero
            for name, a, b in zip(got._fields, got, wanted, strict=True):
                finite = ~torch.isinf(b)
                assert torch.equal(torch.isinf(a), ~finite) and ((a - b)[finite].abs() < 1e-9).all(), (seed, name)
