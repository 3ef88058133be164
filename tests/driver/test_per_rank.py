"""Ranks that share attention over their own documents train as a single process would."""

import time

import pytest
import torch
import torch.distributed as dist
from imitated_nccl import by_rules
from packs_of_ranks import PACKS, documents, loader, model_of, shared, trained, whole_run
from processes import run_on_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parameters_to_vector

import distattn as da
from distattn.adapters.pytorch import local_loss
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.driver.rank_speeds import quantised
from distattn.ops import executable
from distattn.parallel.make_plan import STRATEGIES

pytestmark = pytest.mark.sampled(3)


def pooled_run(rank, options, dtype="float64", data=None):
    model = model_of(dtype=dtype)
    with shared(**options) as cp:
        out = [trained(model, step) for step in cp.steps(loader(data if data is not None else rank))]
        return out, cp.speeds.log if cp.speeds else None


def assert_same(got, wanted, tolerance):
    assert len(got) == len(wanted)
    for (loss, gradient), (wanted_loss, wanted_gradient) in zip(got, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=tolerance)
        assert (gradient - wanted_gradient).abs().max() <= tolerance * wanted_gradient.abs().max()


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.1])
def test_losses_and_gradients_match_one_process(ranks, tolerance):
    options = dict(options=dict(tolerance=tolerance, block=8))
    results = run_on_ranks(ranks, pooled_run, options)
    for result, _ in results:
        assert_same(result, whole_run(ranks), 1e-11)


@pytest.mark.parametrize("rules", ["gloo", "nccl"])
def test_in_single_precision_too(rules):
    for result, _ in run_on_ranks(4, by_rules(rules, pooled_run), dict(options=dict(block=8)), "float32"):
        assert_same(result, whole_run(4, "float32"), 1e-5)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("rules", ["gloo", "nccl"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_strategy_can_distribute_a_pool(strategy, rules):
    for result, _ in run_on_ranks(2, by_rules(rules, pooled_run), dict(strategy=strategy)):
        assert_same(result, whole_run(2), 1e-11)


def windowed_run(rank):
    """Return the losses and gradients of four ranks together, and those of the same data on single-rank groups."""
    options = dict(document_mask=(11, 0), options=dict(block=8, tolerance=0.0), kernel="reference")
    together, _ = pooled_run(rank, options)
    alone = dist.new_group([rank], use_local_synchronization=True)
    steps = []
    for step in range(max(map(len, PACKS[:4]))):
        steps.append(
            [documents(r, step, n) for r in range(4) if step < len(PACKS[r]) for n in range(len(PACKS[r][step]))]
        )
    model, apart = model_of(), []
    with shared(group=alone, **options) as cp:
        for micro_batches in cp.steps(steps):
            total = 0.0
            for batch in micro_batches:
                loss = local_loss(model, batch)
                loss.backward()
                total += float(loss.detach())
            apart.append((total, parameters_to_vector([p.grad for p in model.parameters()])))
            model.zero_grad()
    return together, apart


@pytest.mark.full
def test_windows_inside_documents_are_pooled_too():
    for together, apart in run_on_ranks(4, windowed_run):
        assert_same(together, apart, 1e-11)


def sampled_run(rank):
    proven = []
    verify = executable.verify
    executable.verify = lambda plan, *rest: proven.append(plan.digest) or verify(plan, *rest)
    pooled_run(rank, dict(verify_every=3, options=dict(block=8)))
    return len(set(proven))


def test_the_first_and_every_nth_plan_of_a_run_are_proven():
    # three steps of 3, 2 and 2 micro-batches have 7 plans, of which plans 0, 3 and 6 are proven
    assert run_on_ranks(4, sampled_run) == [3] * 4


def test_a_capacity_is_the_planners_too():
    with pytest.raises(AssertionError, match="Raise max_buffer_bytes or tolerance"):
        run_on_ranks(2, pooled_run, dict(max_buffer_bytes=1000, options=dict(block=8, tolerance=0.0)))


def cp_run(rank, options):
    return pooled_run(rank, options, data=rank // 2)


@pytest.mark.parametrize("layout", ["zigzag", "balanced"])
def test_context_parallel_ranks_share_one_batch(layout):
    options = dict(context_parallel_size=2, layout=layout, options=dict(block=8))
    for result, _ in run_on_ranks(4, cp_run, options):
        assert_same(result, whole_run(2), 1e-11)


def served_run(rank, servers, wrap, options):
    """Train a checkpointed or FSDP2 model, and evaluate after every step. The last `servers` ranks only serve."""
    models = dist.get_world_size() - servers
    trainers = dist.new_group(list(range(models)))
    if rank >= models:
        return tuple(da.serve())
    model = model_of()
    if wrap == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    if wrap == "fsdp":
        mesh = DeviceMesh.from_group(trainers, "cpu")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    out, evaluated = [], []
    with shared(servers=servers, **options) as cp:
        for micro_batches in cp.steps(loader(rank)):
            total = torch.zeros((), dtype=torch.float64)
            for batch in micro_batches:
                loss = local_loss(model, batch)
                loss.backward()
                total += loss.detach()
            dist.all_reduce(total, group=trainers)
            if wrap == "fsdp":
                # FSDP2 averages gradients over the ranks with a model; make the mean a sum
                gradient = parameters_to_vector([p.grad.full_tensor() for p in model.parameters()]) * models
            else:
                gradient = parameters_to_vector([p.grad for p in model.parameters()])
                dist.all_reduce(gradient, group=trainers)
            out.append((float(total), gradient))
            model.zero_grad()
        with torch.no_grad():
            for micro_batches in cp.steps(loader(rank)):
                total = sum(local_loss(model, batch) for batch in micro_batches)
                dist.all_reduce(total, group=trainers)
                evaluated.append(float(total))
    return out, evaluated


@pytest.mark.sampled(10)
@pytest.mark.parametrize(
    ("wrap", "rules"), [("plain", "gloo"), ("plain", "nccl"), ("checkpoint", "gloo"), ("fsdp", "gloo")]
)
@pytest.mark.parametrize("servers", [1, 2])
def test_ranks_without_a_model_serve(servers, wrap, rules):
    options = dict(options=dict(block=8, tolerance=0.0))
    *results, served = run_on_ranks(2 + servers, by_rules(rules, served_run), servers, wrap, options)
    wanted = whole_run(2)
    for result, evaluated in results[:2]:
        assert_same(result, wanted, 1e-11)
        assert evaluated == pytest.approx([loss for loss, _ in wanted], rel=1e-11)
    # 2 layers, and 3 + 1 + 1 micro-batches in three steps, trained and evaluated
    passes = 2 * 5
    assert served[1] == passes
    assert served[0] == passes * (3 if wrap == "checkpoint" else 2)


def leaving_run(rank, adaptive):
    """Leave a training loop by `break`, start a new loop, and evaluate inside it."""
    trainers = dist.new_group([0, 1])
    if rank == 2:
        return tuple(da.serve())
    model, out = model_of(), []
    with shared(servers=1, adaptive=adaptive, options=dict(block=8, tolerance=0.0)) as cp:
        for micro_batches in cp.steps(loader(rank)):
            local_loss(model, micro_batches[0]).backward()
            model.zero_grad()
            break
        for micro_batches in cp.steps(loader(rank)):
            with torch.no_grad():
                for others in cp.steps(loader(rank)):
                    for batch in others:
                        local_loss(model, batch)
            out.append(trained(model, micro_batches, trainers))
        return out, cp.speeds.log if cp.speeds else None


@pytest.mark.parametrize("adaptive", [False, True])
def test_loops_may_be_left_and_nested_while_others_serve(adaptive):
    *results, served = run_on_ranks(3, leaving_run, adaptive)
    for result, log in results:
        assert_same(result, whole_run(2), 1e-11)
        assert log == results[0][1]
    assert served[1] == 2 * (1 + 5)


def hoarding_run(rank):
    if rank == 1:
        return tuple(da.serve())
    model = model_of()
    with shared(servers=1) as cp:
        steps = list(cp.steps(loader(0)))
        with pytest.raises(da.DistattnError, match="a step that is over"):
            local_loss(model, steps[0][0])
    return None


def test_batches_of_a_step_that_is_over_are_refused_with_servers():
    run_on_ranks(2, hoarding_run)


def idle_run(rank):
    if rank == 1:
        return tuple(da.serve())
    model = model_of()
    with shared(servers=1, timeout=20.0) as cp:
        for number, micro_batches in enumerate(cp.steps(loader(0))):
            # like an evaluation or a checkpoint, this takes longer than the time-out for an unresponsive rank
            time.sleep(22 if number == 1 else 0)
            for batch in micro_batches:
                local_loss(model, batch).backward()
    return None


@pytest.mark.full
def test_servers_wait_for_ranks_that_live_however_long_they_are_silent():
    assert run_on_ranks(2, idle_run)[1] == (2 * 4, 2 * 4)


def replicas_run(rank, data):
    """Return (number of micro-batches, loss, gradients) of each step. The second pair of ranks has fewer steps and
    micro-batches.
    """
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    settings = dict(strategy="ring") if data == "replicated" else dict(options=dict(block=8))
    model, out = model_of(), []
    with shared(group=pairs[rank // 2], loss_group=dist.group.WORLD, data=data, **settings) as cp:
        mine = rank // 2 if data == "replicated" else rank
        for micro_batches in cp.steps(loader(mine)):
            out.append((len(micro_batches), *trained(model, micro_batches)))
    return out


@pytest.mark.parametrize("data", ["replicated", "per_rank"])
def test_replicas_may_have_unequal_numbers_of_steps_and_micro_batches(data):
    blocks = 2 if data == "replicated" else 4
    wanted = whole_run(blocks)
    # every rank runs as many micro-batches as the rank with the most
    most = [max(len(steps[s : s + 1] and steps[s]) for steps in PACKS[:blocks]) for s in range(len(wanted))]
    for result in run_on_ranks(4, replicas_run, data):
        assert [count for count, *_ in result] == most
        assert_same([pair for _, *pair in result], wanted, 1e-11)


def unequal_run(rank):
    cp = shared(context_parallel_size=2)
    next(cp.steps([documents(rank, 0, 0)]))


def test_ranks_of_one_block_with_different_batches_are_refused():
    with pytest.raises(AssertionError, match="rank 1 holds another batch than rank 0"):
        run_on_ranks(2, unequal_run)


def unlike_run(rank):
    if rank == 2:
        return tuple(da.serve())
    return shared(servers=1, timeout=5.0 + rank)


def test_a_pool_made_differently_is_refused():
    with pytest.raises(AssertionError, match=r"rank 1 has timeout = 6.0, rank 0 5.0"):
        run_on_ranks(3, unlike_run)


def test_speeds_are_whole_steps_of_the_mean():
    assert quantised([None, None]) is None
    assert quantised([100.0, 100.0, None, 200.0]) == [750, 750, 1000, 1500]
    assert quantised([1e-9, 1.0, 1.0]) == [250, 1500, 1500]


def adaptive_run(rank, adaptive):
    options = dict(options=dict(block=8, tolerance=0.0))
    pool_options = dict(adaptive=adaptive, **options)
    torch.manual_seed(0)
    return pooled_run(rank, pool_options)


@pytest.mark.full
def test_measured_speeds_are_applied_two_steps_later_and_a_log_replays_the_run():
    results = run_on_ranks(4, adaptive_run, True)
    wanted = whole_run(4)
    logs = [log for _, log in results]
    assert all(log == logs[0] for log in logs)
    # speeds are unknown in the first two steps
    assert logs[0][:2] == [None, None] and len(logs[0]) == len(wanted) and all(logs[0][2:])
    for result, _ in results:
        assert_same(result, wanted, 1e-11)
    replayed = run_on_ranks(4, adaptive_run, logs[0])
    for (result, log), (again, _) in zip(results, replayed, strict=True):
        assert log == logs[0]
        for (loss, gradient), (same_loss, same_gradient) in zip(result, again, strict=True):
            assert loss == same_loss and torch.equal(gradient, same_gradient)


@pytest.mark.full
def test_without_adapting_a_run_is_bitwise_the_same():
    first, second = (run_on_ranks(4, adaptive_run, False) for _ in range(2))
    for (result, _), (again, _) in zip(first, second, strict=True):
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(result, again, strict=True))


def test_a_single_process_is_its_own_pool():
    cp = shared(options=dict(block=8))
    ((batch, empty), *_) = [*cp.steps([[documents(0, 0, 0), documents(0, 0, 1)]])]
    assert batch["input_ids"].shape == (1, 150) and empty["input_ids"].shape == (1, 49)
    cp.close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(servers=1), "servers must be 0 to 0"),
        (dict(context_parallel_size=2), "context_parallel_size 2 does not divide"),
        (dict(adaptive=True, strategy="ring"), "does not distribute work by speed"),
        (dict(layout="spiral"), "layout 'spiral'"),
        (dict(verify_every=0), "verify_every: must be at least 1, not 0"),
    ],
)
def test_impossible_pools_are_refused(options, sentence):
    with pytest.raises(da.DistattnError, match=sentence):
        shared(**options).close()


def test_labels_of_ranks_without_data_do_not_count():
    cp = shared()
    (micro_batches,) = cp.steps([documents(0, 0, 0)])
    assert micro_batches[0]["loss_scale"] == 1 / 149
    assert (micro_batches[0]["labels"] != IGNORE_INDEX).sum() == 149
    cp.close()
