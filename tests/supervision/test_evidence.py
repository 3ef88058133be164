"""The stacks of a hanging rank are saved completely, however often a busy machine interrupts the rank while it writes
them.
"""

import signal
import subprocess
import sys
import time

import pytest

from distattn.supervision import evidence
from distattn.supervision.evidence import is_in_collective, save_evidence
from distattn.supervision.heartbeats import Heartbeat

OTHER = 'Thread 0x1 (most recent call first):\n  File "/a/threading.py", line 1 in wait\n  <no Python frame>\n'
MAIN = (
    'Current thread 0x2 (most recent call first):\n  File "/a/torch/distributed/c10d.py", line 2 in all_reduce\n',
    '  File "train.py", line 3 in <module>\n',
)
# a rank that answers SIGUSR2 in several parts, with pauses
RANK = """
import signal, sys, time

def answer(*_):
    for part in sys.argv[2:]:
        with open(sys.argv[1], "a") as file:
            file.write(part)
        time.sleep(0.5)

signal.signal(signal.SIGUSR2, answer)
print("ready", flush=True)
while True:
    time.sleep(1)
"""


def kept(folder, *parts: str, answers: bool = True) -> str:
    """Return the stacks saved for a rank that answers in `parts`. answers: False to kill the rank first."""
    (folder / "stacks-0.txt").write_text("of a hang before\n")
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, str(folder / "stacks-0.txt"), *parts], stdout=subprocess.PIPE, text=True
    )
    assert rank.stdout.readline() == "ready\n"
    if not answers:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    beat = Heartbeat(rank.pid, 1, time.monotonic(), 1, 2, 0.0, True, "all-reduce")
    try:
        return save_evidence(folder, {0: rank.pid}, {0: beat})[0]
    finally:
        rank.kill()
        rank.wait()


@pytest.mark.parametrize("parts", [(MAIN[0], MAIN[1]), (OTHER[:30], OTHER[30:] + MAIN[0], MAIN[1])])
def test_an_answer_that_is_interrupted_is_waited_for(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "_STUCK_SECONDS", 600.0)
    monkeypatch.setattr(evidence, "_BEGIN_SECONDS", 600.0)
    monkeypatch.setattr(evidence, "_ANSWER_SECONDS", 600.0)
    stacks = kept(tmp_path, *parts)
    assert stacks == "".join(parts) and is_in_collective(stacks)


def test_an_answer_that_ends_in_another_way_is_not_waited_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "_BEGIN_SECONDS", 600.0)
    assert kept(tmp_path, MAIN[0]) == MAIN[0]


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path, monkeypatch):
    # use a limit longer than any test may take
    monkeypatch.setattr(evidence, "_BEGIN_SECONDS", 1e6)
    assert kept(tmp_path, *MAIN, answers=False) == ""
