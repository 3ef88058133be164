"""Packs of a plan match a single process in every kind of loop: with servers, with micro-batches taking turns, with a
nested evaluation.
"""

import pytest
import torch
import torch.distributed as dist
from one_process import loss_by_document
from packs_of_ranks import model_of, shared, trained
from planned_data import small_plan, write_corpus
from processes import run_on_ranks
from test_overlap import made
from test_per_rank import assert_same
from torch.nn.utils import parameters_to_vector

import distattn as da
from distattn.adapters.pytorch import local_loss
from distattn.batch.collectives import HostGroup
from distattn.data.files.corpus import Corpus
from distattn.data.loader import PackLoader
from distattn.data.packing.pack_plan import PackPlan

STEPS, PACKS = 2, 4
OPTIONS = dict(options=dict(block=8, tolerance=0.0))


@pytest.fixture
def folder(tmp_path):
    corpus = write_corpus(tmp_path, "web", [[60, 5, 33, 48, 1, 20, 64, 9, 40, 11, 30, 30, 2] * 3], "uint8")
    small_plan(tmp_path, [corpus], packs=PACKS, steps=STEPS + 1)
    return tmp_path


def loader_of(folder, share, shares, **more):
    corpora = [Corpus.open("web", [str(folder / "web-0")])]
    settings = dict(steps=STEPS, even=True, vocabulary=256) | more
    return PackLoader(PackPlan.open(folder / "plan.packs"), corpora, rank=share, size=shares, **settings)


def whole_run(folder, model, logits_of, begin=0, end=STEPS):
    """Return (loss, gradients) of the plan's steps in a single process, one document at a time."""
    plan, corpus, out = PackPlan.open(folder / "plan.packs"), Corpus.open("web", [str(folder / "web-0")]), []
    for step in range(begin, end):
        rows = [row for pack in plan.step(step).packs for row in pack.rows]
        assert all(row["ends_document"] and not row["start"] for row in rows)
        documents = [corpus.read(int(row["document"]), 0, int(row["length"])).astype("int64") for row in rows]
        batches = [{"input_ids": torch.from_numpy(ids)[None], "document_lengths": [len(ids)]} for ids in documents]
        loss = loss_by_document(logits_of, batches)
        loss.backward()
        out.append((float(loss.detach()), parameters_to_vector([p.grad for p in model.parameters()])))
        model.zero_grad()
    return out


def plain_run(folder, begin=0, end=STEPS):
    model = model_of("sdpa")
    return whole_run(folder, model, lambda ids: model(ids).logits[0].double(), begin, end)


def served_run(rank, folder):
    """Train on two ranks and evaluate the plan's next step inside the loop. The third rank serves."""
    trainers = dist.new_group([0, 1])
    if rank == 2:
        return tuple(da.serve())
    model, out, evaluated = model_of(), [], []
    with shared(servers=1, **OPTIONS) as cp:
        for micro_batches in cp.steps(loader_of(folder, cp.data_parallel_rank, cp.data_parallel_size)):
            assert len(micro_batches) == PACKS // 2
            with torch.no_grad():
                others = loader_of(folder, cp.data_parallel_rank, cp.data_parallel_size, start_step=STEPS, steps=1)
                for batches in cp.steps(others):
                    total = sum(local_loss(model, batch) for batch in batches)
                    dist.all_reduce(total, group=trainers)
                    evaluated.append(float(total))
            out.append(trained(model, micro_batches, trainers))
    return out, evaluated


def test_ranks_without_a_model_serve_a_plan_and_its_evaluation(folder):
    *results, served = run_on_ranks(3, served_run, folder)
    wanted, ((held_out, _),) = plain_run(folder), plain_run(folder, STEPS, STEPS + 1)
    for result, evaluated in results:
        assert_same(result, wanted, 1e-11)
        assert evaluated == pytest.approx([held_out] * STEPS, rel=1e-11)
    # each micro-batch has one backward pass in each of the two layers
    assert served[1] == 2 * STEPS * (PACKS // 2)


def alternating_run(rank, folder):
    """Train with two micro-batches per share taking turns. Return (losses and gradients, number of exchanges of step
    facts).
    """
    layers, loss, parameters = made("huggingface")
    asked, gather, out = [], HostGroup.all_gather, []
    HostGroup.all_gather = lambda group, value, label: (asked.append(label), gather(group, value, label))[1]
    with shared(**OPTIONS) as cp:
        schedule = da.OverlapSchedule(layers)
        for local in cp.steps(loader_of(folder, cp.data_parallel_rank, cp.data_parallel_size)):
            losses = schedule.step([lambda batch=batch: loss(batch) for batch in local])
            total, gradient = sum(losses).detach().double(), parameters_to_vector([p.grad for p in parameters])
            for part in (total, gradient):
                dist.all_reduce(part)
            out.append((float(total), gradient))
            for parameter in parameters:
                parameter.grad = None
    return out, asked.count("the exchange of a step")


def test_micro_batches_of_a_plan_take_turns(folder):
    for result, asked in run_on_ranks(2, alternating_run, folder):
        assert_same(result, plain_run(folder), 1e-11)
        assert asked == 1


def test_unequal_shares_are_refused(folder):
    with pytest.raises(da.DistattnError, match="4 packs of step 0 cannot be dealt out evenly to 3 shares"):
        loader_of(folder, 0, 3)
