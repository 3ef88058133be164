"""Loaders that know all steps of all ranks: nobody is asked what comes, and the training is the same."""

import pytest
from packs_of_ranks import PACKS, documents, model_of, shared, trained, whole_run
from processes import run_on_ranks
from test_per_rank import assert_same

from distattn.batch.collectives import HostGroup
from distattn.batch.packed_batch import BatchFacts, PackedBatch
from distattn.driver.known_steps import KnownInfos, share_numbers
from distattn.ir.errors import DistattnError

pytestmark = pytest.mark.sampled(3)


class KnownLoader:
    """Packs of all shares, as a plan of packs would have them."""

    def __init__(self, rank, size, known_by="plan"):
        self.rank, self.size, self.known_by, self.step = rank, size, known_by, 0
        self.end = max(len(PACKS[share]) for share in range(size))

    def __iter__(self):
        while self.step < self.end:
            self.step += 1
            yield self._batches(self.rank, self.step - 1)

    def facts(self, step):
        packed = [self._batches(share, step) for share in range(self.size)]
        return [[BatchFacts(one.lengths, one.digest, one.valid_labels) for one in share] for share in packed]

    def _batches(self, share, step):
        count = len(PACKS[share][step]) if step < len(PACKS[share]) else 0
        return [PackedBatch.of(documents(share, step, number)) for number in range(count)]


def trained_run(rank, shares, options, digests=None):
    """(losses and gradients, what ranks asked each other of steps)."""
    asked, gather = [], HostGroup.all_gather

    def counted(group, value, what):
        asked.append(what)
        return gather(group, value, what)

    HostGroup.all_gather = counted
    model = model_of()
    with shared(**options) as cp:
        loader = KnownLoader(cp.data_parallel_rank, shares, digests[rank] if digests else "plan")
        out = [trained(model, step) for step in cp.steps(loader)]
    return out, asked.count("the exchange of a step")


def test_ranks_ask_once_and_train_as_one_process():
    for result, asked in run_on_ranks(4, trained_run, 4, dict(options=dict(block=8))):
        assert_same(result, whole_run(4), 1e-11)
        assert asked == 1


def test_ranks_that_split_a_batch_read_the_same_share():
    options = dict(strategy="ring", layout="zigzag", context_parallel_size=2)
    for result, asked in run_on_ranks(4, trained_run, 2, options):
        # a step's losses are summed over ranks, each of which has its own tokens
        assert_same(result, whole_run(2), 1e-11)
        assert asked == 1


def test_ranks_with_other_plans_ask_each_time():
    steps = max(len(PACKS[rank]) for rank in range(2))
    for result, asked in run_on_ranks(2, trained_run, 2, dict(options=dict(block=8)), ["one plan", "another"]):
        assert_same(result, whole_run(2), 1e-11)
        assert asked == steps + 1


def test_measured_speeds_are_told_each_time():
    for _, asked in run_on_ranks(2, trained_run, 2, dict(options=dict(block=8), adaptive=True)):
        assert asked > 1


def test_a_loader_of_another_share_is_refused():
    share_of = share_numbers([0, 0, 2, 2, 4], [True, True, True, True, False])
    assert share_of == [0, 0, 1, 1, -1]
    with pytest.raises(DistattnError, match="share 1 of 2, but this rank has share 0 of 2; make it with"):
        KnownInfos(KnownLoader(1, 2), share_of, 1)
