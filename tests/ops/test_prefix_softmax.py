"""`prefix_softmax` on real ranks matches dense softmaxes over the tokens so far: outputs, final states and all
gradients.
"""

import functools
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from processes import run_on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import distattn as da

LENGTHS = (1, 37, 200, 2, 62)
HEADS, LATENTS, VALUES = 2, 3, 4


class Case(NamedTuple):
    """Per-token weights, logits and values, the documents' initial state, and the gradients of outputs and final sums."""

    weights: Tensor
    logits: Tensor
    v: Tensor
    initial: da.PrefixSoftmaxState
    do: Tensor
    dtotal: Tensor
    dweighted: Tensor

    def to(self, dtype):
        state = da.PrefixSoftmaxState(*(y.to(dtype) for y in self.initial))
        return Case(*(state if y is self.initial else y.to(dtype) for y in self))


class Result(NamedTuple):
    o: Tensor
    final: da.PrefixSoftmaxState
    gradients: list[Tensor]


def case_of(strength=1.0, seed=0, earlier=True):
    """Return a random case. strength: scale of the logits. earlier: all documents except the second continue from a
    state.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, m = sum(LENGTHS), len(LENGTHS)
    weights, logits, v = normal(n, HEADS, LATENTS).softmax(-1), normal(n, HEADS, LATENTS), normal(n, HEADS, VALUES)
    maximum, total = strength * normal(m, HEADS, LATENTS), 1 + normal(m, HEADS, LATENTS).abs()
    weighted = normal(m, HEADS, LATENTS, VALUES)
    begins = torch.ones(m, dtype=torch.bool) if not earlier else torch.arange(m) == 1
    maximum[begins], total[begins], weighted[begins] = -torch.inf, 0, 0
    initial = da.PrefixSoftmaxState(maximum, total, weighted)
    return Case(
        weights, strength * logits, v, initial, normal(n, HEADS, VALUES), normal(*total.shape), normal(*weighted.shape)
    )


def dense(case):
    """Compute softmaxes over all earlier tokens and one token that represents the state, document by document."""
    weights, logits, v, total, weighted = leaves = [
        y.clone().requires_grad_() for y in (case.weights, case.logits, case.v, *case.initial[1:])
    ]
    o, finals = [], []
    of_documents = zip(
        *(y.split(LENGTHS) for y in (weights, logits, v)), case.initial.maximum, total, weighted, strict=True
    )
    for w, k, values, m0, z0, n0 in of_documents:
        # (rows, tokens, heads, latents)
        seen = torch.ones(len(w), len(w), dtype=torch.bool).tril()
        every = k[None].expand(len(w), -1, -1, -1).masked_fill(~seen[..., None, None], -torch.inf)
        maximum = torch.maximum(every.detach().amax(1), m0)
        parts, before = (every - maximum[:, None]).exp(), (m0 - maximum).exp()
        sums = parts.sum(1) + before * z0
        weighted_sums = torch.einsum("tshl,shv->thlv", parts, values) + before[..., None] * n0
        o.append(torch.einsum("thl,thlv->thv", w / sums, weighted_sums))
        finals.append((maximum[-1], sums[-1], weighted_sums[-1]))
    final = da.PrefixSoftmaxState(*map(torch.stack, zip(*finals, strict=True)))
    o = torch.cat(o)
    gradients = torch.autograd.grad([o, *final[1:]], leaves, [case.do, case.dtotal, case.dweighted])
    return Result(o.detach(), da.PrefixSoftmaxState(*(y.detach() for y in final)), list(gradients))


def layouts(ranks):
    empty = [[(0, 100)], [(100, 302)], *([[]] * (ranks - 2))] if ranks > 1 else [[(0, 302)]]
    return [
        da.Layout.contiguous(LENGTHS, ranks),
        da.Layout.zigzag(LENGTHS, ranks),
        da.Layout.from_chunks(LENGTHS, empty),
    ]


def plans_of(layout, dtype, **settings):
    shape = dict(heads=HEADS, latents=LATENTS, v_head_dim=VALUES, dtype=dtype)
    return da.make_prefix_softmax_plans(da.Mask.documents(LENGTHS), layout, **shape, **settings)


def on_rank(rank, layout, case, plans):
    local = [layout.shard(y, rank).requires_grad_() for y in case[:3]]
    maximum, total, weighted = case.initial
    sums = [y.clone().requires_grad_() for y in (total, weighted)]
    state = da.PrefixSoftmaxState(maximum, *sums)
    o, final = da.prefix_softmax(*local, plans, initial_state=state, return_final_state=True)
    gradients = [layout.shard(case.do, rank), case.dtotal, case.dweighted]
    gradients_ = torch.autograd.grad([o, *final[1:]], [*local, *sums], gradients)
    # only plain tuples can be sent between processes
    return o.detach(), tuple(y.detach() for y in final), list(gradients_)


def work(rank, cases):
    results = []
    for case, layout, settings in cases:
        dtype = str(case.v.dtype)[6:]
        results.append(on_rank(rank, layout, case, plans_of(layout, dtype, **settings)))
    return results


def assert_same(layout, results, wanted, tolerance):
    o, final, gradients = zip(*results, strict=True)
    pairs = [(layout.unshard(list(o)), wanted.o)]
    pairs += [(sum(parts), right) for parts, right in zip(zip(*final, strict=True), wanted.final, strict=True)]
    for number, (parts, right) in enumerate(zip(zip(*gradients, strict=True), wanted.gradients, strict=True)):
        pairs.append((layout.unshard(list(parts)) if number < 3 else sum(parts), right))
    for got, right in pairs:
        assert got.isfinite().all()
        assert float((got.double() - right).abs().max()) <= tolerance * max(float(right.abs().max()), 1.0)


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranks", [4, 2, 1])
def test_ranks_equal_dense_softmaxes(ranks):
    # usual logits, and logits whose exponentials overflow
    usual, strong, fresh = case_of(), case_of(1000.0, 1), case_of(1.0, 2, earlier=False)
    wanted = {id(case): dense(case) for case in (usual, strong, fresh)}
    cases, checks = [], []
    for layout in layouts(ranks):
        sequential = dict(options={"schedule": "sequential"})
        for case, chosen in ((usual, {}), (usual, sequential), (strong, {}), (fresh, {})):
            cases.append((case, layout, chosen))
            checks.append((layout, wanted[id(case)], 1e-10))
    for case in (usual, strong):
        # compare with dense softmaxes of the same rounded numbers
        narrow, layout = case.to(torch.float32), layouts(ranks)[1]
        cases.append((narrow, layout, {}))
        checks.append((layout, dense(narrow.to(torch.float64)), 2e-5))
    by_case = zip(*run_on_ranks(ranks, work, cases), strict=True)
    for (layout, right, tolerance), results in zip(checks, by_case, strict=True):
        assert_same(layout, results, right, tolerance)


def test_one_latent_is_attention_of_one_learned_query():
    torch.manual_seed(0)
    lengths, n = (5, 30), 35
    query, k, v = torch.randn(HEADS, 8).double(), torch.randn(n, HEADS, 8).double(), torch.randn(n, HEADS, 4).double()
    scale = 8**-0.5
    layout = da.Layout.contiguous(lengths, 1)
    shape = dict(heads=HEADS, latents=1, v_head_dim=4, dtype="float64")
    plans = da.make_prefix_softmax_plans(da.Mask.documents(lengths), layout, **shape)
    logits = torch.einsum("hd,thd->th", query, k)[..., None] * scale
    o = da.prefix_softmax(torch.ones_like(logits), logits, v, plans)
    for begin, end in ((0, 5), (5, 35)):
        q = query.expand(end - begin, -1, -1)
        by_head = (y.transpose(0, 1) for y in (q, k[begin:end], v[begin:end]))
        right = torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True)
        torch.testing.assert_close(o[begin:end], right.transpose(0, 1), rtol=0, atol=1e-12)


def test_the_second_half_of_a_document_continues_from_the_state_of_the_first():
    case = case_of(earlier=False)
    case = case._replace(dtotal=0 * case.dtotal, dweighted=0 * case.dweighted)
    right, shape = dense(case), dict(heads=HEADS, latents=LATENTS, v_head_dim=VALUES, dtype="float64")
    begin, middle, end = 38, 100, 238
    leaves = [y.clone().requires_grad_() for y in case[:3]]
    state, o = None, []
    for a, b in ((begin, middle), (middle, end)):
        part = da.Layout.contiguous((b - a,), 1)
        plans = da.make_prefix_softmax_plans(da.Mask.documents((b - a,)), part, **shape)
        inputs = (y[a:b] for y in leaves)
        out, state = da.prefix_softmax(*inputs, plans, initial_state=state, return_final_state=True)
        o.append(out)
    torch.testing.assert_close(torch.cat(o), right.o[begin:end], rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(torch.cat(o), leaves, case.do[begin:end])
    for got, wanted in zip(gradients, right.gradients, strict=False):
        torch.testing.assert_close(got[begin:end], wanted[begin:end], rtol=0, atol=1e-12)


def test_a_selective_checkpoint_repeats_maxima_alone():
    weights, logits, v = case_of()[:3]
    leaves = [y.float().requires_grad_() for y in (weights, logits, v)]
    ready = da.PrefixSoftmaxPlans(*map(da.prepare, plans_of(da.Layout.contiguous(LENGTHS, 1), "float32")))
    passes = []
    for name, executable in zip(ready._fields, ready, strict=True):
        begin = executable.begin_pass
        executable.begin_pass = lambda way, score, name=name, begin=begin: (
            passes.append((name, way)),
            begin(way, score),
        )

    def layer(*args):
        return da.prefix_softmax(*args, ready).square()

    plain = torch.autograd.grad(layer(*leaves).sum(), leaves)
    once = Counter(passes)
    passes.clear()
    context = functools.partial(create_selective_checkpoint_contexts, da.save_attention)
    out = checkpoint(layer, *leaves, use_reentrant=False, context_fn=context)
    for a, b in zip(plain, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(a, b)
    assert Counter(passes) - once == {("maximum", "forward"): 1} and once["maximum", "backward"] == 0


def test_autocast_and_bf16_keep_sums_wide():
    case, layout = case_of(earlier=False), da.Layout.contiguous(LENGTHS, 1)
    plans = plans_of(layout, "bfloat16")
    assert [plan.call.dtype for plan in plans] == ["float32", "float32", "bfloat16"]
    right = dense(case)
    with torch.autocast("cpu", torch.bfloat16):
        o = da.prefix_softmax(*(y.float() for y in case[:3]), plans)
    assert o.dtype == torch.bfloat16
    assert float((o.double() - right.o).abs().max()) < 0.02


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(logits=torch.zeros(302, 2, 4)), "not of the same latents"),
        (dict(v=torch.zeros(302, 2)), "v is a tensor of floating point with tokens"),
        (dict(plans="plans"), "make_prefix_softmax_plans returned, not a str"),
        (dict(swap=True), "plans.maximum is of ssd; make_prefix_softmax_plans makes one of prefix_max"),
        (dict(logits=torch.zeros(301, 2, 3), weights=torch.zeros(301, 2, 3), v=torch.zeros(301, 2, 4)), "x has shape"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, why):
    weights, logits, v = (y.float() for y in case_of()[:3])
    plans = plans_of(da.Layout.contiguous(LENGTHS, 1), "float32")
    arguments = dict(weights=weights, logits=logits, v=v, plans=plans) | change
    if arguments.pop("swap", False):
        arguments["plans"] = da.PrefixSoftmaxPlans(plans.total, plans.maximum, plans.weighted)
    with pytest.raises(da.DistattnError, match=why):
        da.prefix_softmax(*arguments.values())


def test_other_plans_are_refused():
    plans = plans_of(da.Layout.contiguous(LENGTHS, 1), "float32")
    x = torch.zeros(302, 2, 3)
    with pytest.raises(da.DistattnError, match='not of a prefix maximum; make_plan takes op="prefix_max"'):
        da.prefix_max(x, plans.total)
    with pytest.raises(da.DistattnError, match="prefix_max, which is no recurrence"):
        da.recurrence(x, x, x, plans.maximum)
    with pytest.raises(da.DistattnError, match="float64, the plan was made for float32"):
        da.prefix_max(x.double(), plans.maximum)
    assert (da.prefix_max(x, plans.maximum)[[0, 1, 38]] == -torch.inf).all()
