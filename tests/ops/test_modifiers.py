"""Sinks, soft-capping, ALiBi and gates: outputs and gradients are right in every strategy, or the call is refused."""

import math

import pytest
import torch
from cases import LENGTHS, layouts, masks
from oracle import random_inputs, relative_error
from processes import run_on_ranks

import distattn as da
from distattn.parallel.make_plan import STRATEGIES

pytestmark = pytest.mark.sampled(4)

HEADS, KV_HEADS, N = 4, 2, sum(LENGTHS)


def modifiers(softcap=True, alibi=True, sink=True, gate=(HEADS, 8)):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "softcap": 1.5 if softcap else 0.0,
        "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0], dtype=torch.float64) if alibi else None,
        "sink": random(HEADS) if sink else None,
        "gate": torch.sigmoid(random(N, *gate)) if gate else None,
    }


def oracle(mask, inputs, softcap, alibi_slopes, sink, gate):
    """Compute (o, lse, dq, dk, dv, dsink, dgate) by definition over the entire token axis."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    extra = [x.detach().requires_grad_() for x in (sink, gate) if x is not None]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KV_HEADS, 1)) / math.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        at = torch.arange(N, dtype=torch.float64)
        scores = scores - alibi_slopes[:, None, None] * (at[:, None] - at).abs()
    allowed = torch.from_numpy(mask.dense()).expand(HEADS, -1, -1)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, extra[0][:, None, None].expand(-1, N, 1)], -1)
    lse = torch.logsumexp(scores, -1)
    empty = torch.isinf(scores).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1) * ~empty
    o = torch.einsum("hqk,khd->qhd", weights[..., :N], v.repeat_interleave(HEADS // KV_HEADS, 1))
    if gate is not None:
        o = o * (extra[-1] if extra[-1].dim() == 3 else extra[-1][..., None])
    grads = torch.autograd.grad(o, (q, k, v, *extra), inputs.do)
    return [o.detach(), lse.detach().t(), *grads]


def _on_rank(rank, plan, inputs, kernel, modified):
    layout = plan.call.layout
    q, k, v = (layout.shard(x, rank).requires_grad_() for x in inputs[:3])
    modified = {name: x.clone() if torch.is_tensor(x) else x for name, x in modified.items()}
    sink, gate = modified["sink"], modified["gate"]
    if gate is not None:
        gate = modified["gate"] = layout.shard(gate, rank).requires_grad_()
    if sink is not None:
        sink.requires_grad_()
    o, lse_HT = da.attention(q, k, v, plan, kernel=kernel, return_lse=True, **modified)
    o.backward(layout.shard(inputs.do, rank))
    return [o.detach(), lse_HT.detach().t(), q.grad, k.grad, v.grad], *(x.grad for x in (sink, gate) if x is not None)


def check(plan, mask, kernel, modified):
    inputs = random_inputs(N, HEADS, KV_HEADS, 8)
    results = run_on_ranks(plan.call.ranks, _on_rank, plan, inputs, kernel, modified)
    layout = plan.call.layout
    got = [layout.unshard(list(parts)) for parts in zip(*(result[0] for result in results), strict=True)]
    if modified["sink"] is not None:
        # each rank returns its tokens' share of the sink's gradient, so sum the shares
        got.append(sum(result[1] for result in results))
    if modified["gate"] is not None:
        got.append(layout.unshard([result[-1] for result in results]))
    names = ("o", "lse", "dq", "dk", "dv", "dsink", "dgate")
    for name, a, b in zip(names, got, oracle(mask, inputs, **modified), strict=False):
        assert relative_error(a, b) < 1e-11, name


def plan_for(strategy, mask, layout, ranks=4):
    shape = dict(heads=HEADS, kv_heads=KV_HEADS, head_dim=8, dtype="float64")
    return da.make_plan(mask, layouts(LENGTHS, ranks)[layout], strategy=strategy, **shape)


@pytest.mark.parametrize("layout", layouts(LENGTHS, 4))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_modifiers_together_equal_the_oracle(strategy, layout):
    for mask in (masks()["documents"], masks()["odd"]):
        check(plan_for(strategy, mask, layout), mask, "reference", modifiers())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sinks_and_gates_need_no_support_by_the_kernel(strategy):
    modified = modifiers(softcap=False, alibi=False, gate=(HEADS,))
    check(plan_for(strategy, masks()["documents"], "zigzag"), masks()["documents"], "cpu", modified)


@pytest.mark.parametrize("modifier", ["softcap", "alibi", "sink", "gate"])
def test_each_modifier_alone_equals_the_oracle(modifier):
    absent = dict(softcap=False, alibi=False, sink=False, gate=())
    modified = modifiers(**absent | {modifier: (HEADS, 8) if modifier == "gate" else True})
    check(plan_for("ring", masks()["odd"], "document_zigzag", 2), masks()["odd"], "reference", modified)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(dropout=0.1), "dropout 0.1 is not computed"),
        (dict(softcap=-1.0), "softcap must be a positive number"),
        (dict(softcap=2.0), "no soft-capping and no ALiBi"),
        (dict(alibi_slopes=torch.ones(4)), 'no soft-capping and no ALiBi slopes. Use kernel="reference"'),
        (dict(alibi_slopes=torch.ones(4, requires_grad=True)), "require a gradient"),
        (dict(sink=torch.ones(3)), r"sink has shape \(3,\); the plan needs \(4,\) \(heads,\)"),
        (dict(sink=torch.ones(4, dtype=torch.int64)), "floating point is needed"),
        (dict(gate=torch.ones(200, 4, dtype=torch.int64)), "gate is int64; floating point"),
        (dict(scale=torch.tensor(0.3)), "scale must be a number"),
        (dict(gate=torch.ones(200, 3)), r"gate has shape \(200, 3\)"),
    ],
)
def test_calls_that_cannot_be_computed_are_refused(change, sentence):
    plan = plan_for("ring", masks()["causal"], "zigzag", 1)
    q, k, v, _ = random_inputs(N, HEADS, KV_HEADS, 8)
    with pytest.raises(da.DistattnError, match=sentence):
        da.attention(q, k, v, plan, **change)


def test_a_sink_of_minus_infinity_has_no_effect():
    plan = plan_for("ring", masks()["odd"], "zigzag", 1)
    q, k, v, do = (x.requires_grad_() for x in random_inputs(N, HEADS, KV_HEADS, 8))
    sink = torch.full((HEADS,), -torch.inf, dtype=torch.float64, requires_grad=True)
    o = da.attention(q, k, v, plan, sink=sink)
    assert torch.equal(o, da.attention(q, k, v, plan))
    o.backward(do)
    assert (sink.grad == 0).all() and torch.isfinite(q.grad).all()


def test_a_gate_of_another_dtype_leaves_the_output_in_the_queries_dtype():
    shape = dict(heads=4, kv_heads=2, head_dim=8, dtype="bfloat16")
    plan = da.make_plan(da.Mask.causal(9), da.Layout.zigzag([9], 1), strategy="ring", **shape)
    q, k, v, _ = (x.bfloat16() for x in random_inputs(9, 4, 2, 8))
    assert da.attention(q, k, v, plan, gate=torch.rand(9, 4)).dtype == torch.bfloat16
