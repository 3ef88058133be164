"""Every op reports a wrong plan argument in the same words."""

import pytest
import torch

import distattn as da

# a wrong plan is refused before shapes are checked
CALLS = {
    "attention": lambda x, *args: da.attention(x, x, x, *args),
    "latent_attention": lambda x, *args: da.latent_attention(x, x[:, 0, :2], x[:, 0], x, *args),
    "recurrence": lambda x, *args: da.recurrence(x, x, x, *args),
    "causal_conv1d": lambda x, *args: da.causal_conv1d(x[:, 0], x[:, 0], *args),
    "token_shift": lambda x, *args: da.token_shift(x, *args),
    "prefix_max": lambda x, *args: da.prefix_max(x, *args),
}


@pytest.fixture(scope="module")
def plan():
    mask, shape = da.Mask.documents([4]), dict(heads=2, kv_heads=2, head_dim=8, dtype="float32")
    return da.make_plan(mask, da.Layout.contiguous([4], 1), strategy="ring", **shape)


@pytest.mark.parametrize("op", CALLS)
def test_wrong_plan_arguments_and_a_second_group_are_refused(op, plan):
    call, x = CALLS[op], torch.zeros(4, 2, 8)
    with pytest.raises(da.DistattnError, match=r"plan must be .*, not (a str|'ring')"):
        call(x, "ring")
    with pytest.raises(da.DistattnError, match="an executable has its group and kernel; pass them to prepare"):
        call(x, da.prepare(plan), torch.distributed.ProcessGroup(0, 1))


@pytest.mark.parametrize("op", [op for op in CALLS if op != "attention"])
def test_only_attention_takes_turns_with_other_micro_batches(op, plan, monkeypatch):
    monkeypatch.setattr("distattn.ops.current_micro_batch.RECOMPUTING", [object()])
    with pytest.raises(da.DistattnError, match=f"^{op} cannot take turns with other micro-batches yet; leave Overlap"):
        CALLS[op](torch.zeros(4, 2, 8), plan)


@pytest.mark.parametrize("op", ["recurrence", "causal_conv1d", "token_shift"])
def test_plans_are_prepared_outside_of_torch_compile(op, plan):
    compiled = torch.compile(lambda x: CALLS[op](x, plan), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=f"inside torch.compile, {op} takes prepare"):
        compiled(torch.zeros(4, 2, 8))
