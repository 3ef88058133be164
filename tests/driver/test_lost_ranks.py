"""If a rank is lost in any way, the other ranks raise an error that names it within the time-out."""

import os
import signal
import time
from functools import partial

import pytest
import torch
from packs_of_ranks import loader, model_of, shared
from processes import run_survivors

import distattn as da
from distattn.adapters.pytorch import local_loss

pytestmark = [pytest.mark.sampled(16), pytest.mark.waits(7)]

# the driver's time-out: long enough for a rank that is only slow because the machine is loaded, short enough for a test
TIMEOUT = 16.0
WHERE = ("the loader", "the loop", "a forward pass", "a backward pass")


def lose(how):
    """Kill or stop this rank, raise in it, or let it sleep, as `how` says."""
    if how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises":
        raise KeyError("a mistake of the script")
    # the rank stays alive but never arrives
    time.sleep(600)


def packs(rank, where, how):
    for number, step in enumerate([*loader(0), *loader(0)]):
        if where == "the loader" and number == 3:
            lose(how)
        yield step


def trained(rank, lost, where, how, settings, takes_turns=False):
    """Return the error that ends this rank's training, and the ranks that the error names."""
    if rank >= 3 - settings.get("servers", 0):
        if rank == lost:
            # fail in the first forward pass that this rank serves
            torch.ops.distattn.forward = lambda *args: lose(how)
        with pytest.raises(da.LostRankError) as error:
            da.serve()
        return str(error.value), error.value.peers
    where = where if rank == lost else ""
    model = model_of()
    if where in WHERE[2:]:
        layer = model.model.layers[1]
        layer.register_forward_hook(lambda module, args, out: pass_through(out, where, how))
    with pytest.raises(da.LostRankError) as error, shared(timeout=TIMEOUT, **settings) as cp:
        for number, micro_batches in enumerate(cp.steps(packs(rank, where, how))):
            # if micro-batches take turns, fail in step 3 instead of step 2, since step 3 has two micro-batches
            STEP[0] = number - takes_turns
            if where == "the loop" and number == 2:
                lose(how)
            losses = [partial(local_loss, model, batch) for batch in micro_batches]
            if takes_turns:
                da.OverlapSchedule(model.model.layers).step(losses)
                continue
            for loss in losses:
                loss().backward()
    return str(error.value), error.value.peers


STEP = [0]


def pass_through(out, where, how):
    hidden = out[0] if isinstance(out, tuple) else out
    if STEP[0] == 2 and where == "a forward pass":
        lose(how)
    if STEP[0] == 2 and where == "a backward pass":
        hidden.register_hook(lambda gradient: lose(how))
    return out


def assert_named(errors, lost):
    for sentence, peers in errors.values():
        assert peers == (lost,) and f"rank {lost} " in sentence, errors


@pytest.mark.parametrize("how", ["stops", "dies", "raises", "goes elsewhere"])
@pytest.mark.parametrize("where", WHERE)
def test_a_lost_rank_is_named(where, how):
    assert_named(run_survivors(3, 1, trained, 1, where, how, {}), 1)


@pytest.mark.parametrize("how", ["raises", "stops", "dies"])
@pytest.mark.parametrize("where", WHERE[2:])
def test_a_lost_rank_is_named_where_micro_batches_take_turns(where, how):
    assert_named(run_survivors(3, 1, trained, 1, where, how, {}, True), 1)


@pytest.mark.parametrize("how", ["stops", "dies"])
@pytest.mark.parametrize("where", WHERE)
def test_a_lost_rank_is_named_by_ranks_that_serve_too(where, how):
    assert_named(run_survivors(3, 1, trained, 1, where, how, {"servers": 1}), 1)


@pytest.mark.parametrize("how", ["stops", "dies", "raises", "goes elsewhere"])
def test_a_lost_server_is_named(how):
    assert_named(run_survivors(3, 2, trained, 2, "", how, {"servers": 1}), 2)


@pytest.mark.parametrize("how", ["stops", "dies"])
def test_ranks_that_split_one_batch_name_a_lost_one(how):
    settings = {"data": "replicated", "strategy": "ring"}
    assert_named(run_survivors(3, 2, trained, 2, "a forward pass", how, settings), 2)


@pytest.mark.parametrize("how", ["stops", "dies", "raises"])
def test_the_rank_that_holds_the_store_is_named(how):
    errors = run_survivors(3, 0, trained, 0, "a backward pass", how, {}, rank_0_holds_store=True)
    assert all("rank 0" in sentence and peers in ((), (0,)) for sentence, peers in errors.values()), errors


def averaging(rank):
    with pytest.raises(da.LostRankError) as error, shared(timeout=TIMEOUT) as cp:
        if rank == 1:
            lose("stops")
        cp.mean_loss([torch.ones(())])
    return str(error.value), error.value.peers


@pytest.mark.full
def test_a_rank_that_is_missing_from_a_mean_is_named():
    assert_named(run_survivors(3, 1, averaging), 1)


def closing(rank):
    cp = shared(timeout=TIMEOUT)
    if rank == 1:
        cp.close()
        time.sleep(600)
    with pytest.raises(da.LostRankError) as error:
        list(cp.steps(loader(0)))
    return str(error.value), error.value.peers


def test_a_rank_that_closed_its_driver_is_named():
    for sentence, peers in run_survivors(2, 1, closing).values():
        assert "rank 1 closed its ContextParallel" in sentence and peers == (1,)
