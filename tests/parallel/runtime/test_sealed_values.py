"""Values from other ranks are unpickled only if they match their digest, which uses the job's secret if there is one."""

import queue

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks

from distattn.batch.collectives import _receive_all
from distattn.parallel.runtime.communication import sealed_values
from distattn.parallel.runtime.communication.communicator import all_gather_objects
from distattn.parallel.runtime.communication.sealed_values import seal, unseal, use_secret

REFUSED = "does not match its digest: it was changed in transit, or is not from a rank of this job"
UNPICKLED = []


class Planted:
    """An object that records when it is unpickled."""

    def __reduce__(self):
        return told, ("it was",)


def told(message):
    UNPICKLED.append(message)


@pytest.fixture(autouse=True)
def no_secret(monkeypatch):
    monkeypatch.setattr(sealed_values, "_KEYS", [b""])
    UNPICKLED.clear()


@pytest.mark.parametrize("secret", [b"", b"a secret"])
def test_a_value_is_accepted_unchanged_and_refused_if_a_bit_differs(secret):
    if secret:
        use_secret(secret)
    value = {"a": [1, 2.5, None], "b": ("c", b"d")}
    sealed = seal(value)
    assert unseal(sealed) == value
    changed = bytearray(seal(Planted()))
    for place in range(len(changed)):
        changed[place] ^= 1 << place % 8
        with pytest.raises(RuntimeError, match=REFUSED):
            unseal(bytes(changed))
        changed[place] ^= 1 << place % 8
    for short in (b"", sealed[:31], sealed[:-1], sealed + b"0"):
        with pytest.raises(RuntimeError, match=REFUSED):
            unseal(short)
    assert not UNPICKLED
    unseal(bytes(changed))
    assert UNPICKLED == ["it was"]


def test_data_from_outside_this_job_is_not_unpickled():
    plain = seal(Planted())
    use_secret(b"of this job")
    sealed_here = seal("hello")
    for secret in (b"of another", b"of this job"):
        use_secret(secret)
        with pytest.raises(RuntimeError, match=REFUSED):
            unseal(plain)
    assert unseal(sealed_here) == "hello" and not UNPICKLED


def gather(rank, stranger):
    use_secret(b"one" if rank != stranger else b"another")
    value = "x" * (rank + 1), rank
    try:
        return all_gather_objects(dist.group.WORLD, value)
    except RuntimeError as error:
        return str(error)


def test_ranks_with_the_same_secret_exchange_values_of_any_length():
    wanted = [("x" * (rank + 1), rank) for rank in range(3)]
    assert run_on_ranks(3, gather, None) == [wanted] * 3
    assert all(REFUSED in result for result in run_on_ranks(3, gather, 1))


class Gloo:
    """A backend that returns an altered message."""

    def recv(self, tensors, source, tag):
        data = seal(Planted())
        content = len(data).to_bytes(4, "little") + data[:-1] + b"?"
        tensors[0][: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return self

    def wait(self):
        return True


def test_a_message_that_was_changed_ends_the_channel_that_it_comes_by():
    received = queue.SimpleQueue()
    _receive_all(Gloo(), 0, received)
    error = received.get_nowait()
    assert isinstance(error, RuntimeError) and REFUSED in str(error) and received.empty() and not UNPICKLED
