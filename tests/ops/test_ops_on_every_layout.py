"""One op of each kind except attention on every layout: packed documents, a document over all ranks, empty ranks,
planned bytes.

Each op runs in the dtypes of `DTYPES`. test_parity.py covers attention. test_recurrence.py (float64) and
test_recurrence_precision.py (float32, bfloat16) cover all recurrences.
"""

import functools
import itertools
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from cases import layouts
from oracle import Record, RecordingTransport, planned_bytes
from plain_batch import PlainBatch
from processes import run_on_ranks

import distattn as da
from distattn.ir.layout import make_layout
from distattn.kernels.registry import KERNELS

# documents of many lengths, some shorter than a filter, and a single document
PACKED, ALONE = (1, 7, 90, 2, 41), (130,)
HEADS, NOPE, ROPE, LATENT, VALUE = 8, 6, 2, 10, 5
CHANNELS, TAPS, DISTANCE = 6, 4, 3
# cases cycle through attention's strategies, and through kernels that return results or write into given tensors. The
# cycles have lengths 6 and 5, so that all combinations occur
STRATEGIES = ["ring", "allgather", "ulysses", "cad", "double_ring", "usp"]
KERNELS_OF_LATENTS = ["reference", "in_place", "reference", "in_place", "in_place"]
TOLERANCES = {"float64": 1e-10, "float32": 2e-5}
DTYPES = {
    "latent_attention": ["float64", "float32", "bfloat16"],
    "convolution": ["float64", "bfloat16"],
    "gated_delta_rule": ["float64", "float32"],
    "token_shift": ["float64"],
}


# resolve these lazy imports once here, not in every rank
FUNCTIONS = da.latent_attention, da.causal_conv1d, da.recurrence, da.token_shift


class Inputs(NamedTuple):
    """Per-token tensors, tensors shared by all tokens, and the output gradient."""

    by_token: list[torch.Tensor]
    shared: list[torch.Tensor]
    do: torch.Tensor


def inputs(op, n, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))

    if op == "latent_attention":
        by_token = [normal(n, HEADS, NOPE + ROPE), normal(n, ROPE), normal(n, LATENT)]
        return Inputs(by_token, [normal(HEADS, NOPE + VALUE, LATENT)], normal(n, HEADS, VALUE))
    if op == "gated_delta_rule":
        q, k, v = normal(n, 2, NOPE), normal(n, 2, NOPE), normal(n, 4, VALUE)
        g, beta = -normal(n, 4).abs(), normal(n, 4).sigmoid()
        return Inputs([q, torch.nn.functional.normalize(k, dim=-1), v, g, beta], [], normal(n, 4, VALUE))
    shared = [normal(CHANNELS, TAPS), normal(CHANNELS)] if op == "convolution" else []
    return Inputs([normal(n, CHANNELS)], shared, normal(n, CHANNELS))


def alone(op, lengths, tensors_):
    """Compute the output of each document by definition. The result is differentiable."""
    batch, tensors = PlainBatch(list(lengths)), [*tensors_.by_token, *tensors_.shared]
    if op == "latent_attention":
        q, rope, latent, up = tensors
        expanded = torch.einsum("sl,hel->she", latent, up)
        k = torch.cat([expanded[..., :NOPE], rope[:, None].expand(-1, HEADS, -1)], -1)
        return batch.attention(q, k, expanded[..., NOPE:])
    if op == "gated_delta_rule":
        q, k, v, g, beta = tensors
        return batch.recurrence(q, k, v, op, g=g, beta=beta)
    if op == "convolution":
        x, weight, bias = tensors
        return batch.causal_conv1d(x, weight, bias=bias, activation="silu")
    return batch.token_shift(tensors[0], DISTANCE)


def call(op, ready, by_token, shared):
    if op == "latent_attention":
        return da.latent_attention(*by_token, *shared, ready)
    if op == "gated_delta_rule":
        q, k, v, g, beta = by_token
        return da.recurrence(q, k, v, ready, g=g, beta=beta)
    if op == "convolution":
        return da.causal_conv1d(*by_token, shared[0], ready, bias=shared[1], activation="silu")
    return da.token_shift(*by_token, ready)


def plan_of(op, layout, dtype, strategy):
    mask, shape = da.Mask.documents(layout.lengths), dict(heads=1, kv_heads=1, head_dim=1, v_head_dim=CHANNELS, op=op)
    if op == "latent_attention":
        shape = dict(heads=HEADS, kv_heads=1, head_dim=NOPE + ROPE, v_head_dim=VALUE, op=da.latent_op(ROPE, LATENT))
    elif op == "gated_delta_rule":
        shape, strategy = dict(heads=4, kv_heads=2, head_dim=NOPE, v_head_dim=VALUE, op=op), "scan"
    else:
        mask = da.Mask.documents(layout.lengths, (TAPS - 1, 0))
        mask, strategy = da.Mask.token_shift(layout.lengths, DISTANCE) if op == "token_shift" else mask, "allgather"
    return da.make_plan(mask, layout, strategy=strategy, dtype=dtype, **shape)


class Case(NamedTuple):
    op: str
    dtype: str
    kernel: str | None
    layout: str
    plan: da.Plan


def cases(ranks):
    """Return all combinations of layouts, ops and dtypes, but the single document only in each op's first dtype."""
    all_cases, turns = [], zip(itertools.cycle(STRATEGIES), itertools.cycle(KERNELS_OF_LATENTS), strict=False)
    for lengths in (PACKED, ALONE):
        named = [
            (op, dtype) for op, dtypes in DTYPES.items() for dtype in (dtypes if lengths == PACKED else dtypes[:1])
        ]
        # this layout does not split documents, so a single document leaves the other ranks without tokens
        placed = {"placed": make_layout("placed", lengths, ranks, da.Mask.documents(lengths))}
        for name, layout in (layouts(lengths, ranks) | placed).items():
            for op, dtype in named:
                latents = op == "latent_attention"
                strategy, kernel = next(turns) if latents else (None, None)
                all_cases.append(Case(op, dtype, kernel, name, plan_of(op, layout, dtype, strategy)))
    return all_cases


def run(rank, case):
    """Return ([output, gradients by token], gradients of shared tensors, bytes sent)."""
    layout, record = case.plan.call.layout, Record()
    tensors = inputs(case.op, layout.n, case.dtype)
    by_token = [layout.shard(x, rank).requires_grad_() for x in tensors.by_token]
    shared = [x.clone().requires_grad_() for x in tensors.shared]
    with mock.patch.dict(KERNELS, in_place="in_place_kernel"):
        ready = da.prepare(case.plan, kernel=case.kernel, proven=False)
    ready.transport = RecordingTransport(ready.transport, rank, record)
    o = call(case.op, ready, by_token, shared)
    grads = torch.autograd.grad(o, [*by_token, *shared], layout.shard(tensors.do, rank))
    return [o.detach(), *grads[: len(by_token)]], list(grads[len(by_token) :]), dict(record.bytes)


def work(rank, all_cases):
    return [run(rank, case) for case in all_cases]


@functools.cache
def wanted_of(op, lengths, dtype):
    """Return [output, gradients] by definition, in fp64, for inputs first rounded to `dtype`."""
    tensors = inputs(op, sum(lengths), dtype)
    wide = Inputs(*([x.double().requires_grad_() for x in some] for some in tensors[:2]), tensors.do.double())
    o = alone(op, lengths, wide)
    return [o.detach(), *torch.autograd.grad(o, [*wide.by_token, *wide.shared], wide.do)]


def errors(case, results):
    """Return the error of each tensor, combined over all ranks, relative to its largest element."""
    layout = case.plan.call.layout
    by_token, shared, _ = zip(*results, strict=True)
    joined = [layout.unshard(list(parts)) for parts in zip(*by_token, strict=True)]
    joined += [sum(share.double() for share in shares) for shares in zip(*shared, strict=True)]
    pairs = zip(joined, wanted_of(case.op, tuple(layout.lengths), case.dtype), strict=True)
    return [float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]


@functools.cache
def errors_of_one_device(op, lengths, dtype):
    case = Case(op, dtype, None, "one device", plan_of(op, da.Layout.contiguous(lengths, 1), dtype, "ring"))
    return errors(case, [run(0, case)])


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.parametrize("ranks", [4, 2, 8])
def test_every_op_equals_each_document_alone(ranks):
    all_cases = cases(ranks)
    for case in all_cases:
        da.verify(case.plan)
    references = {(case.op, tuple(case.plan.call.layout.lengths), case.dtype) for case in all_cases}
    one_device = {each: errors_of_one_device(*each) for each in references}
    for case, *results in zip(all_cases, *run_on_ranks(ranks, work, all_cases), strict=True):
        moved = {key: size for *_, sizes in results for key, size in sizes.items()}
        assert moved == dict(+planned_bytes(case.plan)), case[:4]
        least = one_device[case.op, tuple(case.plan.call.layout.lengths), case.dtype]
        most = [TOLERANCES[case.dtype]] * len(least) if case.dtype in TOLERANCES else [2 * error for error in least]
        actual = errors(case, results)
        for error in (actual, least) if case.dtype in TOLERANCES else (actual,):
            assert all(a <= b for a, b in zip(error, most, strict=True)), (case[:4], case.plan.strategy, error, most)
