"""Recurrences are simulated, explained and compared to bounds like attention."""

import numpy as np
import pytest

from distattn.cluster.spec import load
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Plan
from distattn.parallel.analysis.explain import explain
from distattn.parallel.analysis.lower_bounds import lower_bound, plan_traffic
from distattn.parallel.analysis.quality import quality
from distattn.parallel.analysis.simulate import simulate
from distattn.parallel.make_plan import make_plan
from distattn.parallel.strategies.scan_schedules import SCHEDULES

H100 = load("h100-1x8")


def plan_of(ranks=8, lengths=(8192 * 8,), layout="zigzag", cluster=None, strategy="scan", **options) -> Plan:
    shape = dict(heads=32, kv_heads=32, head_dim=128, dtype="bfloat16", op="gated_delta_rule", cluster=cluster)
    token_layout = getattr(Layout, layout)(lengths, ranks)
    return make_plan(Mask.documents(lengths), token_layout, strategy=strategy, options=options or None, **shape)


def milliseconds(plan: Plan) -> float:
    return simulate(plan, H100).forward.seconds * 1e3


def test_times_are_as_designed():
    # the computation takes each of 8 ranks 0.60 ms; the sequential schedule lets only one rank compute at a time
    alone = plan_of(1, (8192,))
    assert simulate(alone, "h100-1x1").forward.seconds * 1e3 == pytest.approx(0.60, rel=0.15)
    estimated = {name: milliseconds(plan_of(schedule=name)) for name in SCHEDULES}
    assert estimated["sequential"] == pytest.approx(5.01, rel=0.15)
    assert estimated["head_sharded"] == min(estimated.values())
    assert estimated["head_sharded"] == pytest.approx(0.99, rel=0.25)
    assert milliseconds(plan_of(schedule="sequential", head_groups=8)) < estimated["sequential"] / 2


def test_the_fastest_schedule_is_chosen_where_speeds_are_known():
    fastest = min(milliseconds(plan_of(schedule=name)) for name in SCHEDULES)
    assert milliseconds(plan_of(cluster=H100)) <= fastest
    # without known speeds, heads are sharded
    assert plan_of().digest == plan_of(schedule="head_sharded").digest


def test_documents_have_schedules_of_their_own_and_together_are_never_slower_than_any_one_schedule():
    rng = np.random.default_rng(5)
    cluster, faster = load("h100-2x4"), 0
    singles = [{"schedule": name, "state_first": first} for name in SCHEDULES for first in (False, True)]
    singles += [{"schedule": "sequential", "head_groups": 8}]
    for layout in ("contiguous", "zigzag", "balanced"):
        lengths = tuple(int(length) for length in 1 + rng.lognormal(8.0, 1.6, 9))
        mixed = simulate(plan_of(8, lengths, layout, cluster), cluster)
        alone = [simulate(plan_of(8, lengths, layout, cluster, **options), cluster) for options in singles]
        for direction in ("forward", "backward"):
            fastest = min(getattr(simulated, direction).seconds for simulated in alone)
            seconds = getattr(mixed, direction).seconds
            assert seconds <= fastest, (layout, lengths)
            faster += seconds < 0.99 * fastest
    assert faster
    # the schedules are shown and are saved with the plan
    label = mixed.plan.forward.label
    assert ";" in label and f"forward schedules: {label}" in str(explain(mixed.plan))
    assert explain(mixed.plan).as_dict()["schedules"]["forward"] == label


def test_a_saved_plan_knows_its_schedules(tmp_path):
    plan = plan_of(4, (40, 60), schedule="allgather_states")
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").forward.label == plan.forward.label == "allgather_states"


def test_an_explanation_speaks_of_tokens_and_states():
    plan = plan_of(4, (40, 60), schedule="allgather_states")
    shown = explain(plan)
    text, facts = str(shown), shown.as_dict()
    assert "gated_delta_rule, 32 states of 128 x 128 and 32 key heads" in text
    assert "3,200 tokens x heads" not in text and "tokens x heads" in text and "a plain ring" not in text
    assert "every token once, from all of its document before it in order" in text
    assert facts["op"] == "gated_delta_rule" and facts["bytes_by_payload"]["S"] > 0
    assert sum(facts["bytes_by_payload"].values()) == int(plan.bytes()["bytes"].sum())
    assert shown.picture()[:4] == b"\x89PNG"


def test_states_count_as_what_has_to_move():
    plan = plan_of(4, (40, 60))
    one_node = explain(plan).cluster
    assert lower_bound(plan, one_node) == plan_traffic(plan, one_node)
    moved = plan_of(4, (40, 60), strategy="ulysses")
    assert lower_bound(moved, one_node).total_bytes == plan_traffic(moved, one_node).total_bytes


def test_quality_is_in_tokens():
    for cluster in (None, load("h100-1x4")):
        stats = quality(plan_of(4, (100,), layout="contiguous", schedule="sequential"), cluster)["forward"]
        assert stats.cells_imbalance == pytest.approx(1.0) and stats.cost_imbalance == pytest.approx(1.0)
        assert np.isfinite(stats.kernel_seconds or 0.0) and stats.lower_bound_bytes == 0
