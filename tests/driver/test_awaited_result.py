"""Whoever waits for another thread's answer is told to wait for other ranks only while that thread asks them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from waiting import eventually

from distattn.batch.awaited_result import AwaitedResult
from distattn.supervision import heartbeats
from distattn.supervision.heartbeats import HeartbeatBoard, tell


@pytest.fixture
def told(monkeypatch):
    """What this process tells."""
    monkeypatch.setattr(heartbeats, "_TOLD", heartbeats._Told())
    board = HeartbeatBoard.make(1)
    heartbeats.attach(board.path, 0, 1)
    yield lambda: board.read(0)
    board.close()


def test_a_rank_waits_for_others_only_while_they_are_asked(told):
    tell("evaluation", step=3, seconds=300.0)
    result, asks, makes = AwaitedResult("the exchange of a step"), threading.Event(), threading.Event()
    answers = threading.Event()

    def thread():
        asks.wait()
        with result.asking():
            answers.wait()
        makes.wait()
        result.set_result(7)

    with ThreadPoolExecutor() as pool:
        pool.submit(thread)
        waiting = pool.submit(result.result)
        # its own thread still does something else: that is this rank's own time
        assert not told().waits and told().words == "evaluation"
        asks.set()
        eventually(lambda: told().waits, lambda: str(told()))
        assert (told().words, told().seconds, told().step) == ("the exchange of a step", 0.0, 3)
        answers.set()
        eventually(lambda: not told().waits, lambda: str(told()))
        assert told().words == "evaluation" and told().seconds == 300
        makes.set()
        assert waiting.result() == 7


def test_what_is_there_is_not_waited_for(told):
    tell("forward and backward", step=1)
    result = AwaitedResult("the exchange of a step")
    result.set_result(7)
    beats = told().beats
    assert result.result() == 7 and told().beats == beats


def test_errors_of_the_thread_come_to_whoever_waits(told):
    result = AwaitedResult("the exchange of a step")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(result.result)
        result.set_exception(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            waiting.result()
    result = AwaitedResult("the exchange of a step")
    with pytest.raises(ConnectionError), result.asking():
        raise ConnectionError
    result.set_exception(ConnectionError())
    with pytest.raises(ConnectionError):
        result.result()
