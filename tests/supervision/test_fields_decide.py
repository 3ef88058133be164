"""Fields of heartbeats and reports decide which rank is blamed. Any other wording leads to the same verdict."""

import contextlib
import os
import random
import signal
import string
import subprocess
from unittest.mock import patch

import pytest
import torch
from waiting import eventually

from distattn.ir.errors import DamagedDataError, DamagedStateError, LostRankError, shows_lost_peer
from distattn.launch.attempt_end import AttemptEnd
from distattn.launch.ranks.supervised import _may_go_better
from distattn.supervision import heartbeats, rank_watch
from distattn.supervision.heartbeats import HeartbeatBoard, activity, set_activity, set_end, set_left
from distattn.supervision.rank_watch import Patience, RankWatch

RESET = "[pair.cc:534] Connection closed by peer [127.0.0.1]:4711"
# phrases that programs once searched for in messages
LURES = ["from rank 2", "to ranks 0, 1", "ended", "left", "refused with exit code 4: ", "raised NCCL timed out", ""]
COLLECTIVE = 'Thread 0x1 (most recent call first):\n  File "/x/torch/distributed/c10d.py", line 3 in all_gather\n'


def computing(step=5):
    set_activity("forward and backward", step=step)


def summing(step=5):
    computing(step)
    activity("the norm of all gradients", waits=True, key="norm").__enter__()


def waiting_for(peer):
    def wait():
        computing()
        activity(f"keys from rank {peer}", waits=True, peers=(peer,)).__enter__()

    return wait


def evaluating():
    computing()
    activity("the loss of the evaluation", waits=True, key="evaluation").__enter__()


def ending(code, error=None, step=5):
    def end():
        computing(step)
        set_end(code, error)

    return end


def leaving():
    computing()
    set_end(0)
    set_left()


# for each loss: what each rank does, the signals that end or stop processes, by rank, and (kind, ranks to blame, exit
# code, lost_peer)
LOSSES = {
    "killed": ([computing, computing, summing], {1: signal.SIGKILL}, ("killed", [1], 1, False)),
    "killed after its work": ([ending(0), ending(0)], {0: signal.SIGKILL}, ("killed", [0], 1, False)),
    "left": ([leaving, leaving], {0: signal.SIGKILL, 1: signal.SIGKILL}, None),
    "stopped": ([summing, computing, summing], {1: signal.SIGSTOP}, ("hung", [1], 1, False)),
    "raising": ([summing, ending(1, KeyError("no such layer"))], {1: signal.SIGKILL}, ("raised", [1], 1, False)),
    "out of memory": (
        [summing, ending(1, torch.OutOfMemoryError("out of memory; see NCCL")), summing],
        {1: signal.SIGKILL},
        ("raised", [1], 1, False),
    ),
    "refusing": ([ending(3, DamagedDataError("bad")), summing], {0: signal.SIGKILL}, ("refused", [0], 3, False)),
    "refusing its state": (
        [summing, ending(4, DamagedStateError("changed"))],
        {1: signal.SIGKILL},
        ("refused", [1], 4, False),
    ),
    "losing another": (
        [summing, ending(4, LostRankError("rank 2 stopped", [2]))],
        {1: signal.SIGKILL},
        ("refused", [1], 4, True),
    ),
    "losing a connection": ([ending(1, RuntimeError(RESET)), summing], {0: signal.SIGKILL}, ("raised", [0], 1, True)),
    "busy": ([summing, summing, computing], {}, ("hung", [2], 1, False)),
    "busy in a collective": ([computing, summing, computing], {}, ("hung", [2], 1, False)),
    "waiting for a message": ([summing, summing, waiting_for(0)], {}, ("hung", [2], 1, False)),
    "waiting for one that waits": (
        [summing, waiting_for(0), waiting_for(1)],
        {},
        ("hung", [1], 1, False),
    ),
    "waiting for each other": ([waiting_for(1), waiting_for(0)], {}, ("hung", [0, 1], 1, False)),
    "behind": ([summing, summing, lambda: summing(4)], {}, ("hung", [2], 1, False)),
    "elsewhere": ([summing, evaluating, summing], {}, ("hung", [1], 1, False)),
    "all waiting": ([summing, summing], {}, ("hung", [0, 1], 1, False)),
    "silent": ([summing, None], {}, ("hung", [1], 1, False)),
}


SENTENCELESS = ("silent", "killed after its work")


@pytest.mark.parametrize("loss", LOSSES)
def test_other_sentences_lead_to_the_same_verdict(loss, tmp_path):
    works, ends, wanted = LOSSES[loss]
    trouble = verdict(works, ends, tmp_path, lambda text: text, loss)
    if wanted is None:
        assert trouble is None and verdict(works, ends, tmp_path, nonsense(1), loss) is None
        return
    kind, ranks, code, lost_peer = wanted
    assert (trouble.kind, trouble.facts()["ranks"], trouble.exit_code, trouble.lost_peer) == (
        *(kind, ranks, code, lost_peer),
    )
    for seed in range(2):
        other = verdict(works, ends, tmp_path, nonsense(seed), loss)
        unequal = {"noticed_seconds": 0.0}
        assert other.facts() | unequal == trouble.facts() | unequal
        # for the losses in SENTENCELESS no rank reports a message
        assert other.exit_code == code and (str(other) != str(trouble)) == (loss not in SENTENCELESS)
        assert other.repeats(trouble) and _may_go_better(other, code, True) == _may_go_better(trouble, code, True)
        # the same holds for the reports of nodes
        killed = {"why": "x", "exit_code": 137, "nodes": [1], "kind": "killed", "lost_peer": False}
        for reports in ({}, {1: killed}):
            causes = [
                AttemptEnd(1, {"a": code}).cause(
                    ["a", "b", "c"], {0: each.facts() | {"why": str(each), "exit_code": code, "nodes": [0]}, **reports}
                )[1]
                for each in (trouble, other)
            ]
            assert causes[0] == causes[1] == (["b"] if reports and kind != "killed" else causes[0])


def nonsense(seed):
    draws = random.Random(seed)
    return lambda text: "".join(draws.choices(string.printable, k=12)) + draws.choice(LURES)


def verdict(works, ends, folder, sentence, loss):
    """Return the trouble that the watch finds, with a process in place of each rank. sentence: transforms the messages
    that ranks report.
    """
    board = HeartbeatBoard.make(len(works))
    processes = [subprocess.Popen(["sleep", "600"]) for _ in works]
    patience = 0.05 if not ends or loss == "stopped" else 600.0
    stacks = {0: COLLECTIVE} if loss == "busy in a collective" else {}
    with contextlib.ExitStack() as stack:
        stack.callback(board.close)
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        for slot, (work, process) in enumerate(zip(works, processes, strict=True)):
            if work is not None:
                tell(board, slot, process.pid, work, sentence)
        for rank, number in ends.items():
            processes[rank].send_signal(number)
            eventually(lambda pid=processes[rank].pid: rank_watch.process_state(pid) in "TZ", "the signal is lost")
        stack.enter_context(patch.object(rank_watch, "_TORCHRUN_SECONDS", 0.05))
        stack.enter_context(patch.object(rank_watch, "save_evidence", lambda *_: stacks))
        # signal 0 only checks whether a process exists
        stack.enter_context(patch.object(rank_watch, "INTERRUPT", 0))
        watch = RankWatch(board, range(len(works)), Patience(patience, patience), folder)
        if loss != "left":
            eventually(lambda: watch.trouble is not None, "nothing is noticed")
        return watch.close()


def tell(board, slot, pid, work, sentence):
    current = heartbeats._CurrentActivity()
    with patch.object(os, "getpid", lambda: pid):
        write = board.writer(slot, 1)
    current.write = lambda text, *fields: write(sentence(text), *fields)
    with patch.object(heartbeats, "_CURRENT", current):
        work()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (LostRankError("any words"), True),
        (DamagedStateError("NCCL timed out: Connection"), False),
        (ConnectionResetError(104, "any words"), True),
        (TimeoutError(110, "Connection timed out", "/data/tokens.bin"), False),
        (torch.distributed.DistNetworkError("any words"), True),
        (RuntimeError(RESET), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("NCCL"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_type_of_an_error_says_whether_another_rank_was_lost(error, lost):
    assert shows_lost_peer(error) == lost


def test_heartbeats_of_another_release_are_read(tmp_path):
    beat = heartbeats.Heartbeat(1, 1, 2.0, 5, 7, 0.0, False, "forward", peers=(1, 2))
    fields = {"temperature": 3, **beat._asdict(), "peers": [1, 2]}
    assert heartbeats.Heartbeat.from_fields(fields) == beat
    for name in ("state", "peers", "key", "exit_code", "lost_peer"):
        del fields[name]
    assert heartbeats.Heartbeat.from_fields(fields) == beat._replace(peers=())
