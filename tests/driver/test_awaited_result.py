"""A thread that waits for another thread reports a wait for other ranks only while that other thread waits for them."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from packs_of_ranks import loader, model_of, shared
from processes import run_on_ranks
from waiting import eventually

from distattn.adapters.pytorch import local_loss
from distattn.batch.awaited_result import AwaitedResult
from distattn.supervision import heartbeats
from distattn.supervision.heartbeats import HeartbeatBoard, set_activity, thread_activity


@pytest.fixture
def told(monkeypatch):
    """Yield a function that reads this process's heartbeat."""
    monkeypatch.setattr(heartbeats, "_CURRENT", heartbeats._CurrentActivity())
    board = HeartbeatBoard.make(1)
    heartbeats.attach(board.path, 0, 1)
    yield lambda: board.read(0)
    board.close()


def test_a_rank_waits_for_others_only_while_they_are_asked(told):
    set_activity("evaluation", step=3, seconds=300.0)
    results, idents = [], []
    steps = [threading.Event() for _ in range(4)]

    def thread():
        idents.append(threading.get_ident())
        # an exchange of the previous step; no other thread is waiting for its result yet
        with thread_activity("the comparison of plans", waits=True):
            steps[0].wait()
        steps[1].wait()
        with thread_activity("reading shard 12"), thread_activity("the exchange of a step", waits=True):
            steps[2].wait()
        steps[3].wait()
        results[0].set_result(7)

    with ThreadPoolExecutor() as pool:
        try:
            pool.submit(thread)
            eventually(lambda: idents and heartbeats._CURRENT.other_threads, "the thread does not come")
            # no other thread waits for the exchange, so this rank counts as doing its own work
            assert not told().waits and told().activity == "evaluation" and told().seconds == 300
            results.append(AwaitedResult(idents[0]))
            waiting = pool.submit(results[0].result)
            eventually(lambda: told().waits, lambda: str(told()))
            assert (told().activity, told().seconds, told().step) == ("the comparison of plans", 0.0, 3)
            steps[0].set()
            # the thread now computes, which counts as this rank's own time
            eventually(lambda: not told().waits, lambda: str(told()))
            assert told().activity == "evaluation" and told().seconds == 300
            steps[1].set()
            eventually(lambda: told().waits, lambda: str(told()))
            assert told().activity == "the exchange of a step"
            steps[2].set()
            eventually(lambda: not told().waits, lambda: str(told()))
            assert told().activity == "evaluation" and heartbeats._CURRENT.awaited == idents[0]
            steps[3].set()
            assert waiting.result() == 7 and heartbeats._CURRENT.awaited is None
        finally:
            for step in steps:
                step.set()


def test_a_result_that_is_ready_is_not_waited_for(told):
    set_activity("forward and backward", step=1)
    result = AwaitedResult(1)
    result.set_result(7)
    beats = told().beats
    assert result.result() == 7 and told().beats == beats


def test_errors_of_the_thread_reach_the_waiting_thread(told):
    result = AwaitedResult(1)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(result.result)
        result.set_exception(ConnectionError("no"))
        with pytest.raises(ConnectionError, match="no"):
            waiting.result()
    assert heartbeats._CURRENT.awaited is None


# rank 1 is late before its first layer and in its loader; in these activities rank 0 waits for rank 1
LATE = ("the trial of kernels", "the exchange of a step")


def trained_beside_a_late_rank(rank, folder):
    """Train. Return this rank's heartbeats as (activity, whether the rank waits for others)."""
    told = []

    def write(activity, step, seconds, waits, *fields):
        told.append((activity, waits))
        if rank == 0 and waits and activity in LATE:
            (folder / activity).touch()

    def late(activity):
        if rank == 1:
            eventually((folder / activity).exists, f"rank 0 does not say that it waits for {activity}")

    def steps():
        for number, step in enumerate([*loader(0), *loader(0)]):
            if number == 3:
                late(LATE[1])
            yield step

    heartbeats._CURRENT.write = write
    model = model_of()
    model.model.layers[0].register_forward_pre_hook(lambda *_: late(LATE[0]))
    with shared(strategy="ring", data="replicated") as cp:
        for micro_batches in cp.steps(steps()):
            set_activity("forward and backward")
            for batch in micro_batches:
                local_loss(model, batch).backward()
    return told


@pytest.mark.waits
def test_ranks_say_what_they_wait_for_and_of_which_layer(tmp_path):
    of_ranks = run_on_ranks(2, trained_beside_a_late_rank, tmp_path)
    for rank, told in enumerate(of_ranks):
        messages = [activity for activity, waits in told if waits and "from rank" in activity]
        form = rf"\w+(, \w+)* from rank {1 - rank} in step \d+ of \d+ of the (forward|backward) pass of layer [01]"
        assert messages and all(re.fullmatch(form, activity) for activity in messages), told
        passes = {activity.rpartition("the ")[2] for activity in messages}
        assert passes == {f"{direction} pass of layer {n}" for direction in ("forward", "backward") for n in (0, 1)}
        # backward passes run in reverse order of the layers
        order = [activity[-1] for activity in messages if "backward" in activity]
        assert order[0] == "1" and "0" in order
