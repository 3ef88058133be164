"""Tensors offloaded to the host: no races between streams, few in flight at once, and their device memory is really
freed.
"""

import gc
import weakref

import pytest
import torch
from imitated_cuda import DEVICE, imitated_cuda
from torch import nn

from distattn.ir.errors import DistattnError
from distattn.memory import pinned_memory
from distattn.memory.activation_checkpointing import checkpoint_layers
from distattn.memory.host_offload import HostOffload, Ticket

WIDTH, LAYERS = 16, 6


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def watched(in_flight, work):
    """Run `work` on layers with offloaded inputs on a side stream. Return the violations and the counts of checked
    accesses.
    """
    with imitated_cuda() as cuda:
        with torch.cuda.stream(torch.cuda.Stream()):
            work(in_flight)
        gc.collect()
        return cuda.clocks.violations, cuda.clocks.counts


def trained(in_flight, steps=2, micro_batches=2):
    layers = nn.Sequential(*(Layer() for _ in range(LAYERS))).to(DEVICE)
    checkpoint_layers(layers, offload=HostOffload(in_flight))
    for _ in range(steps):
        # both graphs exist before either backward pass runs
        losses = [layers(torch.ones(8, WIDTH, device=DEVICE)).sum() for _ in range(micro_batches)]
        for loss in losses:
            loss.backward()


def dropped(in_flight):
    """Drop the graph in the middle of the backward pass, while copies are in flight."""
    layers = nn.Sequential(*(Layer() for _ in range(LAYERS))).to(DEVICE)
    checkpoint_layers(layers, offload=HostOffload(in_flight))
    out = layers(torch.ones(8, WIDTH, device=DEVICE))
    torch.autograd.grad(out.sum(), layers[LAYERS - 2].linear.weight)
    del out
    torch.ones(8, WIDTH, device=DEVICE).sum()


@pytest.mark.parametrize("in_flight", [1, 2, 9])
@pytest.mark.parametrize("work", [trained, dropped])
def test_copies_that_overlap_have_no_race(work, in_flight):
    violations, counts = watched(in_flight, work)
    assert not violations, "\n".join(violations)
    assert counts["accesses after another stream's"] > 5


@pytest.mark.parametrize("forgotten", ["leave", "arrive"])
def test_the_watch_finds_a_copy_that_is_not_waited_for(forgotten, monkeypatch):
    right = getattr(Ticket, forgotten)

    def wrong(ticket):
        ticket._event = None
        if forgotten == "arrive" and ticket._device is None:
            ticket.fetch()
            ticket._event = None
        return right(ticket)

    monkeypatch.setattr(Ticket, forgotten, wrong)
    violations, _ = watched(1, trained)
    assert violations


def test_no_more_inputs_are_on_the_device_than_may_be_in_flight():
    alive, most = weakref.WeakSet(), []
    offload, tickets = HostOffload(2), []
    for _ in range(7):
        x = torch.ones(5)
        alive.add(x)
        tickets.append(offload.put(x))
        del x
        most.append(len(alive))
    assert max(most) == 2 and offload.host_bytes == 7 * 20
    for ticket in reversed(tickets):
        assert torch.equal(ticket.get(), torch.ones(5))
        assert sum(ticket_._device is not None for ticket_ in tickets) <= 2
    assert torch.equal(tickets[3].get(), torch.ones(5))
    del tickets, ticket
    assert offload.host_bytes == 0


def test_pinned_memory_is_exact_and_used_again():
    # undo this patch before imitated_cuda ends; otherwise it would restore the imitation's function
    with imitated_cuda(), pytest.MonkeyPatch.context() as patch:
        pinned, make = [], pinned_memory.pinned_bytes

        def counted(size):
            pinned.append(size)
            return make(size)

        patch.setattr(pinned_memory, "pinned_bytes", counted)
        offload = HostOffload(2)
        # when lengths change, keep as many buffers as were alive at the same time, but none that is too small
        for tokens, wanted in ((5, [20] * 3), (5, []), (3, []), (6, [24] * 3), (5, [])):
            tickets = [offload.put(torch.ones(tokens, device=DEVICE)) for _ in range(3)]
            for ticket in reversed(tickets):
                assert ticket.get().shape == (tokens,)
            del ticket, tickets
            gc.collect()
            assert pinned == wanted
            assert len(offload._free[DEVICE]) == 3
            pinned.clear()


def test_pinned_memory_is_given_back_after_its_copies_are_over():
    with imitated_cuda() as cuda:
        given_back = []
        offload = HostOffload(2)
        ticket = offload.put(torch.ones(5, device=DEVICE))
        ticket.get()
        pinned = ticket._pinned.untyped_storage()
        copies = cuda.clocks.snapshot(offload._streams[DEVICE].timeline)
        weakref.finalize(pinned, lambda: given_back.append(covers(cuda.clocks.snapshot(cuda.clocks.host()), copies)))
        del ticket, offload, pinned
        gc.collect()
        assert given_back == [True]


def covers(clock, other):
    """Return whether `clock` has seen every tick that `other` has seen."""
    return all(clock.get(timeline, 0) >= tick for timeline, tick in other.items())


def test_layers_keep_nothing_of_their_inputs():
    layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
    checkpoint_layers(layers, offload=HostOffload(1))
    inputs = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0]))) for layer in layers]
    x = torch.ones(8, WIDTH, requires_grad=True)
    out = layers(x)
    # only the first input is alive, because the caller holds it
    assert not any(reference() is not None for reference in inputs[1:])
    out.sum().backward()
    for hook in hooks:
        hook.remove()
    wanted = [parameter.grad.clone() for parameter in layers.parameters()] + [x.grad]
    plain = nn.Sequential(*(Layer() for _ in range(LAYERS)))
    plain.load_state_dict(layers.state_dict())
    y = torch.ones(8, WIDTH, requires_grad=True)
    plain(y).sum().backward()
    for a, b in zip(wanted, [*(parameter.grad for parameter in plain.parameters()), y.grad], strict=True):
        assert torch.equal(a, b)


def test_a_bound_below_one_is_refused():
    with pytest.raises(DistattnError, match="in_flight must be at least 1, not 0"):
        HostOffload(0)
