"""`make_recurrent_plan` moves states or tokens, whichever is faster in simulation. Both compute the same."""

from dataclasses import replace

import numpy as np
import pytest
from processes import run_on_ranks
from recurrences import assert_same, by_definition, recurrence_case
from test_recurrence_op import run, together

import distattn as da
from distattn.cluster.spec import Link, load
from distattn.ir.op import OPS
from distattn.parallel.analysis.simulate import simulated_seconds
from distattn.parallel.make_plan import make_plan

SHAPE = dict(kv_heads=2, head_dim=3, v_head_dim=5, dtype="float64", heads=4)
LENGTHS = (1, 17, 31, 3)
# over links this slow, the number of bytes decides. The states of one-token segments have more bytes than the tokens
SLOW = replace(load("h100-1x4"), intra_node=Link(0.001, 10.0))


def plans_of(layout: da.Layout, cluster: str, **shape) -> dict[str, da.Plan]:
    """Return the chosen plan and the plan of each strategy."""
    mask, settings = da.Mask.documents(layout.lengths), dict(op="gated_delta_rule", cluster=cluster) | shape
    plans = {"chosen": da.make_recurrent_plan(mask, layout, **settings)}
    if shape["heads"] >= layout.ranks:
        plans["ulysses"] = make_plan(mask, layout, strategy="ulysses", **settings)
    return plans | {"scan": make_plan(mask, layout, strategy="scan", **settings)}


def test_the_choice_is_never_slower_than_either_strategy_and_each_is_chosen_somewhere():
    random, chosen, cluster = np.random.default_rng(3), [], load("h100-1x4")
    for number in range(12):
        tokens, documents = 1 << int(random.integers(10, 16)), int(random.integers(1, 9))
        cuts = np.sort(random.choice(np.arange(1, tokens), documents - 1, replace=False))
        lengths = np.diff([0, *cuts, tokens]).tolist()
        layout = (da.Layout.zigzag, da.Layout.document_zigzag, da.Layout.balanced)[number % 3](lengths, 4)
        heads = int(random.choice([3, 8, 32]))
        plans = plans_of(layout, "h100-1x4", heads=heads, kv_heads=heads, head_dim=64, dtype="bfloat16")
        seconds = {name: simulated_seconds(plan, cluster) for name, plan in plans.items()}
        assert seconds["chosen"] == min(seconds.values()), (number, seconds)
        assert plans["chosen"].digest == plans[plans["chosen"].strategy].digest
        chosen.append(plans["chosen"].strategy)
        # the reason names both times, the faster time first
        text = str(da.explain(plans["chosen"]))
        for name in ("scan", "ulysses"):
            assert heads < 4 or f"{name} {1e3 * seconds[name]:.3f} ms" in text
    assert set(chosen) == {"scan", "ulysses"}, chosen


def test_scan_is_planned_if_speeds_are_unknown_or_tokens_cannot_move():
    layout, mask = da.Layout.block_cyclic(LENGTHS, 4, block=1), da.Mask.documents(LENGTHS)
    shape = SHAPE | dict(op="gated_delta_rule")
    assert da.make_recurrent_plan(mask, layout, cluster=SLOW, **shape).strategy == "ulysses"
    assert da.make_recurrent_plan(mask, layout, **shape).strategy == "scan"
    assert da.make_recurrent_plan(mask, layout, cluster=SLOW, **shape | dict(heads=2)).strategy == "scan"
    # a rank without tokens may be a server, so no heads are moved to it
    idle = da.Layout.from_chunks(LENGTHS, [*([(t, t + 1) for t in range(rank, 52, 3)] for rank in range(3)), []])
    assert da.make_recurrent_plan(mask, idle, cluster=SLOW, **shape).strategy == "scan"
    with pytest.raises(da.DistattnError, match="has no option 'block'"):
        da.make_recurrent_plan(mask, layout, cluster=SLOW, options={"block": 3}, **shape)


def _run_all(rank: int, cases: list) -> list:
    return [run(rank, *case) for case in cases]


def test_the_chosen_plan_computes_the_recurrence():
    cases = []
    for layout in (da.Layout.contiguous(LENGTHS, 4), da.Layout.block_cyclic(LENGTHS, 4, block=1)):
        case = recurrence_case(OPS["gated_delta_rule"], LENGTHS)
        mask = da.Mask.documents(LENGTHS)
        plan = da.make_recurrent_plan(mask, layout, op="gated_delta_rule", cluster=SLOW, **SHAPE)
        cases.append((layout, case, plan))
    assert [plan.strategy for _, _, plan in cases] == ["scan", "ulysses"]
    for (layout, case, _), results in zip(cases, zip(*run_on_ranks(4, _run_all, cases), strict=True), strict=True):
        assert_same(together(layout, case, results), by_definition(case), 1e-10)
