"""Buffers that are also working tensors: kernels read and write them in place where possible, and use copies elsewhere."""

import itertools

import numpy as np
from cases import LENGTHS, layouts
from oracle import assert_close, dense, random_inputs, run_all_ranks

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import REDUCED_PAYLOADS, Call, Payload, Plan, Table
from distattn.kernels.launch_mask import WrittenRows
from distattn.parallel.make_plan import make_plan
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.lowering.views import OWN
from distattn.parallel.tables.backward import derive_backward

TOKENS = sum(LENGTHS)


def programs(strategy, layout, mask=None, ranks=4, **how):
    shape = dict(heads=8, kv_heads=4, head_dim=8, dtype="bfloat16", **how)
    plan = make_plan(mask or Mask.causal(TOKENS), layouts(LENGTHS, ranks)[layout], strategy=strategy, **shape)
    return [lower(plan, rank, lambda mask: None) for rank in range(ranks)]


def launches(program):
    return [launch for step in (*program.forward, *program.backward) for launch in step.launches]


def is_direct(view):
    return view.is_complete and len(view.slices) == 1 and isinstance(view.slices[0].rows, slice)


def test_ulysses_reads_and_writes_in_place():
    for program in programs("ulysses", "zigzag", backward="refetch-home"):
        (forward, backward) = launches(program)
        for launch in (forward, backward):
            assert all(is_direct(view) for view in (*launch.operands.values(), *launch.results.values()))
        # a peer's two chunks are separate segments of a message (the last rank's chunks are adjacent), and kernels'
        # results are sent as slices, without gathering rows
        steps = (*program.forward, *program.backward)
        received = [m for step in steps for payload, m in step.receives]
        assert {len(message.segments) for message in received} == {1, 2} or program.rank == 3
        sent = [m.view for step in steps for payload, m in step.sends if payload in REDUCED_PAYLOADS]
        assert all(isinstance(piece.rows, slice) for view in sent for piece in view.slices)


def test_own_rows_lie_among_those_that_arrive():
    for program in programs("ulysses", "zigzag", backward="refetch-home"):
        for step in program.forward:
            assert set(step.allocate.values()) <= {TOKENS}
            assert {key.payload for key, _ in step.own_copies} <= {Payload.Q, Payload.KV}
        (own_copies,) = (step.own_copies for step in program.forward if step.own_copies)
        filled = {key.payload: sum(piece.view_rows.stop - piece.view_rows.start if isinstance(piece.view_rows, slice)
                                   else len(piece.view_rows) for piece in view.slices) for key, view in own_copies}  # fmt: skip
        assert filled == {Payload.Q: program.tokens, Payload.KV: program.tokens}
        (own_results,) = (step.own_results for step in program.forward if step.own_results)
        assert [key.payload for key, _ in own_results] == [Payload.O]
        assert all(piece.is_first and piece.buffer.step == OWN for _, view in own_results for piece in view.slices)


def test_kept_tensors_are_placed_where_both_passes_read_them_if_that_costs_little():
    for program in programs("ulysses", "zigzag", backward="keep"):
        # a rank has a quarter of the tokens, so adding its own rows makes kept tensors a third larger than the arriving
        # rows
        assert program.kept and set(program.kept.values()) == {TOKENS}
        assert {key.payload for step in program.forward for key, _ in step.own_copies} == {Payload.Q, Payload.KV}
        assert {key.payload for step in program.backward for key, _ in step.own_copies} == {Payload.dO}
        for launch in launches(program):
            assert all(is_direct(view) for view in (*launch.operands.values(), *launch.results.values()))
    for program in programs("ulysses", "zigzag", ranks=2, backward="keep"):
        # with the rank's own rows, kept tensors would be twice as large
        assert program.kept and set(program.kept.values()) == {TOKENS - program.tokens}
        # results are still sent directly from the memory into which they are computed
        assert any(step.own_results for step in program.forward)
        assert not any(step.own_copies for step in program.forward)


def test_launches_of_some_rows_read_a_run_of_what_has_landed():
    # two Ulysses groups in a ring of two; only later rows need the other group's keys
    how = dict(backward="refetch-home", options=dict(ulysses=2))
    mask, shape = Mask.causal(TOKENS), dict(heads=8, kv_heads=4, head_dim=8, dtype="float64")
    parts = 0
    for program in programs("usp", "zigzag", **how):
        for launch in launches(program):
            queries = [view for payload, view in launch.operands.items() if payload in (Payload.Q, Payload.dO)]
            assert all(is_direct(view) and view.slices[0].buffer.step != OWN for view in queries)
            parts += any(view.slices[0].rows.start for view in queries)
    assert parts
    plan = make_plan(mask, layouts(LENGTHS, 4)["zigzag"], strategy="usp", **shape, **how)
    inputs = random_inputs(TOKENS, 8, 4, 8)
    assert_close(run_all_ranks(plan, inputs), dense(mask, inputs), 1e-11)


def test_messages_in_many_segments_are_gathered_as_before():
    layout = Layout.block_cyclic(LENGTHS, 4, block=5)
    shape = dict(heads=8, kv_heads=4, head_dim=8, dtype="bfloat16", backward="refetch-home")
    plan = make_plan(Mask.causal(TOKENS), layout, strategy="ulysses", **shape)
    for program in (lower(plan, rank, lambda mask: None) for rank in range(4)):
        assert not any(step.own_copies or step.own_results for step in (*program.forward, *program.backward))
        assert not all(is_direct(view) for launch in launches(program) for view in launch.operands.values())


def test_both_ends_cut_a_message_alike():
    for strategy, layout in (
        ("ulysses", "zigzag"),
        ("allgather", "balanced"),
        ("cad", "contiguous"),
        ("usp", "from_chunks"),
    ):
        every = programs(strategy, layout)
        for direction in ("forward", "backward"):
            sent, received = {}, {}
            for program in every:
                for number, step in enumerate(getattr(program, direction)):
                    for payload, message in step.sends:
                        sent.setdefault((program.rank, message.peer, number, payload), []).append(message.segments)
                    for payload, message in step.receives:
                        received.setdefault((message.peer, program.rank, number, payload), []).append(message.segments)
            assert sent == received


def test_rows_that_came_with_some_heads_are_a_launch_of_their_own():
    lengths = (4000, 100, 60, 40)
    layout = layouts(lengths, 4)["contiguous"]
    shape = dict(heads=8, kv_heads=4, head_dim=8, dtype="bfloat16", options=dict(block=64, tolerance=0.0))
    plan = make_plan(Mask.documents(lengths), layout, strategy="cad", **shape)
    direct = 0
    for rank in range(4):
        for launch in launches(lower(plan, rank, lambda mask: None)):
            view = launch.operands[Payload.Q]
            cells = sum((piece.heads.stop - piece.heads.start) * _count(piece.rows) for piece in view.slices)
            assert view.rows * view.heads <= 2 * cells
            direct += is_direct(view) and view.slices[0].buffer.step != OWN
    assert direct


def _count(rows):
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def test_rows_written_in_part_are_cut_where_that_changes():
    written = WrittenRows(20, [0, 2, 4])
    assert written.mark(slice(0, 2), slice(5, 8))
    assert written.segments(slice(0, 4), slice(2, 12)) == [slice(2, 5), slice(5, 8), slice(8, 12)]
    assert written.segments(slice(2, 4), slice(2, 12)) == [slice(2, 12)]
    written.mark(slice(0, 4), np.arange(0, 20, 2))
    assert written.segments(slice(0, 4), slice(0, 20)) == [slice(0, 20)]


def test_launches_that_need_some_heads_of_what_has_landed_get_those():
    # the keys of ranks 1 and 2 alternate. Rank 0 first needs both ranks' keys with all heads, then each rank's keys
    # with half of the heads
    n, heads, kv_heads = 12, 4, 2
    chunks = {0: [(0, 4)], 1: [(4, 6), (8, 10)], 2: [(6, 8), (10, 12)]}
    call = Call(Mask.full(n), Layout.from_chunks([n], list(chunks.values())), heads, kv_heads, 8, 8, "float64")
    moves = [
        (0, src, dst, int(Payload.KV), a, b, 0, kv_heads)
        for dst in chunks
        for src in chunks
        if src != dst
        for a, b in chunks[src]
    ]
    tasks = []
    for rank, rows in chunks.items():
        for (q0, q1), other in itertools.product(rows, chunks):
            for k0, k1 in chunks[other]:
                parts = [(int(other != rank), q0, q1, 0, heads)]
                if rank == 0 != other:
                    parts = [(1, q0, 2, 0, heads), (2, 2, q1, 0, 2), (3, 2, q1, 2, heads)]
                tasks += [(step, rank, 0, a, b, k0, k1, h0, h1) for step, a, b, h0, h1 in parts]
    forward = Table.from_rows(tasks, moves)
    inputs = random_inputs(n, heads, kv_heads, 8)
    for policy in ("refetch-home", "keep"):
        plan = Plan(call, forward, derive_backward(call, forward, policy), policy, "by hand")
        assert_close(run_all_ranks(plan, inputs), dense(call.mask, inputs), 1e-11)
