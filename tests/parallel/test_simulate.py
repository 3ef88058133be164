"""Simulated times match closed forms. test_functional compares simulated bytes with what gloo carries."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

import distattn as da
from distattn.cluster import spec as describe
from distattn.cluster.cost import attention_speed, flops_per_cell, message_seconds, tiled_area
from distattn.cluster.spec import ClusterSpec, KernelThroughput, Link
from distattn.ir.plan import task_bands
from distattn.parallel.analysis.simulate import simulate

SHAPE = dict(heads=8, kv_heads=4, head_dim=64, dtype="bfloat16")
GIGA = 1e9
TERA = 1e12


def machine(ranks: int, devices: int | None = None, **changes) -> ClusterSpec:
    """Return a cluster whose devices have 1 TFLOP/s for any shape and no launch or copy costs, on a network without
    limits.
    """
    device = replace(
        describe.load("h100-1x8").device, tile=(1, 1), num_sms=1, launch_us=0.0, task_us=0.0, copy_gbs=np.inf
    )
    devices = devices or ranks
    fast = Link(np.inf, 0.0)
    table = tuple(KernelThroughput(direction, 64, n, n, 1.0) for direction in describe.DIRECTIONS for n in (64, 1024))
    return replace(ClusterSpec("test", ranks // devices, devices, device, fast, fast, table), **changes)


def plan_of(strategy, ranks, lengths=(600, 300, 124), devices=None, mask=None, **options):
    mask = mask or da.Mask.documents(list(lengths))
    cluster = da.Cluster(ranks // devices, devices) if devices else None
    return da.make_plan(
        mask, da.Layout.zigzag(list(lengths), ranks), strategy=strategy, cluster=cluster, **SHAPE, **options
    )


@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
def test_without_costs_of_moving_a_pass_takes_the_busiest_ranks_compute(strategy):
    plan = plan_of(strategy, 4)
    timeline = simulate(plan, machine(4))
    for simulated, per_cell in ((timeline.forward, 256.0), (timeline.backward, 640.0)):
        assert simulated.seconds == pytest.approx(plan.area_by_rank().max() * per_cell / TERA, rel=1e-12)
        assert simulated.busy == pytest.approx(plan.area_by_rank() * per_cell / TERA, rel=1e-12)
        assert (simulated.exposed <= 1e-18).all() or strategy == "allgather"


def test_even_steps_of_a_ring_take_the_busiest_ranks_compute():
    mask = da.Mask.full(1024)
    plan = plan_of("ring", 4, [1024], mask=mask)
    assert simulate(plan, machine(4)).forward.seconds == pytest.approx(plan.area_by_rank().max() * 256 / TERA)


def test_a_cluster_without_speeds_cannot_be_simulated():
    with pytest.raises(da.DistattnError, match="simulate needs speeds"):
        simulate(plan_of("ring", 4), da.Cluster(1, 4))


def test_a_single_rank_does_not_wait():
    timeline = simulate(plan_of("ring", 1), machine(1))
    assert timeline.forward.idle[0] == pytest.approx(0) and timeline.forward.exposed[0] == 0
    assert timeline.as_dict()["forward"]["tflops"] == pytest.approx(1.0)


def test_a_rank_that_computes_longer_makes_the_next_one_in_the_ring_wait():
    # rank 1 has nothing to compute at first; its next input leaves rank 0 when rank 0 has started its first step
    plan = plan_of("ring", 2)
    forward = simulate(plan, machine(2)).forward
    ready = np.maximum(forward.computed[:-1], forward.arrived[:-1])
    assert (forward.begin[1:] == ready).all() and forward.seconds == max(
        forward.computed[-1].max(), forward.arrived[-1].max()
    )


def test_messages_share_the_ports_of_both_ends():
    four = machine(4, 2, intra_node=Link(10.0, 1.0), inter_node=Link(1.0, 5.0))
    # two messages leave rank 0, within and across nodes; rank 1 also receives a message from rank 2
    src, dst, size = np.array([0, 0, 2]), np.array([1, 2, 1]), np.array([10, 4, 6]) * GIGA
    assert message_seconds(four, src, dst, size) == pytest.approx([1 + 1e-6, 4 + 5e-6, 6 + 5e-6])
    # rank 1 receives two messages across nodes, each of which takes as long as its port needs for both
    src, dst = np.array([2, 3]), np.array([1, 1])
    assert message_seconds(four, src, dst, size[:2]) == pytest.approx([14 + 5e-6] * 2)
    # a shared link serves all ranks of a node
    shared = machine(4, 2, intra_node=Link(10.0, 0.0), inter_node=Link(1.0, 0.0, shared=True))
    assert message_seconds(shared, np.array([0, 1]), np.array([2, 3]), size[:2]) == pytest.approx([14, 14])


def test_an_all_gather_that_costs_nothing_to_compute_takes_what_the_fullest_port_takes():
    plan = plan_of("allgather", 4)
    fast = tuple(replace(row, tflops=1e30) for row in machine(4).attention)
    timeline = simulate(plan, machine(4, attention=fast, intra_node=Link(2.0, 7.0)))
    moved = plan.forward.moves
    size = (moved["t1"] - moved["t0"]) * (moved["h1"] - moved["h0"]) * 2 * 64 * 2
    fullest = max(np.bincount(moved[end], size, 4).max() for end in ("src", "dst"))
    assert timeline.forward.seconds == pytest.approx(fullest / 2e9 + 7e-6, rel=1e-9)
    assert timeline.forward.intra_node_bytes.sum() == size.sum()


def test_bytes_inside_and_across_nodes_are_the_plans():
    plan = plan_of("usp", 8, devices=4)
    timeline, moved = simulate(plan, machine(8, 4)), plan.bytes()
    crossing = moved["src"] // 4 != moved["dst"] // 4
    assert sum(int(pass_.inter_node_bytes.sum()) for pass_ in timeline.passes) == moved["bytes"][crossing].sum() > 0
    assert sum(int(pass_.intra_node_bytes.sum()) for pass_ in timeline.passes) == moved["bytes"][~crossing].sum()


def test_a_slower_link_or_device_never_makes_a_plan_faster():
    plan = plan_of("double_ring", 8, devices=4)
    times = [
        simulate(plan, machine(8, 4, inter_node=Link(gbs, 1.0))).forward.seconds for gbs in (np.inf, 10, 1, 0.1, 0.01)
    ]
    assert times == sorted(times) and times[-1] > 2 * times[0]


def test_host_time_bounds_a_step():
    slow = replace(machine(4).device, host_us=1e6)
    plan = plan_of("ring", 4)
    assert simulate(plan, machine(4, device=slow)).forward.seconds >= plan.forward.steps


@pytest.mark.parametrize("tile", [(128, 128), (256, 128), (128, 64), (64, 128)])
@pytest.mark.parametrize("lengths", [[4096], [512] * 8, [256] * 16, [3000, 1000, 96]])
def test_tiled_cells_are_those_of_the_tiles_a_mask_touches(lengths, tile):
    mask = da.Mask.documents(lengths)
    plan = da.make_plan(mask, da.Layout.contiguous(lengths, 1), strategy="ring", **SHAPE)
    cells, _ = tiled_area(task_bands(mask, plan.forward.tasks), tile)
    # count one row of tiles at a time, separately per document, since tiles are aligned to the start of a document
    tall, wide = tile
    last_rows = [min(row + tall, length) for length in lengths for row in range(0, length, tall)]
    wanted = sum(tall * -(-last // wide) * wide for last in last_rows)
    assert cells.sum() == pytest.approx(wanted, rel=0.07)


def test_speeds_lie_between_the_points_of_the_table():
    h100 = describe.load("h100-1x8")
    squares = np.array([1024, 3000, 32768, 1 << 20])
    speed = attention_speed(h100, "forward", 128, squares, squares) / TERA
    assert speed[0] == pytest.approx(558) and 672 < speed[1] < 678 and speed[2:] == pytest.approx([701, 701])
    # with fewer keys, the fixed time of a program is a larger share
    short = attention_speed(h100, "forward", 128, np.array([256, 64]), np.array([4096, 4096])) / TERA
    assert 558 / 4 < short[0] < 558 and short[1] < short[0]
    # for a table with a single length, the H100's slowdown at short lengths is used
    b200 = attention_speed(describe.load("b200-1x8"), "forward", 128, squares, squares) / TERA
    assert b200[0] == pytest.approx(1297 * 558 / 701, rel=0.01) and b200[-1] == pytest.approx(1297, rel=0.01)
    grid = tuple(KernelThroughput("forward", 64, q, k, float(q + k)) for q in (128, 512) for k in (128, 512))
    between = attention_speed(machine(1, attention=grid), "forward", 64, np.array([128, 256]), np.array([512, 512]))
    assert between / TERA == pytest.approx([640, 832])
    assert flops_per_cell("forward", 128, 128) == 4 * 128 and flops_per_cell("backward", 128, 128) == 10 * 128


@pytest.mark.parametrize("strategy", ["ring", "allgather", "cad"])
def test_fewer_tokens_take_no_longer(strategy):
    cluster = describe.load("h200-1x8", None)
    shape = dict(heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
    seconds = []
    for tokens in (8, 100, 1000, 4096, 16384):
        plan = da.make_plan(da.Mask.causal(tokens), da.Layout.zigzag([tokens], 8), strategy=strategy, **shape)
        timeline = simulate(plan, cluster)
        seconds.append(timeline.forward.seconds + timeline.backward.seconds)
    # a plan with few pieces may have one step more than a plan with many pieces
    assert all(few < 1.3 * many for few, many in zip(seconds, seconds[1:], strict=False)), seconds
    assert seconds[0] < 2e-3


def test_memory_is_the_proofs_and_everything_is_called_simulated():
    plan = plan_of("ulysses", 4)
    timeline, proof = simulate(plan, machine(4)), da.verify(plan)
    assert (timeline.peak_bytes == np.maximum(proof.forward_peak, proof.backward_peak) + proof.kept).all()
    assert "(simulated)" in str(timeline) and timeline.as_dict()["simulated"] is True
    json.dumps(timeline.as_dict())
    trace = timeline.perfetto()["traceEvents"]
    assert all("simulated" in event["args"]["name"] for event in trace if event["ph"] == "M")
    spans = [event for event in trace if event["ph"] == "X"]
    ends = max(event["ts"] + event["dur"] for event in spans)
    assert ends == pytest.approx((timeline.forward.seconds + timeline.backward.seconds) * 1e6)


def test_a_proof_at_hand_is_taken_and_another_plans_refused():
    plan = plan_of("ring", 4)
    assert simulate(plan, machine(4), da.verify(plan)).as_dict() == simulate(plan, machine(4)).as_dict()
    with pytest.raises(da.DistattnError, match="the proof belongs to another plan"):
        simulate(plan, machine(4), da.verify(plan_of("usp", 4)))


def test_a_cluster_of_another_size_is_refused():
    with pytest.raises(da.DistattnError, match="the plan has 4 ranks, h100-1x8 1 x 8 devices"):
        simulate(plan_of("ring", 4), "h100-1x8")


def test_a_million_tokens_are_timed_in_a_moment():
    n, took = 1 << 20, {}
    for ranks, strategy in ((64, "ring"), (64, "usp"), (64, "allgather")):
        cluster = da.Cluster(ranks // 8, 8)
        shape = dict(heads=64, kv_heads=8, head_dim=128, dtype="bfloat16")
        plan = da.make_plan(
            da.Mask.causal(n), da.Layout.zigzag([n], ranks), strategy=strategy, cluster=cluster, **shape
        )
        began = time.thread_time()
        simulate(plan, "h200-8x8")
        took[strategy] = time.thread_time() - began
    # seconds of CPU time, measured while other tests run; the target is 0.3 s
    assert max(took.values()) < 1.0, took
