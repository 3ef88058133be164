"""The driver on streams: every tensor access comes after the accesses it depends on, in all threads.

`stream_clocks` describes the checks, and `imitated_cuda` the stand-in for a GPU. Training runs on a side stream unless
noted otherwise.
"""

import gc
import re
import threading
import time
from concurrent import futures
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from imitated_cuda import DEVICE, KERNEL, Cuda, Event, Stream, imitated_cuda
from processes import run_on_ranks
from stream_clocks import StreamClocks
from torch import nn
from torch.utils.checkpoint import checkpoint

import distattn as da
from distattn.batch.awaited_result import AwaitedResult
from distattn.batch.planner import AttentionShape
from distattn.driver import step_exchange
from distattn.ops.executable import Executable
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.runtime import arenas
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.streams import Handover
from distattn.parallel.runtime.communication.transport import GroupTransport, _PendingRequests

WIDTH, HEADS = 64, 4
SHAPE = AttentionShape(HEADS, HEADS, WIDTH // HEADS, WIDTH // HEADS, "float32")
# document lengths by rank, step and micro-batch
PACKS = [
    [[[200, 9], [40, 60]], [[70, 70], [9, 80]], [[100, 31], [150]]],
    [[[30, 30], [5, 50]], [[128]], [[16] * 6]],
    [[[64], [1, 1, 90]], [[20, 3]], [[200]]],
    [[[100], [8] * 9]],
]
POOLED = dict(strategy="cad", data="per_rank", options=dict(tolerance=0.0, block=8))


class Block(nn.Module):
    def __init__(self, has_sink=True, heads=HEADS):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sink, self.heads = nn.Parameter(torch.zeros(heads)) if has_sink else None, heads

    def forward(self, x, batch):
        q, k, v = (part[0].unflatten(-1, (self.heads, -1)) for part in self.qkv(self.norm(x)).chunk(3, -1))
        how = {} if self.sink is None else {"sink": self.sink}
        return x + self.out(batch.attention(q, k, v, **how).flatten(1)[None])


class Model(nn.Module):
    def __init__(self, is_checkpointed=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.is_checkpointed = is_checkpointed

    def forward(self, local):
        x = self.embed(local["input_ids"].to(DEVICE, non_blocking=True))
        for layer in self.layers:
            if self.is_checkpointed:
                # CUDA's random number generators are not imitated, so their state cannot be preserved
                x = checkpoint(layer, x, local["context_parallel"], use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, local["context_parallel"])
        return loss_of(self.head(x), local)


class NestedModel(Model):
    """Layers of two shapes, each checkpointed, inside a checkpoint of both."""

    def __init__(self):
        super().__init__()
        self.layers[1] = Block(heads=2 * HEADS)

    def forward(self, local):
        how = dict(use_reentrant=False, preserve_rng_state=False)

        def run_layers(x):
            for layer in self.layers:
                x = checkpoint(layer, x, local["context_parallel"], **how)
            return x

        x = checkpoint(run_layers, self.embed(local["input_ids"].to(DEVICE, non_blocking=True)), **how)
        return loss_of(self.head(x), local)


def loss_of(logits, local):
    labels = local["labels"][0].to(DEVICE, non_blocking=True)
    return nn.functional.cross_entropy(logits[0], labels, ignore_index=-100, reduction="sum") * local["loss_scale"]


def loader(rank, device):
    for step in PACKS[rank]:
        yield [
            {"input_ids": torch.zeros(1, sum(lengths), dtype=torch.int64, device=device), "document_lengths": lengths}
            for lengths in step
        ]


def watched(rank, work, *arguments):
    """Run `work` on a side stream. Return the violations and the counts of checked accesses."""
    with imitated_cuda() as cuda:
        with torch.cuda.stream(torch.cuda.Stream()):
            work(rank, *arguments)
        # freeing a tensor is checked too
        gc.collect()
        return cuda.clocks.violations, cuda.clocks.counts


def assert_none_found(results):
    """Assert that there are no violations, and that streams did depend on each other and reuse each other's memory."""
    for violations, counts in results:
        assert not violations, "\n".join(violations)
        assert counts["accesses after another stream's"] and counts["freed after another stream's use"]


def trained(rank, settings, loads="cpu", takes_turns=False, is_checkpointed=False):
    """Run a few steps of micro-batches, in order or taking turns. loads: the device on which the loader creates
    batches.
    """
    model = Model(is_checkpointed).to(DEVICE)
    optimizer, schedule = torch.optim.SGD(model.parameters(), lr=0.1), da.OverlapSchedule(model.layers)
    is_first_over = False
    share = rank if settings.get("data") == "per_rank" else 0
    with da.ContextParallel(kernel=KERNEL, **settings) as cp:
        for micro_batches in cp.steps(loader(share, loads)):
            if takes_turns:
                losses = schedule.step([lambda batch=batch: model(batch) for batch in micro_batches])
            else:
                losses = [model(batch) for batch in micro_batches]
                for loss in losses:
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # make the host wait for the device as rarely as possible
            if not is_first_over:
                cp.mean_loss(losses)
            is_first_over = True


def trained_on_two_streams(rank, settings, arenas_at_end=2):
    """Run steps of nested checkpoints while another stream evaluates the first micro-batch."""
    model, other, stream = NestedModel().to(DEVICE), torch.cuda.Stream(), torch.cuda.current_stream(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with da.ContextParallel(kernel=KERNEL, **settings) as cp:
        for micro_batches in cp.steps(loader(rank if settings.get("data") == "per_rank" else 0, DEVICE)):
            other.wait_stream(stream)
            with torch.cuda.stream(other), torch.no_grad():
                model(micro_batches[0])
            for batch in micro_batches:
                model(batch).backward()
            stream.wait_stream(other)
            optimizer.step()
            optimizer.zero_grad()
        # one arena per stream, with the size of the largest pass
        assert len(ARENAS.idle_bytes(DEVICE)) == arenas_at_end
    assert ARENAS.idle_bytes(DEVICE) == []


# with three ranks a double ring has only one ring
FOUR_RANKS = ("double_ring", "allgather", "usp", "cad_greedy")


# the loader puts batches on the device or on the host
@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    ("strategy", "ranks", "loads"),
    [
        *((strategy, 3, DEVICE) for strategy in STRATEGIES),
        *(pytest.param(strategy, 4, "cpu", marks=pytest.mark.full) for strategy in FOUR_RANKS),
    ],
)
def test_every_strategy_trains_without_a_race(strategy, ranks, loads):
    assert_none_found(run_on_ranks(ranks, watched, trained, dict(strategy=strategy), loads))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("settings", [dict(strategy="usp"), POOLED], ids=["usp", "pooled"])
def test_batches_that_take_turns_have_no_race(settings, is_checkpointed):
    assert_none_found(run_on_ranks(2, watched, trained, settings, DEVICE, True, is_checkpointed))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("settings", [dict(strategy="ring"), dict(strategy="ulysses"), POOLED], ids=str)
def test_nested_checkpoints_of_several_shapes_share_arenas_without_a_race(settings):
    assert_none_found(run_on_ranks(2, watched, trained_on_two_streams, settings))


def watched_from_another_device(rank, work, *arguments):
    """Run `work` in a thread whose current device is not the tensors' device. Return the violations and how often a
    device was set.
    """
    with imitated_cuda(current=0) as cuda:
        work(rank, *arguments)
        gc.collect()
        return cuda.clocks.violations, cuda.devices_set


@pytest.mark.parametrize("takes_turns", [False, True])
def test_passes_make_the_device_of_their_tensors_current(takes_turns):
    settings = dict(strategy="allgather")
    for violations, devices_set in run_on_ranks(2, watched_from_another_device, trained, settings, DEVICE, takes_turns):
        assert not violations, "\n".join(violations)
        assert devices_set


def trained_by_default(rank, *arguments):
    with torch.cuda.stream(torch.cuda.default_stream()):
        trained(rank, *arguments)


def test_threads_that_all_use_the_default_stream_have_an_order():
    for violations, _ in run_on_ranks(2, watched, trained_by_default, POOLED, DEVICE, True):
        assert not violations, "\n".join(violations)


def test_a_pool_whose_speeds_are_measured_has_no_race():
    assert_none_found(run_on_ranks(3, watched, trained, POOLED | dict(adaptive=True, pad_to=16), DEVICE))


def test_layers_of_another_layout_have_no_race():
    layers = {"full": dict(strategy="ulysses", layout="contiguous")}
    assert_none_found(run_on_ranks(2, watched, trained, dict(strategy="ring", layers=layers), DEVICE))


def served(rank, servers):
    models = dist.get_world_size() - servers
    if rank >= models:
        da.serve(device=DEVICE)
    else:
        trained(rank, POOLED | dict(servers=servers), DEVICE)


@pytest.mark.parametrize("servers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_attention_servers_have_no_race(servers):
    assert_none_found(run_on_ranks(2 + servers, watched, served, servers))


# each function below breaks a rule by patching a module or class, in a process that ends with the test


def lists_are_not_joined():
    Executable.begin_pass = lambda *arguments: None


def upload_is_not_recorded():
    Stream.record_event = lambda stream: Event(stream.cuda)


def allocator_is_not_told():
    StreamClocks.record = lambda *arguments: None


def batches_are_not_handed_over():
    class Nothing:
        of = staticmethod(lambda tensors: Handover([], None))

    step_exchange.Handover = Nothing


def threads_keep_their_stream():
    taken_over = Cuda.stream
    on_main = threading.main_thread()
    Cuda.stream = lambda cuda, stream: (
        taken_over(cuda, stream) if threading.current_thread() is on_main else nullcontext()
    )


def plans_are_taken_unasked():
    def result(future):
        while not future.done():
            time.sleep(0.001)
        return future._result

    def done(future):
        return future._state == "FINISHED"

    AwaitedResult.result = futures.Future.result = result
    futures.Future.done = done


def messages_are_not_awaited():
    _PendingRequests.wait = lambda pending: None


def sends_are_overwritten():
    exchange = GroupTransport.exchange

    def spoiling(transport, sends, *rest):
        pending = exchange(transport, sends, *rest)
        for packet in sends:
            packet.tensor.zero_()
        return pending

    GroupTransport.exchange = spoiling


def streams_share_arenas():
    arenas._place = lambda device: (device, None)


def arenas_are_given_back_at_once():
    @contextmanager
    def borrowed(pool, nbytes, device):
        place = arenas._place(device)
        arena = pool._take(place, nbytes, pool._idle[place])
        pool._idle[place].append(arena)
        yield arena

    arenas.ArenaPool.borrowed = borrowed


def breached(rank, breach, *arguments):
    breach()
    return watched(rank, trained, *arguments)[0]


def breached_on_two_streams(rank):
    streams_share_arenas()
    return watched(rank, trained_on_two_streams, dict(strategy="ring"), 1)[0]


MAIN, PLANNING = r"on a side stream \(the main thread\)", r"on the default stream \(thread distattn-planning\)"
MESSAGE = r"on message \d+ of a communicator's stream \(the main thread\)"
BREACHES = {
    lists_are_not_joined: rf"forward_kernel \(\d+,\) reads {MAIN} what _to_copy \(\d+,\) writes {PLANNING}",
    upload_is_not_recorded: rf"forward_kernel \(\d+,\) reads {MAIN} what _to_copy \(\d+,\) writes {PLANNING}",
    allocator_is_not_told: r"memory \(\d+,\) uint8 of the default stream is freed while \w+_kernel \(.*\) may still use it "
    rf"{MAIN}, without record_stream",
    batches_are_not_handed_over: rf"ne \(\d+,\) reads {PLANNING} what index_put_ \(\d+,\) writes {MAIN}",
    threads_keep_their_stream: rf"ones_like \(\) reads {MAIN} what mul \(\) writes on the default stream "
    r"\(thread distattn-micro-batch\)",
    plans_are_taken_unasked: "the main thread waits for an event that thread distattn-planning may not have recorded yet",
    messages_are_not_awaited: rf"\w+_kernel \(.*\) reads {MAIN} what receive from rank 1 \(.*\) writes {MESSAGE}",
    sends_are_overwritten: rf"zero_ \(.*\) writes {MAIN} what send to rank 1 \(.*\) reads {MESSAGE}",
    arenas_are_given_back_at_once: r"writes on .* what (send to|receive from) rank 1 \(.*\) (reads|writes) on message \d+",
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.__name__)
def test_breaches_are_found_and_named(breach):
    loads = DEVICE if breach is batches_are_not_handed_over else "cpu"
    settings = dict(strategy="ring"), loads, breach in (threads_keep_their_stream, arenas_are_given_back_at_once)
    violations = run_on_ranks(2, breached, breach, *settings)[0]
    assert any(re.search(BREACHES[breach], text) for text in violations), "\n".join(violations)


def test_an_arena_that_two_streams_share_is_found():
    violations = run_on_ranks(2, breached_on_two_streams)[0]
    named = re.compile(r"writes on a side stream .* what .* on a side stream .*, without waiting for it")
    assert any(named.search(text) for text in violations), "\n".join(violations)
