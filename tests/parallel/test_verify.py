"""The verifier refuses wrong plans and accepts correct ones, whatever made them."""

import dataclasses
import functools
import random

import numpy as np
import pytest
import torch
from cases import small_plans
from oracle import Record, alive_bytes, assert_close, dense, planned_bytes, random_inputs, run_all_ranks
from random_plans import random_plan

from distattn.ir.errors import PlanError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import POLICIES, STATE_PAYLOADS, Call, Payload, Plan, Table
from distattn.parallel.analysis.verify import verify
from distattn.parallel.make_plan import make_plan

pytestmark = pytest.mark.sampled(4)

Q, KV, O, dO, dQ, dKV = (int(payload) for payload in Payload if payload not in STATE_PAYLOADS)
MUTATIONS = 5000


@functools.cache
def oracle(mask: Mask):
    inputs = random_inputs(64, 6, 2, 4)
    return inputs, dense(mask, inputs)


def mutate(plan: Plan, rng: random.Random) -> tuple[Plan, bool] | None:
    """Change one row of a plan. Return the plan, and whether it may still be valid because only a step, rank, source or
    destination has changed.
    """
    direction, kind = rng.choice(["forward", "backward"]), rng.choice(["tasks", "moves"])
    table = getattr(plan, direction)
    rows = {name: column.copy() for name, column in getattr(table, kind).items()}
    if not len(rows["step"]):
        return None
    i = rng.randrange(len(rows["step"]))
    ranges = ["q", "k", "h"] if kind == "tasks" else ["t", "h"]
    of = rng.choice(ranges)
    change = rng.choice(
        [
            "delete",
            "duplicate",
            "shift",
            "grow",
            "shrink",
            "step",
            *(["piece", "rank"] if kind == "tasks" else ["src", "dst", "payload"]),
        ]
    )
    by = rng.choice([-1, 1])
    if change == "delete":
        rows = {name: np.delete(column, i) for name, column in rows.items()}
    elif change == "duplicate":
        rows = {name: np.append(column, column[i]) for name, column in rows.items()}
    elif change == "shift":
        rows[of + "0"][i] += by
        rows[of + "1"][i] += by
    elif change in ("grow", "shrink"):
        end = rng.choice([of + "0", of + "1"])
        rows[end][i] += (1 if end.endswith("1") else -1) * (1 if change == "grow" else -1)
    elif change == "step":
        rows["step"][i] += by
    else:
        size = {"piece": len(plan.call.mask.pieces), "payload": 6}.get(change, plan.call.ranks)
        if size < 2:
            return None
        rows[change][i] = (rows[change][i] + rng.randrange(1, size)) % size
    changed = Table(**({"tasks": table.tasks, "moves": table.moves} | {kind: rows}))
    tables = {"forward": plan.forward, "backward": plan.backward} | {direction: changed}
    return Plan(plan.call, **tables, policy=plan.policy), change in ("step", "rank", "src", "dst")


@pytest.mark.full
def test_mutated_plans_are_refused_or_harmless():
    rng = random.Random(7)
    plans = list(small_plans((None, "keep", "refetch-home", "refetch-follow")))
    tried = accepted = 0
    while tried < MUTATIONS:
        plan = rng.choice(plans)
        mutant = mutate(plan, rng)
        if mutant is None:
            continue
        tried += 1
        changed, may_hold = mutant
        try:
            verify(changed)
        except PlanError:
            continue
        assert may_hold, f"accepted: {changed}"
        accepted += 1
        inputs, wanted = oracle(plan.call.mask)
        assert_close(run_all_ranks(changed, inputs), wanted, 1e-11)
    # check the test itself: harmless changes exist, and are rare
    assert 0 < accepted < MUTATIONS // 4


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_plans_no_strategy_would_make_are_accepted_and_right(kernel):
    for seed in range(200):
        plan = random_plan(random.Random(seed))
        proof = verify(plan)
        inputs = random_inputs(plan.call.mask.n, plan.call.heads, plan.call.kv_heads, 4, seed=seed)
        record = Record()
        got, wanted = run_all_ranks(plan, inputs, kernel, record), dense(plan.call.mask, inputs)
        for name, a, b in zip(got._fields, got, wanted, strict=True):
            finite = ~torch.isinf(b)
            # use an absolute tolerance, since a row with one key has gradients of exactly zero
            assert torch.equal(torch.isinf(a), ~finite) and ((a - b)[finite].abs() < 1e-11).all(), (seed, name)
        assert record.bytes == planned_bytes(plan), seed
        for program in record.programs:
            assert alive_bytes(plan.call, program.forward) == proof.forward_peak[program.rank], seed
            assert alive_bytes(plan.call, program.backward) == proof.backward_peak[program.rank], seed


@pytest.mark.parametrize("policy", POLICIES)
def test_every_strategy_and_policy_is_proven(policy):
    for plan in small_plans((policy,)):
        proof = verify(plan)
        assert proof.digest == plan.digest
        assert (proof.kept > 0).any() == (policy == "keep" and len(plan.forward.moves["step"]) > 0)


def call(lengths, layout, heads=2, kv_heads=1, mask=None):
    return Call(mask or Mask.documents(lengths), layout, heads, kv_heads, 4, 4, "float64")


def check(plan: Plan) -> None:
    verify(plan)
    inputs = random_inputs(plan.call.mask.n, plan.call.heads, plan.call.kv_heads, 4)
    assert_close(run_all_ranks(plan, inputs), dense(plan.call.mask, inputs), 1e-11)


def test_a_hand_written_plan_with_split_keys_a_server_and_a_relay_is_accepted_and_right():
    # one document on rank 0. Rank 2 has no tokens and computes the right half of the keys for the lower queries. Its
    # inputs and results travel through rank 1
    layout = Layout.from_chunks([8], [[(0, 8)], [], []])
    forward = Table.from_rows(
        # columns: step rank piece q0 q1 k0 k1 h0 h1
        [(0, 0, 0, 0, 8, 0, 4, 0, 2), (2, 2, 0, 4, 8, 4, 8, 0, 2)],
        # columns: step src dst payload t0 t1 h0 h1
        [
            (0, 0, 1, Q, 4, 8, 0, 2),
            (1, 1, 2, Q, 4, 8, 0, 2),
            (0, 0, 1, KV, 4, 8, 0, 1),
            (1, 1, 2, KV, 4, 8, 0, 1),
            (3, 2, 1, O, 4, 8, 0, 2),
            (4, 1, 0, O, 4, 8, 0, 2),
        ],
    )
    backward = Table.from_rows(
        [(0, 0, 0, 0, 8, 0, 4, 0, 2), (2, 2, 0, 4, 8, 4, 8, 0, 2)],
        [
            *[(s, a, b, p, 4, 8, 0, 2) for p in (Q, dO) for s, a, b in ((0, 0, 1), (1, 1, 2))],
            *[(s, a, b, KV, 4, 8, 0, 1) for s, a, b in ((0, 0, 1), (1, 1, 2))],
            (3, 2, 0, dQ, 4, 8, 0, 2),
            (3, 2, 1, dKV, 4, 8, 0, 1),
            (4, 1, 0, dKV, 4, 8, 0, 1),
        ],
    )
    check(Plan(call([8], layout), forward, backward, "refetch-home"))


def test_partial_results_may_be_merged_on_the_way():
    # ranks 1 and 2 each compute some keys for rank 0's queries. Rank 2's partial result is merged into that of rank 1
    layout = Layout.from_chunks([6], [[(0, 6)], [], []])
    tasks = [(0, 0, 0, 0, 6, 0, 2, 0, 2), (1, 1, 0, 2, 6, 2, 4, 0, 2), (1, 2, 0, 4, 6, 4, 6, 0, 2)]
    sends = [(0, 0, 1, Q, 2, 6, 0, 2), (0, 0, 1, KV, 2, 4, 0, 1), (0, 0, 2, Q, 4, 6, 0, 2), (0, 0, 2, KV, 4, 6, 0, 1)]
    forward = Table.from_rows(tasks, [*sends, (2, 2, 1, O, 4, 6, 0, 2), (3, 1, 0, O, 2, 6, 0, 2)])
    backward = Table.from_rows(
        tasks,
        [
            *sends,
            (0, 0, 1, dO, 2, 6, 0, 2),
            (0, 0, 2, dO, 4, 6, 0, 2),
            (2, 2, 1, dQ, 4, 6, 0, 2),
            (3, 1, 0, dQ, 2, 6, 0, 2),
            (2, 1, 0, dKV, 2, 4, 0, 1),
            (2, 2, 0, dKV, 4, 6, 0, 1),
        ],
    )
    check(Plan(call([6], layout), forward, backward, "refetch-home"))


def test_heads_may_be_cut_across_key_value_groups():
    # 6 query heads with 2 KV heads, and tasks of heads [0, 4) and [4, 6)
    layout = Layout.contiguous([5], 1)
    tasks = [(0, 0, 0, 0, 5, 0, 5, 0, 4), (1, 0, 0, 0, 5, 0, 5, 4, 6)]
    check(Plan(call([5], layout, 6, 2), Table.from_rows(tasks), Table.from_rows(tasks), "keep"))


TASK = (0, 0, 0, 0, 4, 0, 4, 0, 2)


@pytest.mark.parametrize(
    ("tasks", "moves", "sentence"),
    [
        ([], [], "of piece 0, 20 cells x heads are allowed but tasks compute 0"),
        ([TASK, TASK], [], "tasks 0 and 1 compute the same cells"),
        ([(0, 0, 0, 0, 4, 0, 4, 0, 1)], [], "tasks compute 10"),
        ([(0, 0, 0, 0, 4, 0, 5, 0, 2)], [], "impossible rectangle on 4 tokens"),
        ([(0, 0, 0, 0, 2, 0, 4, 0, 2)], [], "task 0 .* is not a tight rectangle"),
        ([(0, 0, 1, 0, 4, 0, 4, 0, 2)], [], "names a piece that the mask does not have"),
        ([(0, 2, 0, 0, 4, 0, 4, 0, 2)], [], "runs on a rank outside the group of 2"),
        ([(0, 0, 0, 0, 4, 0, 4, 0, 3)], [], "head range of 2 heads"),
        ([(-1, 0, 0, 0, 4, 0, 4, 0, 2)], [], "impossible step"),
        ([(0, 1, 0, 0, 4, 0, 4, 0, 2)], [], "Q is missing for task 0"),
        ([TASK], [(0, 0, 0, KV, 0, 4, 0, 1)], "does not go from one rank to another"),
        ([TASK], [(0, 0, 1, dKV, 0, 4, 0, 1)], "carries a payload"),
        ([TASK], [(0, 0, 1, KV, 0, 4, 0, 2)], "head range"),
        ([TASK], [(0, 0, 1, KV, 0, 4, 0, 1)], "KV of move 0 .* arrives unused"),
        ([TASK], [(0, 1, 0, KV, 0, 4, 0, 1)], "arrives more than once, or is already held, on rank 0"),
        ([TASK], [(0, 1, 0, O, 0, 4, 0, 2)], "O of move 0 .* carries nothing"),
        ([TASK], [(1, 0, 1, O, 0, 4, 0, 2)], "is sent twice, or by its owner, from rank 0"),
    ],
)
def test_wrong_plans_are_refused_by_the_first_offender(tasks, moves, sentence):
    plan = Plan(
        call([4], Layout.from_chunks([4], [[(0, 4)], []])),
        Table.from_rows(tasks, moves),
        Table.from_rows([TASK]),
        "keep",
    )
    with pytest.raises(PlanError, match=sentence):
        verify(plan)


def test_late_arrivals_and_early_departures_are_refused():
    layout = Layout.from_chunks([4], [[(0, 4)], []])
    work = (1, 1, 0, 0, 4, 0, 4, 0, 2)
    sends = [(0, 0, 1, Q, 0, 4, 0, 2), (0, 0, 1, KV, 0, 4, 0, 1)]

    def plan(moves):
        return Plan(call([4], layout), Table.from_rows([work], moves), Table.from_rows([TASK]), "refetch-home")

    with pytest.raises(PlanError, match="forward: KV arrives too late for task 0"):
        verify(plan([sends[0], (1, 0, 1, KV, 0, 4, 0, 1), (2, 1, 0, O, 0, 4, 0, 2)]))
    with pytest.raises(PlanError, match="forward: O was already sent before task 0"):
        verify(plan([*sends, (1, 1, 0, O, 0, 4, 0, 2)]))
    with pytest.raises(PlanError, match="forward: O is never sent after task 0"):
        verify(plan(sends))


def test_hostile_numbers_are_refused_not_computed_with():
    layout = Layout.from_chunks([4], [[(0, 4)], []])
    for value in (1 << 62, -(1 << 62), 1 << 40):
        for column in range(9):
            row = list(TASK)
            row[column] = value
            with pytest.raises(PlanError):
                verify(Plan(call([4], layout), Table.from_rows([row]), Table.from_rows([TASK]), "keep"))


def test_a_plan_that_needs_more_than_the_capacity_is_refused():
    plan = next(
        plan for plan in small_plans() if verify(plan).backward_peak.max() > verify(plan).forward_peak.max() > 0
    )
    proof = verify(plan)
    assert verify(plan, int(proof.backward_peak.max())).digest == proof.digest
    with pytest.raises(PlanError, match=f"backward: rank .* needs {proof.backward_peak.max():,} bytes"):
        verify(plan, int(proof.backward_peak.max()) - 1)
    with pytest.raises(PlanError, match="forward: rank"):
        verify(plan, 0)


def test_a_plan_that_overstates_what_is_written_once_is_refused():
    lengths = (60, 40)
    shape = dict(heads=4, kv_heads=2, head_dim=8, dtype="bfloat16")
    mask, layout = Mask.documents(lengths), Layout.zigzag(lengths, 4)
    plan = make_plan(mask, layout, strategy="ring", **shape)
    assert verify(make_plan(mask, layout, strategy="ulysses", **shape)) and Payload.O not in plan.call.written_once
    call = dataclasses.replace(plan.call, written_once=(Payload.O,))
    with pytest.raises(PlanError, match="two kernel calls add to O, which the plan says is written once"):
        verify(dataclasses.replace(plan, call=call))
