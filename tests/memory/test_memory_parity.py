"""Memory settings do not change gradients, even with ranks without labels. The reference is plain PyTorch in one
process.
"""

import memory_run
import pytest
import small
import torch
from processes import run_on_ranks


def every_variant(rank, ranks, fsdp, tied):
    return {name: memory_run.step(rank, ranks, fsdp, name, tie_word_embeddings=tied) for name in memory_run.VARIANTS}


@pytest.mark.full
# cover every pair of values
@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("ranks", "fsdp", "tied"), [(4, True, False), (4, False, True), (2, True, True), (2, False, False)]
)
def test_gradients_match_one_process_if_ranks_have_no_labels(ranks, fsdp, tied):
    loss, gradients = small.in_one_process(small.build(tie_word_embeddings=tied), memory_run.batches())
    for results in run_on_ranks(ranks, every_variant, ranks, fsdp, tied):
        for name, (got_loss, got) in results.items():
            assert got_loss == pytest.approx(float(loss), rel=1e-12), name
            for a, b in zip(got, gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
