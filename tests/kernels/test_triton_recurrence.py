"""The Triton recurrence kernel matches the definition in Triton's interpreter. One launch covers all segments."""

from unittest import mock

import pytest
import torch
from recurrences import RecurrenceResult, assert_same, by_definition, prepared, recurrence_case, run_recurrence
from waits import META, host_waits

import distattn as da
from distattn.ir.op import OPS
from distattn.kernels.recurrence import chunked
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.kernels.recurrence.trial import try_recurrence
from distattn.kernels.recurrence.triton import kernel
from distattn.kernels.registry import choose_kernel
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.triton.launch import make_launch

# one token, more than a chunk, and less than a chunk
LENGTHS = (1, 18, 7)
WITH_ONE_DECAY = [name for name, op in OPS.items() if op.kind == "recurrence" and op.decay != "channel"]
# ops without a decay need only the usual case
CASES = [
    (name, decay)
    for name in WITH_ONE_DECAY
    for decay in ("usual", "near 1", "near 0", "mixed")[: 1 if OPS[name].decay == "none" else None]
]


@pytest.fixture
def short_chunks(monkeypatch):
    """Use chunks of 16 tokens, which take the interpreter a fifth of the time."""
    monkeypatch.setattr(kernel, "_CHUNK", 16)


def in_single(case):
    """Return a case's tokens, initial states and gradients in float32."""
    x = case.x._replace(**{name: value.float() for name, value in case.x.present().items()})
    return x, *(value.float() for value in (case.initial, case.do, case.dfinal))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "decay"), CASES)
def test_outputs_states_and_gradients_equal_the_definition(short_chunks, name, decay):
    case = recurrence_case(OPS[name], LENGTHS, 2, 1, decay=decay)
    x, initial, do, dfinal = in_single(case)
    chunks = prepared(kernel, OPS[name], x, case.segments)
    results = RecurrenceResult(*kernel.forward(x, chunks, initial), *kernel.backward(x, chunks, initial, do, dfinal))
    assert_same(results, by_definition(case), 2e-5)


@pytest.mark.parametrize("name", ["gated_delta_rule", "ssd", "retention"])
def test_a_segment_is_an_affine_map_of_the_state_that_enters(short_chunks, name):
    case = recurrence_case(OPS[name], (18, 3), 2, 1)
    x, initial, do, dfinal = in_single(case)
    exact = prepared(chunked, OPS[name], case.x, case.segments)
    chunks = prepared(kernel, OPS[name], x, case.segments)
    for got, wanted in (
        (kernel.states(x, chunks, initial, True), chunked.states(case.x, exact, case.initial, True)),
        (
            kernel.gradient_states(x, chunks, do, dfinal, True),
            chunked.gradient_states(case.x, exact, case.do, case.dfinal, True),
        ),
    ):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    # a state at the start of its document needs no transition A
    assert kernel.states(x, chunks, initial, False)[1] is None


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 40), (130, 3)])
def test_dims_that_are_not_powers_of_two_and_wide_keys(key_dim, value_dim):
    case = recurrence_case(OPS["gated_delta_rule"], (37,), 1, 1, key_dim, value_dim)
    x, initial, do, dfinal = in_single(case)
    chunks = prepared(kernel, OPS["gated_delta_rule"], x, case.segments)
    assert chunks.size == (16 if key_dim > 128 else 64)
    results = RecurrenceResult(*kernel.forward(x, chunks, initial), *kernel.backward(x, chunks, initial, do, dfinal))
    assert_same(results, by_definition(case), 2e-5)


def test_repeated_keys_do_not_cancel_in_chunks_of_64_tokens():
    case = recurrence_case(OPS["delta_rule"], (70,), 1, 1)
    x = case.x._replace(k=case.x.k[:1].expand(70, -1, -1), beta=torch.full((70, 1), 1.9, dtype=torch.float64))
    case = case._replace(x=x)
    x, initial, do, dfinal = in_single(case)
    chunks = prepared(kernel, OPS["delta_rule"], x, case.segments)
    results = RecurrenceResult(*kernel.forward(x, chunks, initial), *kernel.backward(x, chunks, initial, do, dfinal))
    assert_same(results, by_definition(case), 2e-5)


def test_rows_in_no_segment_are_zero_and_empty_segments_pass_the_state_on(short_chunks):
    case = recurrence_case(OPS["ssd"], (30,), 2, 1)
    x, initial, do, dfinal = in_single(case)
    chunks = prepared(kernel, OPS["ssd"], x, [(3, 9), (12, 12)])
    states = initial.expand(2, -1, -1, -1)
    o, final = kernel.forward(x, chunks, states)
    assert not o[:3].any() and not o[9:].any() and o[3:9].all()
    assert torch.equal(final[1], initial[0])
    dx, dinitial = kernel.backward(x, chunks, states, do, dfinal.expand(2, -1, -1, -1))
    for dy in dx.by_token().values():
        assert not dy[:3].any() and not dy[9:].any() and dy[3:9].any()
    assert torch.equal(dinitial[1], dfinal[0])
    o, final = kernel.forward(x, prepared(kernel, OPS["ssd"], x, []), initial[:0])
    assert not o.any() and len(final) == 0


def test_infinite_decays_leave_numbers(short_chunks):
    case = recurrence_case(OPS["gated_delta_rule"], (20,), 2, 1)
    x, initial, do, dfinal = in_single(case)
    x.g[7] = -torch.inf
    chunks = prepared(kernel, OPS["gated_delta_rule"], x, case.segments)
    wide = x._replace(**{name: value.double() for name, value in x.present().items()})
    exact = prepared(chunked, OPS["gated_delta_rule"], wide, case.segments)
    o, final = chunked.forward(wide, exact, case.initial)
    wanted = RecurrenceResult(o, final, *chunked.backward(wide, exact, case.initial, case.do, case.dfinal))
    results = RecurrenceResult(*kernel.forward(x, chunks, initial), *kernel.backward(x, chunks, initial, do, dfinal))
    assert_same(results, wanted, 2e-5)


def test_cut_segments_over_ranks_equal_the_definition(short_chunks):
    case = recurrence_case(OPS["gated_delta_rule"], (5, 40), 2, 1)
    shape = dict(heads=2, kv_heads=1, head_dim=3, v_head_dim=5, dtype="float32", op="gated_delta_rule")
    layout = da.Layout.zigzag(case.lengths, ranks=2)
    plan = da.make_plan(da.Mask.documents(case.lengths), layout, strategy="scan", **shape)
    assert_same(run_recurrence(plan, case, kernel=kernel), by_definition(case), 2e-5)


def test_the_trial_finds_it_right_in_half_precision(short_chunks):
    needed = KernelRequirements(torch.float16, 16, 16, torch.device("cpu"), op=OPS["gated_delta_rule"])
    with (
        mock.patch("distattn.kernels.recurrence.trial._COMPARED", (18, 1)),
        mock.patch("distattn.kernels.recurrence.trial._TIMED", (1,)),
        mock.patch("distattn.kernels.recurrence.trial._HEADS_TIMED", 1),
    ):
        trial = try_recurrence(["triton_chunked"], needed, 1, 1)["triton_chunked"]
    assert not trial.fault and trial.difference < 5e-3


def test_unsupported_calls_are_refused_by_name():
    needed = KernelRequirements(torch.float32, 16, 16, torch.device("cpu"), op=OPS["kda"])
    with pytest.raises(da.DistattnError, match='one decay for all channels.*Use kernel="chunked"'):
        choose_kernel("triton_chunked", needed)
    needed = needed._replace(op=OPS["ssd"])
    assert choose_kernel("triton_chunked", needed) == "triton_chunked"
    assert "at most 256, not 300" in kernel.unsupported_reason(needed._replace(v_head_dim=300))
    assert "not float64" in kernel.unsupported_reason(needed._replace(dtype=torch.float64))
    assert "not on meta" in kernel.unsupported_reason(needed._replace(device=META))


# (lengths, forward launches, backward launches) of a layer with the chunked PyTorch kernel, as of 2026-11-24
LAYERS = [((1024,) * 8, 690, 2049), ((4000, 2500, 1200, 492), 1203, 3121)]


@pytest.mark.parametrize(("lengths", "ahead", "back"), LAYERS)
def test_launches_are_at_most_a_tenth_of_those_of_the_kernel_in_pytorch(lengths, ahead, back):
    tokens, heads = sum(lengths), 32
    needed = KernelRequirements(torch.bfloat16, 128, 128, META, op=OPS["gated_delta_rule"])
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    chunks = kernel.prepare(list(zip(ends, ends[1:], strict=False)), needed)
    on_device = kernel.ChunkTable(*(y.to(META) if isinstance(y, torch.Tensor) else y for y in chunks))

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device=META)

    q, k, v = tensor(tokens, 16, 128), tensor(tokens, 16, 128), tensor(tokens, heads, 128)
    x = RecurrenceTokens(q, k, v, tensor(tokens, heads, dtype=torch.float32), tensor(tokens, heads))
    state = tensor(len(lengths), heads, 128, 128, dtype=torch.float32)
    launched = []

    def make(*args):
        launched.append(make_launch(*args))
        return launched[-1]

    with mock.patch.object(kernel, "make_launch", make), host_waits() as watch:
        kernel.forward(x, on_device, state)
        forward = len(launched) + watch.launches.total()
        kernel.backward(x, on_device, state, v, state)
        backward = len(launched) + watch.launches.total() - forward
    assert not watch.waits
    assert [launch.kernel.__name__ for launch in launched[:3]] == ["triangular_kernel", "scan_kernel", "output_kernel"]
    assert len(launched) == 8
    # the launches of the backward pass include the sum of gradients over heads that share queries and keys
    assert (forward, backward) == (3, 7)
    assert forward <= ahead / 10 and backward <= back / 10
