"""Chunked recurrences match their definition token by token: outputs, states and all gradients."""

import pytest
import torch
from recurrences import RECURRENT, RecurrenceResult, assert_same, by_definition, prepared, recurrence_case

from distattn.ir.op import OPS
from distattn.kernels.recurrence import chunked
from distattn.kernels.recurrence.tokens import token_by_token
from distattn.kernels.spec import KernelRequirements

LENGTHS = (1, 2, 200, 16, 65, 64, 17)


def chunk_by_chunk(op, case, dtype=torch.float64) -> RecurrenceResult:
    x = case.x._replace(**{name: value.to(dtype) for name, value in case.x.present().items()})
    initial, do, dfinal = (value.to(dtype) for value in (case.initial, case.do, case.dfinal))
    chunks = prepared(chunked, op, x, case.segments)
    o, final = chunked.forward(x, chunks, initial)
    dx, dinitial = chunked.backward(x, chunks, initial, do, dfinal)
    return RecurrenceResult(o, final, dx, dinitial)


# ops without a decay need only the usual case
DECAYS = [
    (name, decay)
    for name in RECURRENT
    for decay in ("usual", "near 1", "near 0", "mixed")[: 1 if OPS[name].decay == "none" else None]
]


@pytest.mark.parametrize(("name", "decay"), DECAYS)
def test_chunks_equal_the_definition(name, decay):
    case = recurrence_case(OPS[name], LENGTHS, decay=decay)
    wanted = by_definition(case)
    assert_same(chunk_by_chunk(OPS[name], case), wanted, 1e-10)
    assert_same(chunk_by_chunk(OPS[name], case, torch.float32), wanted, 2e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", RECURRENT)
def test_thousands_of_tokens(name):
    case = recurrence_case(OPS[name], (2500,), heads=1, key_heads=1, decay="near 1")
    wanted = by_definition(case)
    assert_same(chunk_by_chunk(OPS[name], case), wanted, 1e-10)
    assert_same(chunk_by_chunk(OPS[name], case, torch.float32), wanted, 2e-5)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_segment_is_an_affine_map_of_the_state_that_enters(name):
    case = recurrence_case(OPS[name], (70, 3, 1))
    chunks = prepared(chunked, OPS[name], case.x, case.segments)
    b, a = chunked.states(case.x, chunks, torch.zeros_like(case.initial), True)
    _, final = token_by_token(case.x, case.segments, case.initial)
    carried = a @ case.initial if OPS[name].delta else a[..., None] * case.initial
    torch.testing.assert_close(carried + b, final, rtol=1e-10, atol=1e-11)
    assert a.shape[2:] == OPS[name].transition_shape(3)
    # the gradient of the initial state is an affine map of the final state's gradient, with the same transition
    c, again = chunked.gradient_states(case.x, chunks, case.do, torch.zeros_like(case.dfinal), True)
    assert torch.equal(again, a)
    # states at the start or end of their document need no transition A
    assert chunked.states(case.x, chunks, case.initial, False)[1] is None
    carried = a.transpose(-1, -2) @ case.dfinal if OPS[name].delta else a[..., None] * case.dfinal
    torch.testing.assert_close(carried + c, by_definition(case).dinitial, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["gla", "gated_delta_rule"])
def test_rows_in_no_segment_are_zero_and_empty_segments_pass_the_state_on(name):
    case = recurrence_case(OPS[name], (30,))
    chunks = prepared(chunked, OPS[name], case.x, [(3, 9), (12, 12)])
    o, final = chunked.forward(case.x, chunks, case.initial.expand(2, -1, -1, -1))
    assert not o[:3].any() and not o[9:].any() and o[3:9].all()
    assert torch.equal(final[1], case.initial[0])
    o, final = chunked.forward(case.x, prepared(chunked, OPS[name], case.x, []), case.initial[:0])
    assert not o.any() and len(final) == 0


def test_a_list_of_segments_is_made_once_for_all_levels_that_use_it():
    segments = [(0, 5000), (5000, 5100), (5100, 5100), (5100, 9000)]
    needed = KernelRequirements(torch.float32, 8, 8, torch.device("cpu"), op=OPS["ssd"])
    levels = [level for block in chunked.prepare(segments, needed).blocks for level in block.levels]
    lists = [level.segments for level in levels]
    assert len(levels) == 79 and [x.tolist() for x in dict.fromkeys(lists)] == [[0, 1, 3], [0, 3], [0]]
    for number, level in enumerate(levels):
        going = [i for i, (begin, end) in enumerate(segments) if end - begin > 64 * number]
        assert level.segments.tolist() == going and level.end - level.begin == len(going)


def test_on_gpus_more_chunks_are_computed_at_once_and_the_numbers_are_the_same():
    case = recurrence_case(OPS["gated_delta_rule"], (1, 300, 64, 65), heads=2, key_heads=1)
    needed = KernelRequirements(torch.float64, 3, 5, torch.device("cuda", 0), op=OPS["gated_delta_rule"])
    together, apart = chunked.prepare(case.segments, needed), prepared(chunked, needed.op, case.x, case.segments)
    for a, b in zip(*(chunked.forward(case.x, chunks, case.initial) for chunks in (together, apart)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    segments = [(1024 * i, 1024 * i + 1024) for i in range(8)]
    blocks = {
        kind: len(chunked.prepare(segments, needed._replace(device=torch.device(kind))).blocks)
        for kind in ("cpu", "cuda")
    }
    assert blocks == {"cpu": 8, "cuda": 2}


def test_an_infinite_decay_erases_the_state_without_nan():
    case = recurrence_case(OPS["gla"], (40,))
    g = case.x.g.clone()
    g[20] = -torch.inf
    x = case.x._replace(g=g)
    chunks = prepared(chunked, OPS["gla"], x, case.segments)
    o, _ = chunked.forward(x, chunks, case.initial)
    alone, _ = chunked.forward(x, prepared(chunked, OPS["gla"], x, [(20, 40)]), torch.zeros_like(case.initial))
    torch.testing.assert_close(o[20:], alone[20:])
    dx, dinitial = chunked.backward(x, chunks, case.initial, case.do, case.dfinal)
    assert all(value.isfinite().all() for value in (*dx.by_token().values(), dinitial))
