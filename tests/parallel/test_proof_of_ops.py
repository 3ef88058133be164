"""The verifier of convolutions, token shifts and latent attention, which are planned like attention.

Plans that no strategy would make are accepted and correct. Changed plans are refused or correct.
"""

import random
from functools import partial

import pytest
import torch
from mutants import check_mutants
from oracle import Inputs, Record, RecordingTransport, alive_bytes, dense, planned_bytes
from random_plans import TAPS, random_plan

from distattn.ir.op import CONVOLUTION, TOKEN_SHIFT, latent_op
from distattn.kernels.latent import LatentKernel, LatentScore, expand_latents
from distattn.kernels.registry import kernel_preparer, load_kernel
from distattn.kernels.spec import ScoreMod
from distattn.ops.executable import kernel_requirements
from distattn.parallel.analysis.verify import verify
from distattn.parallel.runtime.communication.transport import InProcessNetwork
from distattn.parallel.runtime.execution import execute, execute_convolution
from distattn.parallel.runtime.execution.execute import run_in_lock_step
from distattn.parallel.runtime.lowering.lower import lower

ROPE, LATENT = 2, 3
# ops whose partial results for a row are added, and an op whose partial results are merged by log-sum-exp
OPS = [CONVOLUTION, TOKEN_SHIFT, latent_op(ROPE, LATENT)]
SCORE = ScoreMod(0.5)
TOLERANCE = 1e-11


def inputs_of(call, seed):
    """Return ([inputs by token], weight or None, output gradient)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, heads, values = call.mask.n, call.heads, call.v_head_dim
    do = normal(n, heads, values)
    if call.op.kind == "latent_attention":
        by_token = [normal(n, heads, call.head_dim), normal(n, 1, ROPE), normal(n, 1, LATENT)]
        return by_token, normal(heads, call.head_dim - ROPE + values, LATENT), do
    return [normal(n, heads, values)], normal(heads, values, TAPS) if call.op == CONVOLUTION else None, do


def by_definition(call, by_token, weight, do):
    """Return [output, gradients by token, weight gradient], computed with the dense mask."""
    leaves = [x.clone().requires_grad_() for x in (*by_token, *([] if weight is None else [weight]))]
    if call.op.kind == "latent_attention":
        q, rope, latent, up = leaves
        k, v = expand_latents(rope[:, 0], latent[:, 0], up, call.head_dim - ROPE)
        result = dense(call.mask, Inputs(q, k.detach(), v.detach(), do), SCORE.scale)
        return [result.o, result.dq, *torch.autograd.grad([k, v], leaves[1:], [result.dk, result.dv])]
    allowed = torch.from_numpy(call.mask.dense()).double()
    if call.op == CONVOLUTION:
        distance = torch.arange(call.mask.n)[:, None] - torch.arange(call.mask.n)
        taps = leaves[1][..., (TAPS - 1 - distance).clamp(0, TAPS - 1)]
        o = torch.einsum("qk,hdqk,khd->qhd", allowed, taps, leaves[0])
    else:
        o = torch.einsum("qk,khd->qhd", allowed, leaves[0])
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def run(plan, by_token, weight, do, record=None):
    """Run all ranks of a plan in one process. Return the same tensors as `by_definition`."""
    call, layout, ranks = plan.call, plan.call.layout, range(plan.call.ranks)
    record = Record() if record is None else record
    proof, latents = verify(plan), plan.call.op.kind == "latent_attention"
    kernel = "reference" if latents else "taps"
    make = kernel_preparer(kernel, kernel_requirements(call, torch.device("cpu")))
    record.programs = [lower(plan, rank, make, proof) for rank in ranks]
    module = execute if latents else execute_convolution
    computes = LatentKernel(load_kernel(kernel)) if latents else load_kernel(kernel)
    local = [[layout.shard(x, rank) for x in by_token] for rank in ranks]
    gradients = [layout.shard(do, rank) for rank in ranks]
    dweight = None if weight is None else torch.zeros_like(weight)
    shared = LatentScore(SCORE, weight, call.head_dim - ROPE, dweight) if latents else weight

    def passes(direction, columns_):
        network = InProcessNetwork()
        each = zip(record.programs, columns_, strict=True)
        return run_in_lock_step(
            direction(
                program, RecordingTransport(network.transport(program.rank), program.rank, record), computes, *mine
            )
            for program, mine in each
        )

    ahead = passes(module.forward, [(*mine, shared) for mine in local])
    if latents:
        outputs, lse, kept = zip(*ahead, strict=True)
        delta = [(mine * o).sum(-1) for mine, o in zip(gradients, outputs, strict=True)]
        columns = gradients, local, lse, delta, kept
        back = passes(module.backward, [(g, *mine, *rest, shared) for g, mine, *rest in zip(*columns, strict=True)])
    else:
        outputs, kept = zip(*ahead, strict=True)
        columns = gradients, local, kept
        back = passes(module.backward, [(g, *mine, weight, stays) for g, mine, stays in zip(*columns, strict=True)])
        *back, shares = zip(*back, strict=True)
        back, dweight = list(zip(*back, strict=True)), None if weight is None else sum(shares)
    joined = [layout.unshard(list(parts)) for parts in (outputs, *zip(*back, strict=True))]
    return joined if weight is None else [*joined, dweight]


def assert_right(plan, seed, record=None):
    inputs = inputs_of(plan.call, seed)
    results, wanted = run(plan, *inputs, record), by_definition(plan.call, *inputs)
    for got, right in zip(results, wanted, strict=True):
        # use an absolute tolerance, since a row with one key has gradients of exactly zero
        assert (got - right).abs().max() < TOLERANCE


def random_case(op):
    def make(rng, seed):
        return random_plan(rng, op), partial(assert_right, seed=seed)

    return make


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_plans_no_strategy_would_make_are_accepted_and_right(op):
    for seed in range(20):
        plan, record = random_plan(random.Random(seed), op), Record()
        assert_right(plan, seed, record)
        proof = verify(plan)
        assert record.bytes == +planned_bytes(plan), seed
        for program in record.programs:
            assert alive_bytes(plan.call, program.forward) == proof.forward_peak[program.rank], seed
            assert alive_bytes(plan.call, program.backward) == proof.backward_peak[program.rank], seed


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("mutants", "seed"), [(300, 0), pytest.param(1400, 1_000_000, marks=pytest.mark.full)])
def test_mutants_are_refused_or_right(op, mutants, seed):
    refused, right = check_mutants(mutants, seed, random_case(op))
    assert refused > 10 * right > 0
