"""What each strategy promises: what it moves, when, and how much it holds."""

import numpy as np
import pytest
from cases import LENGTHS, layouts, masks
from oracle import Record, alive_bytes, random_inputs, run_all_ranks

from distattn.cluster import spec as describe
from distattn.cluster.topology import Cluster
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import POLICIES, Payload, Plan, move_bytes, select_rows
from distattn.parallel.analysis.lower_bounds import lower_bound, plan_traffic
from distattn.parallel.make_plan import STRATEGIES, make_plan

pytestmark = pytest.mark.sampled(3)

SHAPE = dict(heads=8, kv_heads=2, head_dim=8, dtype="float64")


def received(plan: Plan, payload: Payload, rank: int) -> np.ndarray:
    """Return the sorted tokens of a payload that a rank receives in the forward pass, with repetitions."""
    moves = plan.forward.moves
    rows = (moves["payload"] == payload) & (moves["dst"] == rank)
    spans = [np.arange(a, b) for a, b in zip(moves["t0"][rows], moves["t1"][rows], strict=True)]
    return np.sort(np.concatenate([np.zeros(0, int), *spans]))


@pytest.mark.parametrize("mask", masks())
def test_allgather_sends_each_needed_key_once_and_nothing_else(mask):
    for layout in layouts(LENGTHS, 4).values():
        plan = make_plan(masks()[mask], layout, strategy="allgather", **SHAPE)
        dense = masks()[mask].dense()
        for rank in range(4):
            own_tokens = layout.tokens(rank)
            needed = np.setdiff1d(np.flatnonzero(dense[own_tokens].any(0)), own_tokens)
            assert received(plan, Payload.KV, rank).tolist() == needed.tolist()


CLUSTERS = {4: Cluster(2, 2), 6: Cluster(3, 2), 8: Cluster(2, 4)}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_moves_that_the_assignment_of_tasks_does_not_ask_for(strategy, policy):
    for ranks, cluster in CLUSTERS.items():
        for layout in layouts(LENGTHS, ranks).values():
            for mask in masks().values():
                plan = make_plan(mask, layout, strategy=strategy, backward=policy, cluster=cluster, **SHAPE)
                bound = lower_bound(plan, cluster)
                assert plan_traffic(plan, cluster).total_bytes == bound.total_bytes
                if strategy in ("allgather", "double_ring"):
                    assert plan_traffic(plan, cluster).inter_node_bytes == bound.inter_node_bytes


def test_the_lower_bound_equals_a_count_token_by_token():
    """Compare `lower_bound` with sets of (rank, token, head) for a mask with windows in some heads."""
    mask = Mask.by_head([(4, Mask.causal(60)), (2, Mask.sliding_window(60, 7)), (2, Mask.full(60))])
    layout, cluster = Layout.zigzag([60], 4), Cluster(2, 2)
    plan = make_plan(mask, layout, strategy="allgather", cluster=cluster, **SHAPE)
    owner = {int(token): rank for rank in range(4) for token in layout.tokens(rank)}
    dense = mask.dense()
    needed = {
        (owner[q], k, h // 4)
        for h in range(8)
        for q, k in zip(*np.nonzero(dense[h]), strict=True)
        if owner[q] != owner[k]
    }
    nodes = {(rank // 2, k, h) for rank, k, h in needed if rank // 2 != owner[k] // 2}
    forward, back = (plan.call.token_head_bytes(payload) for payload in (Payload.KV, Payload.dKV))
    bound = lower_bound(plan, cluster)
    assert bound.total_bytes == len(needed) * (2 * forward + back)
    assert bound.inter_node_bytes == len(nodes) * (2 * forward + back)


@pytest.mark.parametrize("mask", masks())
def test_ring_passes_keys_along_the_ranks_that_use_them_just_in_time(mask):
    for layout in layouts(LENGTHS, 4).values():
        plan = make_plan(masks()[mask], layout, strategy="ring", options={"rotate": "keys"}, **SHAPE)
        tasks, moves = plan.forward.tasks, plan.forward.moves
        for rank in range(4):
            tokens = received(plan, Payload.KV, rank)
            assert len(tokens) == len(set(tokens.tolist()))
        for step, dst, t0, t1 in zip(*(moves[name] for name in ("step", "dst", "t0", "t1")), strict=True):
            users = (tasks["rank"] == dst) & (tasks["step"] == step + 1)
            spans = zip(tasks["k0"][users], tasks["k1"][users], strict=True)
            assert set(range(t0, t1)) <= {token for span in spans for token in range(*span)}


@pytest.mark.parametrize(
    ("kv_heads", "forward", "backward"),
    # with bf16 and head dim 128, keys and values cost K * 512 bytes per token and hop, queries with outputs H * 772. In
    # the backward pass these costs are K * 1,536 and H * 1,032
    [(8, Payload.KV, Payload.Q), (4, Payload.KV, Payload.KV), (1, Payload.KV, Payload.KV)],
)
def test_ring_rotates_what_is_smaller_in_each_direction(kv_heads, forward, backward):
    shape = dict(heads=8, kv_heads=kv_heads, head_dim=128, dtype="bfloat16")
    plan = make_plan(Mask.full(64), Layout.contiguous([64], 4), strategy="ring", **shape)
    assert forward in plan.forward.moves["payload"] and backward in plan.backward.moves["payload"]
    smaller = {
        direction: min(
            int(move_bytes(other.call, getattr(other, direction).moves).sum())
            for other in (
                make_plan(Mask.full(64), Layout.contiguous([64], 4), strategy="ring", options={"rotate": kind}, **shape)
                for kind in ("keys", "queries")
            )
        )
        for direction in ("forward", "backward")
    }
    for direction, size in smaller.items():
        assert int(move_bytes(plan.call, getattr(plan, direction).moves).sum()) == size


def test_double_ring_crosses_nodes_one_inner_ring_ahead():
    plan = make_plan(Mask.full(64), Layout.contiguous([64], 8), strategy="double_ring", cluster=Cluster(2, 4), **SHAPE)
    moves, node = plan.forward.moves, Cluster(2, 4).node
    crossing = node[moves["src"]] != node[moves["dst"]]
    assert set(moves["step"][crossing].tolist()) == {0}
    # each of the two rings inside a node takes three steps
    inside = moves["step"][~crossing].tolist()
    assert set(inside) == {0, 1, 2, 4, 5, 6}


@pytest.mark.parametrize("inner_dim", ["ulysses", "ring"])
def test_usp_sends_queries_and_outputs_only_inside_an_ulysses_group(inner_dim):
    options = {"ulysses": 2, "inner_dim": inner_dim}
    for layout in layouts(LENGTHS, 8).values():
        plan = make_plan(masks()["documents"], layout, strategy="usp", options=options, **SHAPE)
        moves = select_rows(plan.forward.moves, np.isin(plan.forward.moves["payload"], [Payload.Q, Payload.O]))
        group = np.arange(8) // 2 if inner_dim == "ulysses" else np.arange(8) % 4
        assert len(moves["src"]) and (group[moves["src"]] == group[moves["dst"]]).all()


@pytest.mark.parametrize(
    ("strategy", "options", "sentence"),
    [
        ("ring", {"rotate": "values"}, "fewest bytes, keys, queries"),
        ("ring", {"window": 3}, "ring has no option 'window'; it takes rotate"),
        ("allgather", {"x": 1}, "it takes none"),
        ("usp", {"ulysses": 3}, "ulysses = 1, 2, 4 would work"),
        ("usp", {"inner_dim": "tree"}, "ulysses, ring"),
        ("double_ring", {"inner_ring_size": 3}, "does not divide 4 ranks"),
    ],
)
def test_impossible_options_are_refused(strategy, options, sentence):
    with pytest.raises(DistattnError, match=sentence):
        make_plan(Mask.causal(8), Layout.zigzag([8], 4), strategy=strategy, options=options, **SHAPE)


def test_a_strategy_knows_its_options():
    assert STRATEGIES["cad"].takes("max_buffer_bytes") and STRATEGIES["cad"].takes("speeds")
    assert STRATEGIES["usp"].option_names == ["ulysses", "inner_dim"]
    assert not STRATEGIES["cad_greedy"].takes("speeds") and not STRATEGIES["allgather"].option_names
    # arguments common to all strategies do not count as options
    assert not STRATEGIES["cad"].takes("direction") and not STRATEGIES["ring"].takes("cluster")


def test_a_cluster_may_be_a_name_a_file_or_a_spec(tmp_path):
    lengths = [40000, *[500] * 80]
    spec = describe.load("h200-1x2")
    spec.save(tmp_path / "mine.toml")
    shape = dict(strategy="cad", heads=8, kv_heads=2, head_dim=128, dtype="bfloat16")
    clusters = (spec, "h200-1x2", tmp_path / "mine.toml", str(tmp_path / "mine.toml"))
    digests = {
        make_plan(Mask.documents(lengths), Layout.contiguous(lengths, 2), cluster=cluster, **shape).digest
        for cluster in clusters
    }
    assert len(digests) == 1


def test_a_cluster_of_another_size_is_refused():
    with pytest.raises(DistattnError, match="2 x 3 ranks, the layout 4"):
        make_plan(Mask.causal(8), Layout.zigzag([8], 4), strategy="allgather", cluster=Cluster(2, 3), **SHAPE)


def test_packed_documents_travel_far_less_than_a_causal_axis():
    lengths = [50] * 16
    layout = Layout.contiguous(lengths, 8)
    causal, packed = (
        make_plan(mask, layout, strategy="ring", **SHAPE).bytes()["bytes"].sum()
        for mask in (Mask.causal(800), Mask.documents(lengths))
    )
    assert packed == 0 < causal


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_moves_nothing(strategy):
    for mask in masks().values():
        assert not len(make_plan(mask, Layout.zigzag(LENGTHS, 1), strategy=strategy, **SHAPE).bytes()["bytes"])


@pytest.mark.parametrize("mask", ["causal", "full", "documents"])
def test_a_ring_holds_two_foreign_shards_per_rank_and_three_if_ranks_are_skipped(mask):
    inputs = random_inputs(sum(LENGTHS), 8, 2, 8)
    for ranks in (4, 6):
        for layout in layouts(LENGTHS, ranks).values():
            plan = make_plan(masks()[mask], layout, strategy="ring", **SHAPE)
            record = Record()
            run_all_ranks(plan, inputs, "reference", record)
            shard = int(layout.shard_sizes().max()) * SHAPE["kv_heads"] * plan.call.token_head_bytes(Payload.KV)
            # a shard in use, an arriving shard, and a shard kept for a later rank
            for passes in zip(*((program.forward, program.backward) for program in record.programs), strict=True):
                held = [alive_bytes(plan.call, steps, (Payload.KV,)) for steps in passes]
                assert max(held) <= (2 if mask == "full" else 3) * shard and np.mean(held) <= 2.1 * shard


def test_ulysses_splits_uneven_heads_and_replicates_key_value_heads():
    layout = Layout.zigzag(LENGTHS, 4)
    plan = make_plan(masks()["causal"], layout, strategy="ulysses", heads=6, kv_heads=2, head_dim=8, dtype="float64")
    tasks = plan.forward.tasks
    assert sorted(set(zip(tasks["rank"].tolist(), tasks["h0"].tolist(), tasks["h1"].tolist(), strict=True))) == [
        (0, 0, 1),
        (1, 1, 3),
        (2, 3, 4),
        (3, 4, 6),
    ]
    # ranks 0 and 1 share KV head 0, so both receive all of its tokens on other ranks
    for rank in (0, 1):
        assert len(received(plan, Payload.KV, rank)) == sum(LENGTHS) - layout.shard_sizes()[rank]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_moves_are_issued_before_the_compute_they_can_overlap(strategy):
    # use several documents for an all-gather, which has almost no computation on a rank's own keys in a single document
    mask = Mask.documents([4, *[8] * 7, 4]) if strategy == "allgather" else Mask.causal(64)
    plan = make_plan(mask, Layout.zigzag([64], 4), strategy=strategy, **SHAPE)
    record = Record()
    run_all_ranks(plan, random_inputs(64, 8, 2, 8), "reference", record)
    overlapped = 0
    for rank in range(4):
        events = [event for who, event in record.events if who == rank]
        waiting = False
        for event, following in zip(events, [*events[1:], None], strict=True):
            if event == "post":
                # never two steps in flight: next comes this step's compute, or the wait if the step computes nothing
                assert not waiting and following in ("compute", "wait")
                overlapped += following == "compute"
                waiting = True
            elif event == "wait":
                assert waiting
                waiting = False
        assert not waiting
    # a ring overlaps every hop with compute and an all-gather its fetch, but Ulysses has nothing to compute in the
    # meantime
    assert (overlapped > 0) == (strategy != "ulysses")
