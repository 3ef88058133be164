"""Properties that are computed once, from any thread."""

import threading

from distattn.ir.cached import cached_property


class _Slow:
    """An object whose answer waits until `ready` is set."""

    def __init__(self, ready):
        self.ready, self.asked, self.times = ready, threading.Event(), 0

    @cached_property
    def answer(self):
        """What comes out of it."""
        self.times += 1
        self.asked.set()
        assert self.ready.wait(60)
        return self.times


def test_a_value_is_computed_once():
    slow = _Slow(threading.Event())
    slow.ready.set()
    assert (slow.answer, slow.answer, slow.times) == (1, 1, 1)
    assert _Slow.answer.__doc__ == "What comes out of it."


def test_instances_do_not_wait_for_each_other():
    second = _Slow(threading.Event())
    first = _Slow(second.asked)
    thread = threading.Thread(target=lambda: first.answer)
    thread.start()
    assert first.asked.wait(60)
    second.ready.set()
    assert second.answer == 1
    thread.join()
    assert first.answer == 1
