"""With a buffer limit, heads are computed in chunks: proven, correct, smaller, and refused if no chunks fit."""

import pytest
import torch
from cases import LENGTHS, all_masks, layouts
from oracle import assert_close, dense, random_inputs, run_all_ranks

import distattn as da
from distattn.ir.errors import PlanError
from distattn.ir.plan import POLICIES, Plan
from distattn.parallel.analysis.simulate import simulate
from distattn.parallel.analysis.verify import verify
from distattn.parallel.make_plan import STRATEGIES, make_plan

TOKENS = 1 << 20


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def needed(plan: Plan) -> int:
    proof = verify(plan)
    return int(max(proof.forward_peak.max(), proof.backward_peak.max()))


def least(strategy, mask, layout, **shape):
    """Return the smallest possible buffer size of a plan in bytes, taken from the error for a limit of 0 bytes."""
    with pytest.raises(PlanError, match=f"^{strategy}: a rank needs at least [0-9,]+ bytes of buffers") as refused:
        make_plan(mask, layout, strategy=strategy, max_buffer_bytes=0, **shape)
    return int(str(refused.value).split(" bytes")[0].rpartition(" ")[2].replace(",", ""))


HEADS = [(8, 2), (8, 8), (6, 2)]
MASKS = ["documents", "head groups", "odd", "window"]
WAYS = [*({"backward": policy} for policy in POLICIES), {"working_layout": "contiguous"}]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_and_gradients_of_chunks_equal_the_oracle(strategy, mask, heads):
    dense_mask = all_masks(heads[0])[mask]
    inputs = random_inputs(sum(LENGTHS), *heads, 8)
    wanted = dense(dense_mask, inputs)
    # run half of the ways, and half of those on three ranks; the next mask, heads or strategy runs the other half
    turn = MASKS.index(mask) + HEADS.index(heads) + list(STRATEGIES).index(strategy)
    for number, way in list(enumerate(WAYS, turn))[turn % 2 :: 2]:
        ranks, layout = ((3, "from_chunks"), (4, "balanced"))[number // 2 % 2]
        laid_out = layouts(LENGTHS, ranks)
        shape = dict(heads=heads[0], kv_heads=heads[1], head_dim=8, dtype="float64")
        shape["cluster"] = da.Cluster(2, 2) if ranks == 4 else None
        how = {name: laid_out[value] if name == "working_layout" else value for name, value in way.items()}
        whole = make_plan(dense_mask, laid_out[layout], strategy=strategy, **shape, **how)
        if whole.policy != "keep" and not whole.forward.moves["step"].size:
            continue
        smallest = least(strategy, dense_mask, laid_out[layout], **shape, **how)
        plan = make_plan(dense_mask, laid_out[layout], strategy=strategy, max_buffer_bytes=smallest, **shape, **how)
        assert needed(plan) == smallest
        assert_close(run_all_ranks(plan, inputs, "cpu"), wanted, 1e-11)


# a million tokens in bf16 on 8 ranks with 32:8 heads: (GB of buffers without a limit, smallest possible GB). A limit
# does not increase the simulated time
BUFFERS = {"ring": (4.3, 0.54), "allgather": (11.3, 1.9), "ulysses": (2.82, 2.36), "usp": (2.82, 2.36)}


def million(strategy, kv_heads=8, **how):
    shape = dict(heads=32, kv_heads=kv_heads, head_dim=128, dtype="bfloat16")
    return make_plan(da.Mask.causal(TOKENS), da.Layout.zigzag([TOKENS], 8), strategy=strategy, **shape, **how)


@pytest.mark.parametrize("strategy", BUFFERS)
def test_buffers_of_a_million_tokens_shrink_and_the_simulated_time_does_not_grow(strategy):
    whole = million(strategy)
    for plan, most in ((whole, BUFFERS[strategy][0]), (million(strategy, max_buffer_bytes=int(2.4e9)), 2.4)):
        assert needed(plan) <= most * 1e9
    smallest = int(BUFFERS[strategy][1] * 1e9)
    cut = million(strategy, max_buffer_bytes=smallest)
    assert needed(cut) <= smallest
    seconds = [
        sum(pass_.seconds for pass_ in (run.forward, run.backward))
        for run in (simulate(whole, "h100-1x8"), simulate(cut, "h100-1x8"))
    ]
    assert seconds[1] <= 1.01 * seconds[0]


def test_ulysses_in_chunks_of_heads_has_a_quarter_of_the_buffers():
    # each rank has four of the 32 KV heads. The buffers include results that arrive at their owners
    whole, cut = million("ulysses", 32, backward="refetch-home"), million("ulysses", 32, max_buffer_bytes=int(1.7e9))
    assert needed(whole) == 4 * needed(cut)
    assert cut.policy == "refetch-home" and cut.forward.steps == 12
    # overlapping chunks need more memory, and are preferred where it suffices
    assert million("ulysses", 32, max_buffer_bytes=int(4.1e9)).forward.steps == 6


def test_a_limit_that_is_met_changes_nothing():
    assert million("ulysses").digest == million("ulysses", max_buffer_bytes=10**11).digest
    assert million("ulysses").policy == "keep"


def test_a_driver_with_a_limit_cuts_and_computes_the_same():
    ids = torch.arange(60)[None]
    batch = {"input_ids": ids, "document_lengths": [25, 35]}
    with da.ContextParallel(strategy="ring", kernel="reference", max_buffer_bytes=10) as cp:
        assert cp.shard(batch)["input_ids"].shape == (1, 60)
