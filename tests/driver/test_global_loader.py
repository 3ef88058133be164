"""Loaders that know all ranks' steps: ranks exchange no step facts, and the training is the same."""

import pytest
from packs_of_ranks import PACKS, documents, model_of, shared, trained, whole_run
from processes import run_on_ranks
from test_per_rank import assert_same

from distattn.batch.collectives import HostGroup
from distattn.batch.packed_batch import BatchFacts, PackedBatch
from distattn.driver.global_loader import GlobalStepInfos, share_numbers
from distattn.driver.rank_table import RankTable
from distattn.ir.errors import DistattnError

pytestmark = pytest.mark.sampled(3)


class SharedPacks:
    """A loader that knows the packs of all shares, like the loader of a plan."""

    def __init__(self, rank, size, data_digest="plan"):
        self.rank, self.size, self.data_digest, self.step = rank, size, data_digest, 0
        self.labels_are_known = True
        self.end = max(len(PACKS[share]) for share in range(size))

    def __iter__(self):
        while self.step < self.end:
            self.step += 1
            yield self._batches(self.rank, self.step - 1)

    def facts(self, step):
        packed = [self._batches(share, step) for share in range(self.size)]
        return [[BatchFacts(batch.lengths, batch.digest, batch.valid_labels) for batch in share] for share in packed]

    def _batches(self, share, step):
        count = len(PACKS[share][step]) if step < len(PACKS[share]) else 0
        return [PackedBatch.of(documents(share, step, number)) for number in range(count)]


def trained_run(rank, shares, options, digests=None):
    """Train on shared packs. Return (losses and gradients of each step, number of exchanges of step facts)."""
    asked, gather = [], HostGroup.all_gather

    def counted(group, value, label):
        asked.append(label)
        return gather(group, value, label)

    HostGroup.all_gather = counted
    model = model_of()
    with shared(**options) as cp:
        loader = SharedPacks(cp.data_parallel_rank, shares, digests[rank] if digests else "plan")
        out = [trained(model, step) for step in cp.steps(loader)]
    return out, asked.count("the exchange of a step")


def test_ranks_ask_once_and_train_as_one_process():
    for result, asked in run_on_ranks(4, trained_run, 4, dict(options=dict(block=8))):
        assert_same(result, whole_run(4), 1e-11)
        assert asked == 1


def test_ranks_that_split_a_batch_read_the_same_share():
    options = dict(strategy="ring", layout="zigzag", context_parallel_size=2)
    for result, asked in run_on_ranks(4, trained_run, 2, options):
        # the ranks have different tokens, so each step's losses are summed over them
        assert_same(result, whole_run(2), 1e-11)
        assert asked == 1


def test_ranks_with_other_plans_are_refused():
    refusal = "rank 1 reads the plan another from step 0 to 3, rank 0 one plan from step 0 to 3: begin all ranks"
    with pytest.raises(AssertionError, match=refusal):
        run_on_ranks(2, trained_run, 2, dict(options=dict(block=8)), ["one plan", "another"])


def left_run(rank):
    """Leave a loop by `break` at its second step, then loop over the rest. Return (results, next step after each)."""
    model = model_of()
    with shared(options=dict(block=8)) as cp:
        loader, seen = SharedPacks(rank, 2), []
        for step in cp.steps(loader):
            seen.append(trained(model, step))
            if len(seen) == 2:
                break
        middle = loader.step
        seen += [trained(model, step) for step in cp.steps(loader)]
        return seen, middle, loader.step


def test_a_loop_that_is_left_loses_no_step():
    for seen, middle, end in run_on_ranks(2, left_run):
        assert_same(seen, whole_run(2), 1e-11)
        assert (middle, end) == (2, 3)


def held_run(rank):
    """Keep a loop's generator alive while a second loop trains the remaining steps. Return the results of all steps,
    and the error raised when the first loop continues.
    """
    model = model_of()
    with shared(options=dict(block=8)) as cp:
        loader = SharedPacks(rank, 2)
        held = cp.steps(loader)
        seen = [trained(model, next(held))]
        seen += [trained(model, step) for step in cp.steps(loader)]
        with pytest.raises(DistattnError) as refusal:
            next(held)
        return seen, str(refusal.value)


def test_a_loop_whose_generator_is_held_loses_no_step():
    for seen, refusal in run_on_ranks(2, held_run):
        assert_same(seen, whole_run(2), 1e-11)
        assert "something else went on with it, such as a loop inside this one" in refusal


def nested_run(rank):
    with shared(options=dict(block=8)) as cp:
        loader = SharedPacks(rank, 2)
        for _ in cp.steps(loader):
            for _ in cp.steps(loader):
                pass


def test_one_loader_in_two_loops_at_once_is_refused():
    with pytest.raises(AssertionError, match="something else went on with it, such as a loop inside this one"):
        run_on_ranks(2, nested_run)


def test_measured_speeds_are_told_each_time():
    for _, asked in run_on_ranks(2, trained_run, 2, dict(options=dict(block=8), adaptive=True)):
        assert asked > 1


def test_a_loader_of_another_share_is_refused():
    assert share_numbers([0, 0, 2, 2, 4], [True, True, True, True, False]) == [0, 0, 1, 1, -1]
    table = RankTable(None, "", [0, 1], 1, [0, 1], [0, 1], [True, True])
    with pytest.raises(
        DistattnError, match="share 0 of 2, but this rank has share 1 of 2; make it with rank=1, size=2"
    ):
        GlobalStepInfos(SharedPacks(0, 2), table, ask=False)
