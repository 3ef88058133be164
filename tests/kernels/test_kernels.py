"""Local kernels match the dense oracle, in the coordinates of their own tensors."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Inputs, Result, assert_close, dense, random_inputs

from distattn.ir.errors import DistattnError
from distattn.ir.mask import Mask
from distattn.kernels import cpu, reference
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.merge import merge_
from distattn.kernels.registry import choose_kernel, load_kernel
from distattn.kernels.spec import KernelRequirements, ScoreMod

CPU = torch.device("cpu")
DEMAND = KernelRequirements(torch.float64, 8, 8, CPU)
# the kernels that support every dtype
EXACT = ["reference", "cpu"]


def run(kernel, mask: Mask, inputs: Inputs, dtype=torch.float64, scale: float = 0.25) -> Result:
    work = kernel.prepare(LaunchMask.from_mask(mask, inputs.q.shape[1], inputs.k.shape[1]), DEMAND)
    q, k, v, do = (x.to(dtype) for x in inputs)
    o, lse = kernel.forward(q, k, v, work, ScoreMod(scale))
    delta = (do.to(o.dtype) * o).sum(-1)
    return Result(o, lse, *kernel.backward(do, q, k, v, lse, delta, work, ScoreMod(scale)))


@settings(max_examples=60)
@given(
    st.integers(1, 90).flatmap(lambda n: st.tuples(st.just(n), st.integers(-n, n), st.integers(-n, n))),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from(EXACT),
)
def test_any_band_equals_the_oracle(band, heads, kernel):
    n, lo, hi = band
    # make sure that some diagonal of the square lies in the band
    lo, hi = min(lo, hi, n - 1), max(lo, hi, 1 - n)
    mask = Mask.from_pieces([[0, n, 0, n, lo, hi]])
    # with a single key per row dq and dk are zero, and a relative error is meaningless
    assume((mask.dense().sum(1) > 1).any())
    inputs = random_inputs(n, *heads, 8)
    assert_close(run(load_kernel(kernel), mask, inputs), dense(mask, inputs, 0.25), 1e-12)


@pytest.mark.parametrize("kernel", EXACT)
def test_blocks_windows_and_documents_longer_than_a_row_block(kernel):
    n = 700
    inputs = random_inputs(n, 2, 1, 16)
    for mask in (
        Mask.sliding_window(n, 90, 10),
        Mask.documents([1, 300, 399]),
        Mask.from_pieces([[0, n, 0, n, -(1 << 40), 0, 64, 64, 0, 0]]),
        Mask.from_pieces([[10, 400, 20, 600, -30, 1 << 40]], n),
    ):
        assert_close(run(load_kernel(kernel), mask, inputs), dense(mask, inputs, 0.25), 1e-12)


@pytest.mark.parametrize("kernel", EXACT)
def test_rows_without_keys_give_zero_and_minus_infinity(kernel):
    mask = Mask.from_pieces([[2, 4, 0, 3, -9, 9]], n=6)
    got = run(load_kernel(kernel), mask, random_inputs(6, 2, 1, 8))
    empty = [0, 1, 4, 5]
    assert (got.o[empty] == 0).all() and (got.lse[empty] == -torch.inf).all() and (got.dq[empty] == 0).all()
    assert torch.isfinite(got.lse[2:4]).all()


def test_the_operators_still_return_zero_for_a_fully_masked_row():
    # `lse = -inf` for empty rows works around this behaviour. If PyTorch fixes it, the comment in cpu.py is out of date
    q = torch.randn(1, 1, 2, 8)
    mask = torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]])
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, False, attn_mask=mask)
    assert lse[0, 0, 1] == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_output_gradients_keep_their_gradients(size):
    mask = Mask.causal(20)
    inputs = random_inputs(20, 2, 1, 8)
    scaled = inputs._replace(do=inputs.do * size)
    wanted = dense(mask, scaled, 0.25)
    assert_close(run(cpu, mask, scaled, torch.float32), wanted, 1e-5)


def test_rows_with_zero_output_gradient_are_fine():
    inputs = random_inputs(12, 2, 1, 8)
    inputs.do[3:7] = 0
    assert_close(run(cpu, Mask.causal(12), inputs), dense(Mask.causal(12), inputs, 0.25), 1e-12)


def test_reference_accumulates_half_precision_in_single():
    inputs = random_inputs(30, 2, 1, 8)
    for kernel in EXACT:
        got = run(load_kernel(kernel), Mask.causal(30), inputs, torch.bfloat16)
        assert all(x.dtype == torch.float32 for x in got)


def test_merging_partial_results_equals_one_softmax():
    inputs = random_inputs(40, 2, 2, 8)
    left, right = Mask.from_pieces([[0, 40, 0, 15, -99, 0]], 40), Mask.from_pieces([[0, 40, 15, 40, -99, 0]], 40)
    (o, lse), (o2, lse2) = (
        reference.forward(*inputs[:3], reference.prepare(LaunchMask.from_mask(m, 2, 2), DEMAND), ScoreMod(0.25))
        for m in (left, right)
    )
    merge_(o, lse, o2, lse2)
    wanted = dense(Mask.causal(40), inputs, 0.25)
    assert (o - wanted.o).abs().max() < 1e-13 and (lse - wanted.lse).abs().max() < 1e-13


def test_dispatch_is_explicit():
    assert choose_kernel(None, KernelRequirements(torch.float32, 8, 8, CPU)) == "cpu"
    assert (
        choose_kernel("reference", KernelRequirements(torch.float32, 8, 12, torch.device("cuda"), True, True))
        == "reference"
    )
    for arguments, sentence in (
        (("flush", torch.float32, 8, 8, CPU), "kernel 'flush' does not exist; there are auto, reference, cpu"),
        ((None, torch.float32, 8, 12, CPU), "equal head dims, not 8 and 12"),
        (("cpu", torch.float32, 8, 8, torch.device("cuda")), "runs on CPU tensors, not on cuda"),
        (("cpu", torch.float32, 8, 8, CPU, True, False), "no soft-capping and no ALiBi"),
        (("cpu", torch.float32, 8, 8, CPU, False, True), "no soft-capping and no ALiBi"),
        ((None, torch.float32, 8, 8, torch.device("meta")), "no default kernel for meta"),
    ):
        with pytest.raises(DistattnError, match=sentence):
            choose_kernel(arguments[0], KernelRequirements(*arguments[1:]))


def test_a_causal_band_needs_two_calls_and_a_full_one_a_single():
    def runs(*piece):
        return [
            (r.q0, r.q1, r.k0, r.k1, r.causal)
            for r in cpu.prepare(LaunchMask.from_mask(Mask.from_pieces([piece], 99), 1, 1), DEMAND).calls
        ]

    assert runs(0, 9, 0, 9, -999, 999) == [(0, 9, 0, 9, False)]
    assert runs(0, 9, 0, 9, -999, 0) == [(0, 9, 0, 9, True)]
    assert runs(10, 19, 0, 19, -999, 0) == [(10, 19, 0, 10, False), (10, 19, 10, 19, True)]
