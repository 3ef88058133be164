"""Which of the ranks without progress is named as the culprit."""

import random
import string

import pytest

from distattn.supervision.culprits import culprits
from distattn.supervision.evidence import is_in_collective
from distattn.supervision.heartbeats import Heartbeat

FORWARD, SUM, KEYS = "forward and backward", "the norm of all gradients", "keys from rank {} in step 2 of layer 1"


def beat(activity, at=1.0, step=5, peers=()):
    waits = activity != FORWARD
    return Heartbeat(1, 1, at, 7, step, 0.0, waits, activity, peers=peers, key=len(activity) * (waits and not peers))


def waiting_for(peer, at=1.0):
    return beat(KEYS.format(peer), at, peers=(peer,))


CASES = [
    (
        [beat(FORWARD), beat(SUM)],
        "TS",
        [],
        ["rank 0 is stopped (SIGSTOP or a debugger): step 6, forward and backward"],
    ),
    ([None, beat(SUM)], "SS", [], ["rank 0 has sent no heartbeat since its start"]),
    (
        [beat(SUM), beat(SUM)],
        "SD",
        [],
        ["rank 1 waits for its disk or a device: step 6, the norm of all gradients"],
    ),
    # a rank that is slow to reach a collective delays the others
    (
        [beat(FORWARD, 3.0), beat(FORWARD, 2.0)],
        "SS",
        [],
        ["rank 1 waits for no other rank and makes no progress: step 6"],
    ),
    # rank 0 does not reach an FSDP2 all-gather
    (
        [beat(FORWARD, 3.0), beat(FORWARD, 2.0)],
        "SS",
        [1],
        ["rank 0 waits for no other rank and makes no progress: step 6"],
    ),
    (
        [waiting_for(1, 3.0), beat(FORWARD, 2.0)],
        "SS",
        [1],
        [
            "rank 0 waits for a message that does not arrive: step 6, "
            "keys from rank 1 in step 2 of layer 1; the others: a collective"
        ],
    ),
    # rank 2 waits for a rank that is itself waiting
    (
        [beat(SUM), waiting_for(0), waiting_for(1)],
        "SSS",
        [],
        [
            "rank 1 waits for a message that does not arrive: step 6, "
            "keys from rank 0 in step 2 of layer 1; the others: the norm"
        ],
    ),
    # a message is lost, and soon all ranks wait
    (
        [waiting_for(1, 3.0), waiting_for(2, 2.0), waiting_for(0, 2.5)],
        "SSS",
        [],
        [
            f"rank {rank} waits for a message that does not arrive: step 6, keys from rank {peer} "
            for rank, peer in ((0, 1), (1, 2), (2, 0))
        ],
    ),
    ([beat(SUM), beat(SUM, step=4), beat(SUM)], "SSS", [], ["rank 1 is behind the others: step 5, the norm"]),
    (
        [beat(SUM), beat("evaluation"), beat(SUM)],
        "SSS",
        [],
        ["rank 1 waits for something that no other rank waits for: step 6, evaluation; the others: the norm"],
    ),
    ([beat(SUM)] * 2, "SS", [], [f"rank {rank} waits like all other ranks: step 6, the norm" for rank in range(2)]),
]


@pytest.mark.parametrize(("beats", "states", "collective", "wanted"), CASES)
def test_a_rank_that_is_not_merely_waiting_is_named(beats, states, collective, wanted):
    named = culprits(dict(enumerate(beats)), dict(enumerate(states)), collective)
    assert len(named) == len(wanted) and all(map(str.startswith, map(str, named), wanted)), named


@pytest.mark.parametrize(("beats", "states", "collective", "wanted"), CASES)
def test_no_sentence_of_a_rank_changes_who_is_named(beats, states, collective, wanted):
    draws = random.Random(len(wanted))
    for _ in range(10):
        # nonsense with phrases that programs once searched for
        lures = ["from rank 1", "to ranks 0, 1", "ended", "left", "refused with exit code 3: ", "raised NCCL"]
        sentences = ["".join(draws.choices(string.printable, k=20)) + draws.choice(lures) for _ in beats]
        if draws.random() < 0.5:
            sentences = sentences[:1] * len(beats)
        others = [
            before and before._replace(activity=sentence) for before, sentence in zip(beats, sentences, strict=True)
        ]
        named = culprits(dict(enumerate(others)), dict(enumerate(states)), collective)
        before = culprits(dict(enumerate(beats)), dict(enumerate(states)), collective)
        assert [(blamed.rank, blamed.how) for blamed in named] == [(blamed.rank, blamed.how) for blamed in before]


def test_a_collective_is_seen_in_the_main_threads_stack():
    other = 'Thread 0x1 (most recent call first):\n  File "/distattn/data/reading_thread.py", line 71 in _run\n\n'
    frame = '  File "/site-packages/torch/distributed/{}.py", line 30 in call\n'
    main = "Current thread 0x2 (most recent call first):\n"
    assert is_in_collective(other + main + frame.format("distributed_c10d"))
    # torchrun's frames are below a rank's frames
    ours = '  File "/distattn/training/loop.py", line 148 in run\n'
    assert not is_in_collective(other + main + ours + frame.format("elastic/multiprocessing/api"))
    assert not is_in_collective(
        main.replace("Current t", "T") + frame.format("x") + "\n" + other
    ) and not is_in_collective("")
