"""Shows where plain transformers differs: router losses in its Trainer, and states of packed documents
(docs/huggingface.md).
"""

import functools
import os

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")

import hybrid_models  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hybrid_models import batch_of, in_one_process  # noqa: E402
from ports import free_ports  # noqa: E402
from processes import run_on_ranks  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import distattn as da  # noqa: E402
from distattn.adapters import huggingface  # noqa: E402
from distattn.adapters.hf_trainer import ContextParallelTrainer  # noqa: E402
from distattn.adapters.pytorch import local_loss  # noqa: E402
from distattn.batch.packed_batch import IGNORE_INDEX  # noqa: E402

# the weight of the router loss relative to the token losses, large so that errors show
WEIGHT = 0.5
PACK = [17, 1, 22]


class Rows(torch.utils.data.Dataset):
    """Four rows of equal length, so that all micro-batches have the same number of labels."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(index))


def _collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": rows[0], "labels": rows[0].clone()}


def _first_step(trainer_class: type[Trainer], folder, micro_batches: int, weight: float, **settings) -> tuple:
    """Return the loss and gradient norm of one step of a mixture-of-experts model. weight: weight of the router loss, 0
    to disable it.
    """
    asked = dict(output_router_logits=True, router_aux_loss_coef=weight) if weight else {}
    model = hybrid_models.build("qwen3_moe", torch.float32, **asked)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=micro_batches,
        max_steps=1,
        max_grad_norm=1e9,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer_arguments = dict(model=model, args=args, train_dataset=Rows(), data_collator=_collate, **settings)
    if trainer_class is Trainer:
        with huggingface.single_process_attention(model):
            trainer = Trainer(**trainer_arguments)
            trainer.train()
    else:
        trainer = trainer_class(**trainer_arguments)
        trainer.train()
    row = trainer.state.log_history[0]
    return row["loss"], row["grad_norm"]


def _plain_on_two_ranks(rank: int, folder, port: int, weight: float) -> tuple:
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return _first_step(Trainer, folder, 1, weight)


def test_the_plain_trainer_adds_the_router_loss_once_for_each_micro_batch_and_rank(tmp_path):
    plain = functools.partial(_first_step, Trainer, tmp_path)
    ours = functools.partial(
        _first_step, ContextParallelTrainer, tmp_path, context_parallel=da.ContextParallel(strategy="ring")
    )
    # the two trainers agree without accumulation, and with accumulation but without a router loss
    assert ours(1, WEIGHT) == pytest.approx(plain(1, WEIGHT), rel=1e-5)
    without = ours(2, 0.0)
    assert without == pytest.approx(plain(2, 0.0), rel=1e-5)
    # we average the router loss over micro-batches; the plain Trainer sums it
    right = ours(2, WEIGHT)
    assert plain(2, WEIGHT)[0] - without[0] == pytest.approx(2 * (right[0] - without[0]), rel=1e-4)
    assert plain(2, WEIGHT / 2) == pytest.approx(right, rel=1e-5)
    # DDP also sums the router loss over ranks
    for loss, norm in run_on_ranks(2, _plain_on_two_ranks, tmp_path, free_ports(1)[0], WEIGHT / 2):
        assert (loss, norm) == pytest.approx(right, rel=1e-4)


def _norm(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None]))


@pytest.mark.parametrize(
    ("name", "differs"), [("qwen3_next", True), ("nemotron_h", True), ("lfm2", True), ("qwen3_moe", False)]
)
def test_plain_transformers_runs_states_over_the_borders_of_packed_documents(name, differs):
    """Compare a pack described only by position_ids with its separate documents. differs: whether their results differ,
    as those of recurrent layers and convolutions do.
    """
    build = functools.partial(hybrid_models.build, name, torch.float32)
    alone, ours, packed = build(), build(), build()
    batch = batch_of(PACK)
    wanted = float(in_one_process(alone, batch)[0]), _norm(alone)
    loss = local_loss(ours, da.ContextParallel(strategy="ring", kernel="reference").shard(batch))
    loss.backward()
    assert (loss.item(), _norm(ours)) == pytest.approx(wanted, rel=1e-5)
    positions = torch.cat([torch.arange(length) for length in PACK])[None]
    labels = batch["input_ids"].masked_fill(positions == 0, IGNORE_INDEX)
    with huggingface.single_process_attention(packed):
        loss = packed(batch["input_ids"], position_ids=positions, labels=labels, use_cache=False).loss
    loss.backward()
    result = loss.item(), _norm(packed)
    assert (result != pytest.approx(wanted, rel=1e-3)) == differs
    assert differs or result == pytest.approx(wanted, rel=1e-5)
