"""Every strategy over a communicator with NCCL's rules, and what happens when each rule is broken."""

import threading
from datetime import timedelta

import pytest
import torch
from cases import LENGTHS, layouts, masks
from imitated_nccl import GROUP, ImitatedNccl, QueueWire
from oracle import assert_close, dense, random_inputs, run_all_ranks

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import POLICIES, Payload
from distattn.parallel.make_plan import STRATEGIES, make_plan
from distattn.parallel.runtime.communication import communicator
from distattn.parallel.runtime.communication.communicator import backend_name, warm_up
from distattn.parallel.runtime.communication.transport import GroupTransport, Packet
from distattn.parallel.runtime.execution import execute

# seconds until a wait that would never end is reported, in tests that break a rule
SOON = 5.0


def on_threads(runs):
    """Run each rank on its own thread. Return the results, or raise a rank's error."""
    runs, results = list(runs), {}

    def work(rank, run):
        try:
            results[rank] = execute.run_to_completion(run)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures = [result for result in results.values() if isinstance(result, BaseException)]
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(len(runs))]


def network(ranks, seconds=60.0, warm="all", wrap=lambda backend, rank: backend):
    """Return a function from a rank to its transport, opened as by `open_communicator`.

    warm: "all" to call `warm_up`, "collective" to call only an all-reduce, or "none".
    """
    wire = QueueWire(seconds)
    backends = [ImitatedNccl(wire.end(rank), rank, ranks) for rank in range(ranks)]
    if warm != "none":
        on_threads(warmed(backend, rank, ranks, warm) for rank, backend in enumerate(backends))
    return lambda rank: GroupTransport(GROUP, wrap(backends[rank], rank))


def warmed(backend, rank, ranks, warm):
    if warm == "all":
        warm_up(backend, rank, ranks, torch.device("cpu"), timedelta(seconds=60))
    else:
        backend.allreduce([torch.zeros(1)])
    yield


def together(plan, inputs, **how):
    return run_all_ranks(
        plan, inputs, network=lambda: network(plan.call.ranks, **how), together=on_threads, kernel="reference"
    )


SHAPE = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", layouts(LENGTHS, 2))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs_by_nccls_rules(strategy, layout):
    inputs = random_inputs(sum(LENGTHS), 4, 2, 8)
    for name, ranks, policy in (("documents", 4, None), ("odd", 3, None), ("window", 4, POLICIES[-1])):
        plan = make_plan(masks()[name], layouts(LENGTHS, ranks)[layout], strategy=strategy, backward=policy, **SHAPE)
        assert_close(together(plan, inputs), dense(masks()[name], inputs), 1e-11)


def sparse_plan():
    """Return (plan, inputs). Rank 3 has its own document in this plan, so no rank sends to it."""
    lengths = (100, 40, 50)
    layout = Layout.from_chunks(lengths, [[(0, 50)], [(50, 100)], [(100, 140)], [(140, 190)]])
    return make_plan(Mask.documents(lengths), layout, strategy="ring", **SHAPE), random_inputs(190, 4, 2, 8)


def test_a_communicator_that_is_not_warm_hangs_where_a_step_leaves_ranks_out():
    plan, inputs = sparse_plan()
    assert_close(together(plan, inputs), dense(plan.call.mask, inputs), 1e-11)
    with pytest.raises(Exception, match=r"rank \d's first call of a communicator waits for a call of rank [23]"):
        together(plan, inputs, warm="none", seconds=SOON)


def never_calls():
    yield


def test_the_first_message_of_two_ranks_waits_on_the_host_unless_they_are_connected():
    hub = network(2, seconds=SOON, warm="collective")
    with pytest.raises(Exception, match="rank 0's first message with rank 1 waits on the host for rank 1"):
        on_threads([send(hub(0), torch.ones(4), peer=1), never_calls()])
    hub = network(2, seconds=SOON)
    # the host continues immediately, and waits for the message later
    posted = hub(0).exchange([Packet(1, Payload.KV, torch.ones(4))], [], False)
    on_threads([receive_and_use(hub(1), torch.empty(4), peer=0), waited(posted)])


def waited(pending):
    yield
    pending.wait()


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_a_new_communicator_connects_neighbours_on_both_sides(ranks, monkeypatch):
    monkeypatch.setattr(communicator, "_CONNECTED_NEIGHBOURS", 2)
    backends = [ImitatedNccl(wire, rank, ranks) for rank, wire in enumerate(map(QueueWire(SOON).end, range(ranks)))]
    on_threads(warmed(backend, rank, ranks, "all") for rank, backend in enumerate(backends))
    for rank, backend in enumerate(backends):
        near = {(rank + step) % ranks for step in (-2, -1, 1, 2)} - {rank}
        assert backend._connected == {(rank, peer) for peer in near} | {(peer, rank) for peer in near}


def test_a_rank_that_does_not_come_to_the_opening_of_a_communicator_does_not_hold_the_others():
    wire = QueueWire(60.0)
    with pytest.raises(RuntimeError, match="was aborted"):
        backend = ImitatedNccl(wire.end(0), 0, 2)
        # the other rank has made its first call but sent no message
        wire.queue(1, 0, "here").put(torch.zeros(1))
        warm_up(backend, 0, 2, torch.device("cpu"), timedelta(seconds=0.5))


class Breaching:
    """A backend that breaks the rules on rank 0: it sends `breach(tensor)` instead of a tensor."""

    def __init__(self, backend, rank, breach=None, waits=True):
        self.inner, self.rank, self.breach, self.waits = backend, rank, breach, waits

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def send(self, tensors, peer, tag):
        sent = self.breach(tensors[0]) if self.breach and self.rank == 0 else tensors[0]
        self.inner.send([sent], peer, tag)

    def _end_coalescing(self):
        call = self.inner._end_coalescing()
        return call if self.waits or self.rank else NoWait()


class NoWait:
    def wait(self):
        """Return immediately, without receiving the message."""


def causal_plan(strategy="ring"):
    return make_plan(masks()["causal"], layouts(LENGTHS, 2)["zigzag"], strategy=strategy, **SHAPE)


@pytest.mark.parametrize(
    ("breach", "sentence"),
    [
        (lambda x: torch.empty_like(x, device="meta"), "a tensor on meta, the communicator is on cpu"),
        (lambda x: x.transpose(0, 1), "NCCL takes contiguous tensors only"),
        (lambda x: x[:-1].contiguous(), r"rank 1 receives \d+ bytes from rank 0, which sends \d+"),
    ],
    ids=["another device", "other strides", "another size"],
)
def test_breaches_that_end_a_run_are_named(breach, sentence):
    inputs = random_inputs(sum(LENGTHS), 4, 2, 8)
    with pytest.raises(Exception, match=sentence):
        together(causal_plan(), inputs, seconds=SOON, wrap=lambda b, rank: Breaching(b, rank, breach))


def test_what_is_received_is_not_there_before_the_wait():
    plan, inputs = causal_plan(), random_inputs(sum(LENGTHS), 4, 2, 8)

    def forward(waits):
        hub = network(2, seconds=SOON, wrap=lambda b, rank: Breaching(b, rank, waits=waits))
        here = torch.empty(4)
        run_0 = receive_and_use(hub(0), here)
        run_1 = send(hub(1), torch.arange(4.0))
        try:
            return on_threads([run_0, run_1])[0]
        except Exception as error:
            # the sender hangs, because the receiver does not wait
            assert "waits for rank 0 to receive" in str(error)
            return here

    assert forward(True).tolist() == [0, 1, 2, 3]
    assert forward(False).isnan().all()
    assert_close(together(plan, inputs), dense(plan.call.mask, inputs), 1e-11)


def receive_and_use(transport, here, peer=1):
    transport.exchange([], [Packet(peer, Payload.KV, here)], False).wait()
    yield
    return here.clone()


def send(transport, tensor, spoil=False, peer=0):
    work = transport.exchange([Packet(peer, Payload.KV, tensor)], [], False)
    if spoil:
        tensor.zero_()
    yield
    work.wait()


def test_what_is_sent_is_read_at_the_wait():
    for spoil in (False, True):
        hub = network(2)
        got, _ = on_threads([receive_and_use(hub(0), torch.empty(4)), send(hub(1), torch.ones(4), spoil)])
        assert got.tolist() == [0.0 if spoil else 1.0] * 4


def send_then_receive(transport, peer, in_one):
    """Exchange messages as neighbouring pipeline stages do with hidden states and gradients."""
    ours, theirs = torch.ones(4), torch.empty(4)
    sends, receives = [Packet(peer, "hidden states", ours)], [Packet(peer, "hidden states", theirs)]
    if in_one:
        transport.exchange(sends, receives, False).wait()
    else:
        transport.exchange(sends, [], False)
        transport.exchange([], receives, False).wait()
    yield
    return theirs


def test_single_messages_in_opposite_order_wait_for_each_other():
    for in_one in (True, False):
        hub = network(2, seconds=SOON)
        runs = [send_then_receive(hub(rank), 1 - rank, in_one) for rank in range(2)]
        if in_one:
            assert all(theirs.eq(1).all() for theirs in on_threads(runs))
        else:
            with pytest.raises(Exception, match=r"rank \d waits for rank \d to receive"):
                on_threads(runs)


def test_errors_name_rank_payload_and_step():
    def lonely(transport):
        yield
        transport.exchange(
            [], [Packet(1, Payload.KV, torch.empty(4))], False, "in step 2 of 5 of the forward pass"
        ).wait()

    with pytest.raises(
        Exception, match=r"rank 1 of the group stopped answering \(KV in step 2 of 5 of the forward pass\)"
    ):
        execute.run_to_completion(lonely(network(2, seconds=SOON)(0)))


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ({"cpu": "gloo"}, {"cpu": "gloo", "cuda": None}),
        ({"cpu": "gloo", "cuda": "nccl"}, {"cpu": "gloo", "cuda": "nccl"}),
        ({"cuda": "nccl"}, {"cpu": None, "cuda": "nccl"}),
    ],
)
def test_groups_are_asked_for_the_backend_of_a_device(kinds, wanted):
    class Backend:
        def __init__(self, name):
            self.name = lambda: name

    class Composite:
        """A group for which `dist.get_backend` returns "undefined"."""

        _device_types = [torch.device(kind) for kind in kinds]

        def _get_backend(self, device):
            return Backend(kinds[device.type])

    assert {kind: backend_name(Composite(), torch.device(kind)) for kind in wanted} == wanted
