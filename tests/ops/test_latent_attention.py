"""Latent attention over ranks matches attention on expanded keys and values, and moves only latents."""

import functools

import pytest
import torch
from oracle import Inputs, dense
from processes import run_on_ranks, sum_gradients
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import distattn as da
from distattn.cluster.spec import load
from distattn.ir.op import latent_op
from distattn.ir.plan import Payload
from distattn.parallel.latent_plan import latent_seconds

LENGTHS = (5, 40, 1, 30)
HEADS, NOPE, ROPE, LATENT, VALUE = 4, 6, 2, 10, 5


def plan_of(layout, strategy, dtype="float64", **changes):
    shape = dict(
        heads=HEADS, kv_heads=1, head_dim=NOPE + ROPE, v_head_dim=VALUE, dtype=dtype, op=latent_op(ROPE, LATENT)
    )
    return da.make_plan(da.Mask.documents(LENGTHS), layout, strategy=strategy, **shape | changes)


def inputs():
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    shapes = (n, HEADS, NOPE + ROPE), (n, ROPE), (n, LATENT), (HEADS, NOPE + VALUE, LATENT), (n, HEADS, VALUE)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_definition():
    """Compute (o, dq, drope, dlatent, dup) by definition on one device."""
    q, rope, latent, up, do = inputs()
    leaves = [x.requires_grad_() for x in (q, rope, latent, up)]
    expanded = torch.einsum("sl,hel->she", latent, up)
    k, v = torch.cat([expanded[..., :NOPE], rope[:, None].expand(-1, HEADS, -1)], -1), expanded[..., NOPE:]
    result = dense(da.Mask.documents(LENGTHS), Inputs(q, k, v, do))
    grads = torch.autograd.grad([k, v], leaves[1:], [result.dk, result.dv])
    return result.o, result.dq, *grads


def attend(rank, ranks, strategies):
    results = []
    for strategy, expanded in strategies:
        layout = da.Layout.zigzag(LENGTHS, ranks)
        q, rope, latent, up, do = inputs()
        module = torch.nn.Module()
        module.up = torch.nn.Parameter(up)
        local = [layout.shard(x, rank).requires_grad_() for x in (q, rope, latent)]
        form = dict(op="attention", kv_heads=HEADS) if expanded else {}
        o = da.latent_attention(*local, module.up, plan_of(layout, strategy, **form))
        o.backward(layout.shard(do, rank))
        sum_gradients(module)
        results.append((o.detach(), *(x.grad for x in local), module.up.grad))
    return results


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_equal_attention_on_expanded_keys_and_values(ranks):
    # either latents move, or keys and values expanded by their owners
    strategies = [
        ("ring", False),
        ("allgather", False),
        ("ulysses", False),
        ("cad", False),
        ("ring", True),
        ("ulysses", True),
    ]
    results = run_on_ranks(ranks, attend, ranks, strategies)
    layout, wanted = da.Layout.zigzag(LENGTHS, ranks), by_definition()
    for of_ranks in zip(*results, strict=True):
        *by_token, dup = zip(*of_ranks, strict=True)
        for got, right in zip([*(layout.unshard(list(parts)) for parts in by_token), dup[0]], wanted, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-11)


# DeepSeek-V3: head dims 192 and 128, and a latent of 512 plus 64 rotary dims
V3 = dict(head_dim=192, v_head_dim=128, dtype="bfloat16")


# all heads of a layer, and one rank's heads with 4-way tensor parallelism
@pytest.mark.parametrize("heads, factor", [(128, 71.1), (32, 17.8)])
def test_only_latents_move(heads, factor):
    layout, mask = da.Layout.zigzag((4096,), 8), da.Mask.causal(4096)
    shape = dict(heads=heads, strategy="allgather", **V3)
    expanded = da.make_plan(mask, layout, kv_heads=heads, **shape)
    latents = da.make_plan(mask, layout, kv_heads=1, op=latent_op(64, 512), **shape)
    da.verify(latents)
    keys = [int(p.bytes()["bytes"][p.bytes()["payload"] == Payload.KV].sum()) for p in (expanded, latents)]
    assert keys[0] == keys[1] * heads * (192 + 128) // 576
    assert keys[0] / keys[1] == pytest.approx(factor, rel=0.01)


def test_the_faster_form_is_planned():
    tokens, widths = 1 << 17, dict(rotary_dim=64, latent_dim=512)
    mask, ops = da.Mask.causal(tokens), {}
    for name in ("h100-1x8", "h100-8x8"):
        cluster = load(name)
        for strategy in ("ring", "allgather", "ulysses"):
            shape = dict(heads=128, cluster=cluster, strategy=strategy, **V3)
            layout = da.Layout.zigzag((tokens,), cluster.ranks)
            forms = [
                da.make_plan(mask, layout, kv_heads=kv_heads, op=op, **shape)
                for kv_heads, op in ((1, latent_op(64, 512)), (128, "attention"))
            ]
            chosen = da.make_latent_plan(mask, layout, **shape, **widths)
            seconds = [latent_seconds(plan, cluster, 64, 512) for plan in (*forms, chosen)]
            assert seconds[2] == min(seconds)
            ops[name, strategy] = chosen.call.op.name
    # ring hides all messages within a node but not between nodes, and Ulysses has few heads per rank when there are
    # many ranks
    assert ops["h100-1x8", "ring"] == "attention" and ops["h100-8x8", "ring"] == "latent_attention"
    assert ops["h100-1x8", "allgather"] == ops["h100-8x8", "allgather"] == "latent_attention"
    assert ops["h100-1x8", "ulysses"] == "latent_attention" and ops["h100-8x8", "ulysses"] == "attention"
    # if speeds are unknown, bytes decide
    layout = da.Layout.zigzag((4096,), 128)
    settings = dict(heads=128, **V3, **widths)
    for strategy, op in (("allgather", "latent_attention"), ("ulysses", "attention")):
        plan = da.make_latent_plan(da.Mask.causal(4096), layout, strategy=strategy, **settings)
        assert plan.call.op.name == op


def test_wrong_arguments_are_refused_by_name():
    layout = da.Layout.contiguous(LENGTHS, 1)
    q, rope, latent, up, _ = inputs()
    with pytest.raises(da.DistattnError, match="up has shape"):
        da.latent_attention(q, rope, latent, up[:, 1:], plan_of(layout, "ring"))
    with pytest.raises(da.DistattnError, match="not of latent attention"):
        da.latent_attention(q, rope, latent, up, plan_of(layout, "ring", op="attention", v_head_dim=8))
    with pytest.raises(da.DistattnError, match="not of attention"):
        da.attention(q, rope[:, None], latent[:, None], plan_of(layout, "ring"))


def test_a_selective_checkpoint_does_not_attend_again():
    layout = da.Layout.contiguous(LENGTHS, 1)
    *leaves, _ = (x.requires_grad_() for x in inputs())
    ready, passes = da.prepare(plan_of(layout, "ring")), []
    begin = ready.begin_pass
    ready.begin_pass = lambda *args: (passes.append(args[0]), begin(*args))
    context = functools.partial(create_selective_checkpoint_contexts, da.save_attention)
    layer = lambda q, *others: da.latent_attention(q * 2, *others, ready)  # noqa: E731
    plain = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    out = checkpoint(layer, *leaves, use_reentrant=False, context_fn=context)
    for a, b in zip(plain, torch.autograd.grad(out.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    assert passes == ["forward", "backward"] * 2
