"""The probe on Megatron-core's models: it finds the ranks over which a gradient is summed, and missing reductions."""

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch  # noqa: E402
from megatron_models import build, config_of, context_parallel, sequence_parallel_spec, start, wrapped  # noqa: E402
from processes import run_on_ranks  # noqa: E402

import distattn as da  # noqa: E402
from distattn.adapters import megatron  # noqa: E402


def _only_data_parallel(chunks, *args, **named):
    """Reduce gradients over data-parallel ranks only, omitting the parameters shared by tensor- and pipeline-parallel
    ranks.
    """
    for chunk in chunks:
        chunk.finish_grad_sync()


def _probed(rank: int, tp: int, pp: int, changes: dict, is_tied: bool) -> tuple[float, str]:
    """Return the loss factor, and the error when the reduction omits shared parameters."""
    start(tp, pp)
    config = config_of(tp, pp, **changes)
    spec = sequence_parallel_spec() if config.sequence_parallel else None
    model = megatron.use_batch_positions(build(config, spec, share_embeddings_and_output_weights=is_tied))
    chunk = wrapped(config, model, distributed_optimizer=False)
    cp = context_parallel(pad_to=tp)
    factor = cp.loss_scale(megatron.ProbeTarget([chunk]))
    config.finalize_model_grads_func = _only_data_parallel
    with pytest.raises(da.DistattnError) as refusal:
        cp.loss_scale(megatron.ProbeTarget([chunk]))
    return factor, str(refusal.value)


def test_gradients_that_tensor_parallel_ranks_have_to_sum_are_named():
    for factor, refusal in run_on_ranks(2, _probed, 2, 1, {"sequence_parallel": True}, False):
        assert factor == 1
        assert "on rank 0 of the loss group the gradient of " in refusal and "norm" in refusal
        assert "is the rank's own (it is left out of the reduction)" in refusal


def test_an_embedding_that_the_first_and_the_last_stage_share_is_named():
    (first, said_first), (last, said_last) = run_on_ranks(2, _probed, 1, 2, {}, True)
    assert first == last == 1
    assert "the gradient of embedding.word_embeddings.weight is " in said_first
    assert "the gradient of output_layer.weight is " in said_last


def _fused(rank: int) -> list[str]:
    start()
    config = config_of()
    chunk = wrapped(config, megatron.use_batch_positions(build(config)), distributed_optimizer=False)
    warnings = []
    megatron._LOG.warning, before = warnings.append, megatron._LOG.warning
    config.gradient_accumulation_fusion = True
    parameters = megatron.ProbeTarget([chunk]).parameters()
    megatron._LOG.warning = before
    assert all(parameter.leaf() is None for parameter in parameters) and torch.equal(
        parameters[0].held, next(chunk.parameters())
    )
    return warnings


def test_gradients_hidden_by_fusion_are_reported():
    for warnings in run_on_ranks(1, _fused):
        assert len(warnings) == 1 and "gradient_accumulation_fusion=False to compare all parameters" in warnings[0]
