"""`recurrence` on real ranks: outputs, final states and all gradients match a single process, and wrong calls are
refused.
"""

import functools

import pytest
import torch
import torch._dynamo.testing
from processes import run_on_ranks
from recurrences import RECURRENT, RecurrenceResult, assert_same, by_definition, recurrence_case
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import distattn as da
from distattn.ir.op import OPS

LENGTHS = (1, 37, 129, 3, 62)


def plan_of(layout, op, strategy="scan", dtype="float64", **options):
    shape = dict(heads=4, kv_heads=2, head_dim=3, v_head_dim=5, dtype=dtype, op=op, options=options or None)
    return da.make_plan(da.Mask.documents(layout.lengths), layout, strategy=strategy, **shape)


def run(rank, layout, case, plan):
    """Return this rank's results (o, final, dx by token, dinitial)."""
    local = {name: layout.shard(value, rank).requires_grad_() for name, value in case.x.by_token().items()}
    x = case.x._replace(**local)
    initial = case.initial.clone().requires_grad_()
    o, final = da.recurrence(
        x.q, x.k, x.v, plan, g=x.g, beta=x.beta, initial_state=initial, scale=1.0, return_final_state=True
    )
    torch.autograd.backward([o, final], [layout.shard(case.do, rank), case.dfinal])
    return o.detach(), final.detach(), {name: value.grad for name, value in local.items()}, initial.grad


def together(layout, case, results):
    o, final, dx, dinitial = zip(*results, strict=True)
    dx = {name: layout.unshard([gradients[name] for gradients in dx]) for name in case.x.by_token()}
    return RecurrenceResult(layout.unshard(list(o)), sum(final), case.x._replace(**dx), sum(dinitial))


def work(rank, ranks, names):
    results = []
    for name in names:
        case = recurrence_case(OPS[name], LENGTHS)
        for layout in layouts(ranks):
            for strategy, options in (("scan", {}), ("scan", {"schedule": "sequential"}), ("ulysses", {})):
                if strategy == "ulysses" and ranks > 4:
                    continue
                results.append(run(rank, layout, case, plan_of(layout, name, strategy, **options)))
    return results


def layouts(ranks):
    empty = [[(0, 100)], [(100, 232)], *([[]] * (ranks - 2))] if ranks > 1 else [[(0, 232)]]
    return [
        da.Layout.contiguous(LENGTHS, ranks),
        da.Layout.zigzag(LENGTHS, ranks),
        da.Layout.from_chunks(LENGTHS, empty),
    ]


@pytest.mark.full
@pytest.mark.sampled(20)
@pytest.mark.parametrize("ranks", [4, 1, 2, 8])
def test_ranks_equal_one_process(ranks):
    names = RECURRENT if ranks < 8 else ["gated_delta_rule"]
    results = run_on_ranks(ranks, work, ranks, names)
    of_call = iter(zip(*results, strict=True))
    for name in names:
        case = recurrence_case(OPS[name], LENGTHS)
        wanted = by_definition(case)
        for layout in layouts(ranks):
            for strategy in ("scan", "sequential", "ulysses"):
                if strategy != "ulysses" or ranks <= 4:
                    assert_same(together(layout, case, next(of_call)), wanted, 1e-10)
    assert next(of_call, None) is None


def test_bf16_is_at_most_twice_as_far_off_as_one_pass_over_all_tokens():
    case = recurrence_case(OPS["gated_delta_rule"], (512,), decay="near 1")
    narrow = case.x._replace(**{name: value.bfloat16() for name, value in case.x.by_token().items() if name != "g"})
    narrow = narrow._replace(g=case.x.g.float())
    wanted = by_definition(case._replace(x=narrow._replace(**{n: v.double() for n, v in narrow.by_token().items()})))

    def errors(ranks, strategy):
        layout = da.Layout.zigzag((512,), ranks)
        plan = plan_of(layout, "gated_delta_rule", strategy, dtype="bfloat16")
        results = run_on_ranks(ranks, run, layout, case._replace(x=narrow, do=case.do.bfloat16()), plan)
        joined = together(layout, case, results)
        pairs = [(joined.o, wanted.o), *zip(joined.dx.by_token().values(), wanted.dx.by_token().values(), strict=True)]
        return [float((a.double() - b).abs().max()) for a, b in pairs]

    alone = errors(1, "scan")
    for strategy in ("scan", "ulysses"):
        assert all(a <= 2 * b for a, b in zip(errors(4, strategy), alone, strict=True))


def test_a_layer_trains_without_initial_states_and_with_a_checkpoint():
    layout = da.Layout.contiguous((40,), 1)
    plan = plan_of(layout, "kda", dtype="float32")
    case = recurrence_case(OPS["kda"], (40,))
    q, k, v, g, beta = (value.float().requires_grad_() for value in case.x)
    ready = da.prepare(plan)

    def layer(q, k, v, g, beta):
        return da.recurrence(q, k, v, ready, g=g, beta=beta)

    plain = torch.autograd.grad(layer(q, k, v, g, beta).square().sum(), (q, k, v, g, beta))
    again = checkpoint(layer, q, k, v, g, beta, use_reentrant=False).square().sum()
    for a, b in zip(plain, torch.autograd.grad(again, (q, k, v, g, beta)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_selective_checkpoint_repeats_no_recurrence():
    layout = da.Layout.contiguous((40,), 1)
    case = recurrence_case(OPS["gla"], (40,))
    q, k, v, g, _ = (value if value is None else value.float().requires_grad_() for value in case.x)
    ready, passes = da.prepare(plan_of(layout, "gla", dtype="float32")), []
    begin = ready.begin_pass
    ready.begin_pass = lambda *args: (passes.append(args[0]), begin(*args))

    def layer(q, k, v, g):
        return da.recurrence(q * 2, k, v, ready, g=g)

    plain = torch.autograd.grad(layer(q, k, v, g).square().sum(), (q, k, v, g))
    context = functools.partial(create_selective_checkpoint_contexts, da.save_attention)
    out = checkpoint(layer, q, k, v, g, use_reentrant=False, context_fn=context).square().sum()
    for a, b in zip(plain, torch.autograd.grad(out, (q, k, v, g)), strict=True):
        torch.testing.assert_close(a, b)
    assert passes == ["forward", "backward"] * 2


def test_a_compiled_layer_is_the_same_and_a_second_plan_recompiles_nothing_more():
    case = recurrence_case(OPS["gated_delta_rule"], (40,))
    q, k, v, g, beta = (value.float() for value in case.x)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(q, ready):
        return da.recurrence(q, k, v, ready, g=g, beta=beta) + 1

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for lengths in ((40,), (13, 27), (5, 5, 30)):
        ready = da.prepare(plan_of(da.Layout.contiguous(lengths, 1), "gated_delta_rule", dtype="float32"))
        grads = [
            torch.autograd.grad(f(x, ready).square().sum(), x)[0]
            for f in (layer, compiled)
            for x in [q.clone().requires_grad_()]
        ]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "change, why",
    [
        ({"g": None}, "needs g of shape"),
        ({"beta": torch.rand(40, 4)}, "takes no beta"),
        ({"g": torch.zeros(40, 4).bfloat16()}, "g is bfloat16, the plan of ssd needs float32: a product"),
        ({"initial_state": torch.zeros(2, 4, 3, 5)}, "expected is .1, 4, 3, 5."),
        ({"scale": -1.0}, "positive number"),
        ({"kernel": "triton"}, 'kernel "triton" does not compute ssd; there are auto, chunked'),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, why):
    case = recurrence_case(OPS["ssd"], (40,))
    x = case.x._replace(**{name: value.float() for name, value in case.x.by_token().items()})
    plan = plan_of(da.Layout.contiguous((40,), 1), "ssd", dtype="float32")
    with pytest.raises(da.DistattnError, match=why):
        da.recurrence(x.q, x.k, x.v, plan, **({"g": x.g} | change))


def test_attention_and_recurrence_refuse_each_others_plans():
    layout = da.Layout.contiguous((40,), 1)
    q = torch.randn(40, 2, 3)
    with pytest.raises(da.DistattnError, match="not of attention"):
        da.attention(q, q, torch.randn(40, 4, 5), plan_of(layout, "linear_attention", dtype="float32"))
    plan = da.make_plan(da.Mask.causal(40), layout, strategy="ring", heads=2, kv_heads=2, head_dim=3, dtype="float32")
    with pytest.raises(da.DistattnError, match="is no recurrence"):
        da.recurrence(q, q, q, plan)
    with pytest.raises(da.DistattnError, match='"chunked" does not compute attention'):
        da.attention(q, q, q, plan, kernel="chunked")
