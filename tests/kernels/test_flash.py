"""The vendor tier: bands as variable-length sequences, with an exact stand-in for PyTorch's operators."""

import numpy as np
import pytest
import torch
import varlen_flash
from cases import LENGTHS, all_masks, layouts, masks
from hypothesis import given
from hypothesis import strategies as st
from oracle import Result, assert_close, dense, random_inputs, run_all_ranks

from distattn.ir.bands import row_key_ranges, tighten
from distattn.ir.errors import DistattnError
from distattn.ir.mask import Mask
from distattn.kernels.flash import attention as flash
from distattn.kernels.flash.pieces import flash_schedule, sequences
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.registry import choose_kernel
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.parallel.make_plan import STRATEGIES, make_plan

pytestmark = pytest.mark.sampled(30)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(flash, "forward_operator", varlen_flash.forward)
    monkeypatch.setattr(flash, "backward_operator", varlen_flash.backward)


def test_the_operators_still_take_what_they_are_given():
    names = {
        operator: [argument.name for argument in getattr(torch.ops.aten, operator).default._schema.arguments]
        for operator in ("_flash_attention_forward", "_flash_attention_backward")
    }
    starts = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert names["_flash_attention_forward"][:10] == ["query", "key", "value", *starts, "return_debug_mask"]
    front = ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert names["_flash_attention_backward"][:14] == [*front, *starts, "rng_state", "unused"]
    for arguments in names.values():
        assert {"scale", "window_size_left", "window_size_right"} <= set(arguments)


def cells(pieces, rows, keys):
    seen = np.zeros((rows, keys), int)
    for piece in pieces:
        left, right = piece.left, piece.right
        inside = varlen_flash.allowed(piece.q1 - piece.q0, piece.k1 - piece.k0, (left, right) == (-1, 0), left, right)
        seen[piece.q0 : piece.q1, piece.k0 : piece.k1] += inside.numpy()
    return seen


@given(st.data())
def test_sequences_are_the_cells_of_their_band(data):
    number = st.integers(0, 40)
    q0, k0 = data.draw(number), data.draw(number)
    q1, k1 = q0 + data.draw(st.integers(1, 40)), k0 + data.draw(st.integers(1, 40))
    low = data.draw(st.integers(-60, 60))
    high = low + data.draw(st.integers(0, 90))
    if data.draw(st.booleans()):
        low, high = data.draw(st.sampled_from([(-(1 << 32), high), (low, 1 << 32), (-(1 << 32), 1 << 32)]))
    step = data.draw(st.sampled_from([(1, 1), (16, 16), (20, 7)]))
    band = tighten(np.array([[q0, q1, k0, k1, low, high, *step, data.draw(number), data.draw(number)]], np.int64))
    q0, q1, k0, k1 = (int(x) for x in band[0, :4])
    if q0 == q1:
        return
    wanted = np.zeros((q1, k1), int)
    begin, end = row_key_ranges(band.repeat(q1 - q0, 0), np.arange(q0, q1))
    for row, (a, b) in enumerate(zip(begin, end, strict=True), start=q0):
        wanted[row, a:b] = 1
    pieces = list(sequences(band[0]))
    assert (cells(pieces, q1, k1) == wanted).all()
    # the operators treat a negative limit as unlimited
    assert all(piece.left >= -1 and piece.right in (-1, 0) for piece in pieces)
    if step == (1, 1):
        assert len(pieces) <= 3


def sayable(mask):
    return all(min(int(piece[6]), 99) in (1, *range(16, 100)) for piece in mask.pieces)


def said(heads):
    return {name: mask for name, mask in all_masks(heads).items() if sayable(mask)}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mask", said(4))
def test_every_mask_and_strategy_equals_the_oracle(mask, strategy):
    inputs = random_inputs(sum(LENGTHS), 4, 2, 8)
    wanted = dense(said(4)[mask], inputs)
    for name, ranks in (("zigzag", 2), ("balanced", 4)):
        shape = dict(strategy=strategy, heads=4, kv_heads=2, head_dim=8, dtype="float64")
        plan = make_plan(said(4)[mask], layouts(LENGTHS, ranks)[name], **shape)
        # accumulators are in single precision
        assert_close(run_all_ranks(plan, inputs, "flash"), wanted, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
def test_half_precision_stays_in_its_bounds(dtype, heads):
    inputs = random_inputs(sum(LENGTHS), *heads, 16)
    shape = dict(strategy="ring", heads=heads[0], kv_heads=heads[1], head_dim=16, dtype=dtype)
    plan = make_plan(masks()["window"], layouts(LENGTHS, 4)["zigzag"], **shape)
    rounded = type(inputs)(*(x.to(getattr(torch, dtype)).double() for x in inputs))
    tolerance = {"bfloat16": 3e-2, "float16": 4e-3}[dtype]
    assert_close(run_all_ranks(plan, inputs, "flash"), dense(masks()["window"], rounded), tolerance)


@pytest.mark.parametrize("dims", [(24, 16), (16, 24)])
def test_head_dims_of_values_may_differ(dims):
    inputs = random_inputs(sum(LENGTHS), 4, 2, *dims)
    shape = dict(strategy="ring", heads=4, kv_heads=2, head_dim=dims[0], v_head_dim=dims[1], dtype="float64")
    plan = make_plan(masks()["window"], layouts(LENGTHS, 4)["zigzag"], **shape)
    assert_close(run_all_ranks(plan, inputs, "flash"), dense(masks()["window"], inputs), 1e-5)


def test_calls_that_an_activated_implementation_does_not_support_are_refused_by_name(monkeypatch):
    def reason(name, capability, *dims):
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: name, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return flash.unsupported_reason(KernelRequirements(torch.bfloat16, *dims, torch.device("cuda", 0)))

    assert "FA3, which is activated, runs on Hopper" in reason("FA3", (8, 0), 128, 128)
    assert "compute capability 9 and 10" in reason("FA4", (8, 0), 128, 128)
    assert "up to 128 on this GPU, not 192" in reason("FA4", (10, 0), 192, 128)
    for name, capability, dims in (
        (None, (10, 0), (192, 128)),
        ("FA3", (9, 0), (192, 128)),
        ("FA4", (9, 0), (256, 256)),
        ("FA4", (10, 0), (96, 96)),
    ):
        assert reason(name, capability, *dims) is None


def test_packed_documents_are_one_call():
    mask = LaunchMask.from_mask(Mask.documents((300, 20, 7, 500)), 8, 2)
    (call,) = flash_schedule(mask).calls
    assert call.starts_q.tolist() == call.starts_k.tolist() == [0, 300, 320, 327, 827]
    assert (call.left, call.right, call.longest_q) == (-1, 0, 500) and len(call.row_segments) == 1


def test_what_lies_between_sequences_is_left_out():
    mask = Mask.from_pieces([[0, 4, 0, 4, -99, 0], [10, 14, 6, 10, -99, 4]], 14)
    schedule = flash_schedule(LaunchMask.from_mask(mask, 1, 1))
    inputs = random_inputs(14, 1, 1, 8)
    score = ScoreMod(0.25)
    o, lse = flash.forward(*inputs[:3], schedule, score)
    grads = flash.backward(inputs.do, *inputs[:3], lse, (inputs.do * o).sum(-1).float(), schedule, score)
    got = Result(o, lse, *grads)
    assert_close(got, dense(mask, inputs, 0.25), 1e-5)
    assert not schedule.all_rows and (got.lse[4:10] == -torch.inf).all() and (got.o[4:10] == 0).all()


def test_unsupported_calls_are_refused_by_name():
    staircase = Mask.block_causal_documents((100,), 4)
    with pytest.raises(
        DistattnError, match='"flash" cannot express a mask that climbs in steps of 4 rows; use kernel="triton"'
    ):
        flash_schedule(LaunchMask.from_mask(staircase, 1, 1))
    cuda = torch.device("cuda")
    for given_, sentence in (
        ((torch.bfloat16, 64, 64, torch.device("cpu")), "runs on GPUs, not on cpu"),
        ((torch.float32, 64, 64, cuda), "bfloat16 and float16, not float32"),
        ((torch.bfloat16, 512, 128, cuda), "multiples of 8 up to 256, not 512 and 128"),
        ((torch.bfloat16, 64, 64, cuda, True, False), "no soft-capping and no ALiBi"),
    ):
        with pytest.raises(DistattnError, match=sentence):
            choose_kernel("flash", KernelRequirements(*given_))
