"""Ops: what a task computes, in calls, in byte counts and in plan files."""

import numpy as np
import pytest

from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import ATTENTION, OPS, Op, latent_op, op_of
from distattn.ir.plan import MOVE_COLUMNS, Call, Payload, Plan, Table, move_bytes, task_areas, task_token_ranges
from distattn.parallel.make_plan import make_plan

RECURRENT = [name for name, op in OPS.items() if op.kind == "recurrence"]
S, DS = int(Payload.S), int(Payload.dS)


def call_of(op: str, dtype: str = "bfloat16", heads: int = 4, kv_heads: int = 2) -> Call:
    lengths = (5, 11)
    layout = Layout.contiguous(lengths, 2)
    return Call(Mask.documents(lengths), layout, heads, kv_heads, 128, 128, dtype, op=op_of(op))


def moves_of(*rows: tuple[int, ...]) -> dict[str, np.ndarray]:
    return Table.from_rows([], rows).moves


def test_states_have_the_bytes_of_the_design():
    # bytes of one 128 x 128 head: a prefix state, and a state with its transition
    wanted = {
        "linear_attention": (65536, 65536),
        "retention": (65536, 65536),
        "ssd": (65536, 65540),
        "gla": (65536, 66048),
        "delta_rule": (65536, 131072),
        "gated_delta_rule": (65536, 131072),
        "kda": (65536, 131072),
    }
    for name, sizes in wanted.items():
        call = call_of(name)
        moves = moves_of((0, 0, 1, S, 0, 5, 0, 1), (0, 0, 1, S, 5, 8, 0, 1), (1, 0, 1, S, 6, 8, 0, 3))
        assert move_bytes(call, moves).tolist() == [sizes[0], sizes[0], 3 * sizes[1]], name
        # gradient states are prefix states if they are at the end of their document
        moves = moves_of((0, 0, 1, DS, 3, 5, 0, 1), (0, 0, 1, DS, 6, 8, 0, 1), (0, 0, 1, DS, 7, 16, 0, 1))
        assert move_bytes(call, moves).tolist() == [sizes[0], sizes[1], sizes[0]], name
    # fp64 calls have fp64 states
    assert call_of("gla", "float64").state_bytes(False) == 8 * (128 * 128 + 128)


def test_gates_are_as_wide_as_sums_and_heads_share_queries_and_keys():
    call = call_of("kda")
    assert call.payload_fields(Payload.Q) == ((128, "bfloat16"), (128, "bfloat16"))
    assert call.payload_fields(Payload.KV) == ((128, "bfloat16"), (128, "float32"), (None, "bfloat16"))
    assert call.payload_fields(Payload.dKV) == ((128, "float32"), (128, "float32"), (None, "float32"))
    assert call.payload_fields(Payload.O) == ((128, "float32"),)
    assert [call.payload_heads(p) for p in (Payload.Q, Payload.dQ, Payload.KV, Payload.dKV, Payload.O, Payload.S)] == [
        2,
        2,
        4,
        4,
        4,
        4,
    ]
    assert len(call_of("ssd").payload_fields(Payload.KV)) == 2
    assert len(call_of("linear_attention").payload_fields(Payload.KV)) == 1


def test_a_task_reads_the_tokens_of_its_segment():
    call = call_of("gla")
    # tasks that compute an entire segment, only its state, and only its gradient state
    tasks = Table.from_rows(
        [(0, 0, 1, 8, 16, 5, 11, 1, 4), (1, 0, 1, 8, 8, 5, 11, 1, 4), (2, 0, 1, 8, 16, 11, 11, 1, 4)]
    ).tasks
    for payload, used in (
        (Payload.KV, [1, 1, 1]),
        (Payload.Q, [1, 1, 1]),
        (Payload.dO, [1, 0, 1]),
        (Payload.dKV, [1, 0, 0]),
    ):
        ranges = task_token_ranges(call, payload, tasks)
        assert (ranges["t1"] - ranges["t0"]).tolist() == [3 * is_used for is_used in used], payload
        heads = (0, 2) if payload == Payload.Q else (1, 4)
        assert set(zip(ranges["h0"].tolist(), ranges["h1"].tolist(), strict=True)) == {heads}
    assert task_areas(call, tasks).tolist() == [9, 9, 9]


def test_a_plan_of_an_op_survives_its_file_and_has_a_digest_of_its_own(tmp_path):
    digests = set()
    for name in RECURRENT:
        call = call_of(name)
        table = Table.from_rows([(0, 0, 0, 0, 5, 0, 5, 0, 4)], [(1, 0, 1, S, 0, 5, 0, 4)])
        plan = Plan(call, table, table, "keep")
        plan.save(tmp_path / "plan")
        loaded = Plan.load(tmp_path / "plan")
        assert loaded.digest == plan.digest and loaded.call.op == call.op
        assert loaded.bytes()["payload"].tolist() == [S]
        digests.add(plan.digest)
    assert len(digests) == len(RECURRENT)


def test_plans_of_attention_keep_their_digests():
    lengths = (5, 11)
    shape = dict(heads=4, kv_heads=2, head_dim=8, dtype="bfloat16")
    plan = make_plan(Mask.documents(lengths), Layout.zigzag(lengths, 2), strategy="ring", **shape)
    assert plan.call.op == ATTENTION and "op" not in plan._shape()
    # this digest was recorded before ops were introduced
    assert plan.digest == "a7bf501aa4bb2180851fe1299c385fc9"


def test_recurrences_refuse_masks_other_than_documents():
    lengths = (5, 11)
    for mask in (
        Mask.full(16),
        Mask.sliding_window(16, 3),
        Mask.documents(lengths, "full"),
        Mask.shared_question(lengths),
    ):
        with pytest.raises(DistattnError, match="causal masks"):
            Call(mask, Layout.contiguous(lengths, 2), 2, 2, 8, 8, "float32", op=OPS["gla"])
    Call(Mask.causal(16), Layout.contiguous(lengths, 2), 2, 2, 8, 8, "float32", op=OPS["gla"])


def test_unknown_ops_are_refused_by_name():
    with pytest.raises(DistattnError, match="'rwkv' does not exist"):
        op_of("rwkv")
    with pytest.raises(DistattnError, match="merge must be one of lse, sum, never, not .max."):
        Op("mine", merge="max")
    assert op_of(OPS["gla"]) is OPS["gla"]


def test_latent_attention_moves_latents():
    call = Call(Mask.causal(16), Layout.contiguous((16,), 2), 8, 1, 192, 128, "bfloat16", op=latent_op(64, 512))
    assert call.token_head_bytes(Payload.KV) == 2 * 576
    assert call.payload_fields(Payload.O)[0][0] == 128 and len(MOVE_COLUMNS) == 8
