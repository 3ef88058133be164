"""transformers' Trainer on several ranks: it matches the loss curve of a single process, evaluates, and refuses wrong
setups.
"""

import contextlib
import io
import os
import sys

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")

import small  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from processes import run_on_ranks  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

import distattn as da  # noqa: E402
from distattn.adapters.hf_trainer import ContextParallelTrainer  # noqa: E402
from distattn.batch.packed_batch import IGNORE_INDEX  # noqa: E402

pytestmark = pytest.mark.sampled(4)

STEPS = 6
ROWS_PER_STEP = 4


class Rows(torch.utils.data.Dataset):
    """A dataset of 48 sequences of uneven lengths."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, small.VOCABULARY, (5 + index % 11,), generator=generator)


class Stream(torch.utils.data.IterableDataset):
    """The same sequences as an iterable dataset."""

    def __iter__(self):
        return map(Rows().__getitem__, range(48))


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE_INDEX)}


def arguments(folder, micro_batches: int, replicas: int, **changes) -> TrainingArguments:
    settings = dict(
        per_device_train_batch_size=ROWS_PER_STEP // micro_batches // replicas,
        gradient_accumulation_steps=micro_batches,
        max_steps=STEPS,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        include_num_input_tokens_seen="all",
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


class Watched(ContextParallelTrainer):
    """A trainer that records the micro-batches of every step."""

    def get_batch_samples(self, *args):
        parts, count = super().get_batch_samples(*args)
        self.parts = [*getattr(self, "parts", ()), *parts]
        return parts, count


def _as_torchrun(rank: int) -> None:
    # accelerate reads its rank from the environment
    ranks = str(dist.get_world_size())
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def _refilled(rank: int, folder: str) -> list[int]:
    """Return the first token id of each batch from a collator that reuses one tensor for all batches."""
    _as_torchrun(rank)
    ids = torch.zeros(4, 3, dtype=torch.int64)
    trainer = ContextParallelTrainer(
        model=small.build(),
        args=arguments(folder, 1, 1, train_sampling_strategy="sequential"),
        train_dataset=list(range(12)),
        data_collator=lambda rows: {"input_ids": ids.copy_(torch.tensor(rows)[:, None].expand(4, 3))},
        context_parallel=da.ContextParallel(strategy="ring", kernel="reference"),
    )
    # collect all batches in a list, as the Trainer does with the micro-batches of a step
    return [int(batch["input_ids"][0, 0]) for batch in list(trainer.get_train_dataloader())]


def test_a_collator_may_fill_one_tensor_again(tmp_path):
    assert run_on_ranks(1, _refilled, str(tmp_path)) == [[0, 4, 8]]


def _train(
    rank: int, folder, degree: int, micro_batches: int, changes: dict, dtype=torch.float64, data=Rows, shared=False
):
    """Train on this rank. Return (losses, gradient norms, evaluation loss, number of tokens).

    shared: each block of `degree` ranks has its own batches, and all blocks share attention.
    """
    ranks = dist.get_world_size()
    _as_torchrun(rank)
    if changes.get("deepspeed"):
        import deepspeed

        os.environ["DS_ACCELERATOR"] = "cpu"
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if shared:
        cp = da.ContextParallel(context_parallel_size=degree, **small.CAD)
    else:
        groups = [dist.new_group(range(first, first + degree)) for first in range(0, ranks, degree)]
        all_ranks = dist.group.WORLD if degree < ranks else None
        cp = da.ContextParallel(groups[rank // degree] if all_ranks else None, loss_group=all_ranks, strategy="ring")
    trainer = Watched(
        model=small.build(dtype),
        args=arguments(folder, micro_batches, ranks // degree, **changes),
        train_dataset=data(),
        eval_dataset=Rows(),
        data_collator=padded,
        context_parallel=cp,
    )
    trained = trainer.train().metrics
    if shared:
        assert small.shared_between_blocks(trainer.parts, degree, str(dtype)[6:])
    curve = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    evaluated = trainer.evaluate()
    assert trainer.get_total_train_batch_size(trainer.args) == ROWS_PER_STEP
    _check_rates(trained, "train", STEPS * ROWS_PER_STEP, STEPS)
    shares = cp.data_parallel_size
    _check_rates(evaluated, "eval", 48, 48 // (8 * shares))
    tokens = trainer.state.num_input_tokens_seen
    last = trainer.state.log_history[STEPS - 1]
    assert last["num_input_tokens_seen"] == tokens
    if ranks == 1:
        # every token except the last of each row has a label
        assert tokens == sum(int((part["labels"] >= 0).sum()) for part in trainer.parts) + STEPS * ROWS_PER_STEP
    if changes.get("deepspeed"):
        engine = trainer.model_wrapped
        assert engine.train_batch_size() == engine.tput_timer.batch_size == ROWS_PER_STEP
        assert engine.global_samples == STEPS * ROWS_PER_STEP
    return curve, norms, evaluated["eval_loss"], tokens


def _check_rates(metrics: dict, kind: str, samples: int, steps: int) -> None:
    """Check that the reported rates count every sample once, within the rounding of rates and times."""
    seconds = metrics[f"{kind}_runtime"]
    assert metrics[f"{kind}_samples_per_second"] * seconds == pytest.approx(samples, rel=0.02)
    assert metrics[f"{kind}_steps_per_second"] * seconds == pytest.approx(steps, rel=0.02)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    (results,) = run_on_ranks(1, _train, tmp_path_factory.mktemp("one"), 1, 1, {})
    assert len(results[0]) == STEPS and results[0][-1] < results[0][0]
    return results


@pytest.mark.parametrize(("ranks", "degree", "micro_batches"), [(2, 2, 1), (2, 2, 2), (4, 2, 2), (4, 4, 1)])
def test_the_curve_matches_one_process(tmp_path, one_process, ranks, degree, micro_batches):
    curve, norms, evaluated, tokens = one_process
    for got, got_norms, got_evaluated, got_tokens in run_on_ranks(ranks, _train, tmp_path, degree, micro_batches, {}):
        assert got_tokens == tokens
        # logs are rounded, and transformers computes norms in fp32
        assert got == pytest.approx(curve, rel=1e-4)
        assert got_norms == pytest.approx(norms, rel=1e-4)
        assert got_evaluated == pytest.approx(evaluated, rel=1e-6)


@pytest.mark.parametrize(("ranks", "degree", "micro_batches"), [(2, 1, 1), (2, 1, 2), (4, 2, 2)])
def test_replicas_that_share_attention_have_the_curve_of_one_process(
    tmp_path, one_process, ranks, degree, micro_batches
):
    settings = tmp_path, degree, micro_batches, {}, torch.float64, Rows, True
    for curve, norms, evaluated, tokens in run_on_ranks(ranks, _train, *settings):
        assert tokens == one_process[3]
        assert curve == pytest.approx(one_process[0], rel=1e-4)
        assert norms == pytest.approx(one_process[1], rel=1e-4)
        assert evaluated == pytest.approx(one_process[2], rel=1e-5)


def _packs(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Collate rows into one pack, which models accept only with context parallelism."""
    return {"input_ids": torch.cat(rows)[None], "document_lengths": [len(row) for row in rows]}


def _evaluates(rank: int, folder, degree: int, metrics: bool = False):
    """Return (evaluation losses before, during and after training, tokens per row that a metric sees). metrics: compute
    the metric, which requires unsplit rows instead of packs.
    """
    ranks = dist.get_world_size()
    _as_torchrun(rank)
    groups = [dist.new_group(range(first, first + degree)) for first in range(0, ranks, degree)]
    cp = da.ContextParallel(groups[rank // degree], loss_group=dist.group.WORLD, strategy="ring")
    how = dict(eval_strategy="steps", eval_steps=2, max_steps=4, per_device_eval_batch_size=8 * degree // ranks)
    trainer = ContextParallelTrainer(
        model=small.build(torch.float64),
        args=arguments(folder, 1, ranks // degree, **how),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=padded if metrics else _packs,
        context_parallel=cp,
        compute_metrics=(lambda predicted: {"tokens": predicted.predictions.shape[1]}) if metrics else None,
    )
    before = trainer.evaluate()
    trainer.train()
    during = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return [before["eval_loss"], *during, trainer.evaluate()["eval_loss"]], before.get("eval_tokens")


@pytest.mark.parametrize(("ranks", "degree"), [(2, 2), (4, 2)])
def test_long_sequences_are_evaluated_split(tmp_path, ranks, degree):
    ((expected, _),) = run_on_ranks(1, _evaluates, tmp_path / "one", 1)
    assert len(expected) == 4 and expected[-1] < expected[0]
    for losses, _ in run_on_ranks(ranks, _evaluates, tmp_path, degree):
        assert losses == pytest.approx(expected, rel=1e-5)
    # metrics need the logits of complete sequences
    for _, tokens in run_on_ranks(2, _evaluates, tmp_path / "metrics", 2, True):
        assert tokens == 15


def _with_servers(rank: int, folder) -> str:
    if rank == 2:
        return str(da.serve())
    _as_torchrun(rank)
    with da.ContextParallel(servers=1, **small.CAD) as cp:
        with pytest.raises(da.DistattnError) as refusal:
            ContextParallelTrainer(model=small.build(), args=arguments(folder, 1, 1), context_parallel=cp)
        return str(refusal.value)


def test_ranks_that_only_serve_are_refused(tmp_path):
    *refusals, _ = run_on_ranks(3, _with_servers, tmp_path)
    assert all(
        "ranks that only serve (the Trainer trains on all ranks) is not supported" in refusal for refusal in refusals
    )


@pytest.mark.full
def test_a_stream_is_shared_out_over_replicas(tmp_path):
    (alone,) = run_on_ranks(1, _train, tmp_path, 1, 1, {}, torch.float64, Stream)
    for ranks in (2, 4):
        for curve, _, _, tokens in run_on_ranks(ranks, _train, tmp_path, 2, 1, {}, torch.float64, Stream):
            assert tokens == alone[3] == sum(len(Rows()[row]) for row in range(STEPS * ROWS_PER_STEP))
            assert curve == pytest.approx(alone[0], rel=1e-4)


@pytest.mark.parametrize(("degree", "shared"), [(2, False), (1, True)], ids=["split", "shared"])
def test_fsdp2_under_the_trainer_has_the_same_curve(tmp_path, one_process, degree, shared):
    wrap = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
    changes = {"fsdp": "full_shard auto_wrap", "fsdp_config": wrap}
    for curve, norms, _, tokens in run_on_ranks(2, _train, tmp_path, degree, 2, changes, torch.float64, Rows, shared):
        assert tokens == one_process[3]
        assert curve == pytest.approx(one_process[0], rel=1e-4)
        assert norms == pytest.approx(one_process[1], rel=1e-4)


@pytest.mark.full
def test_deepspeed_under_the_trainer_has_the_same_curve(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    (alone,) = run_on_ranks(1, _train, tmp_path, 1, 1, {}, torch.float32)
    for curve, _, _, tokens in run_on_ranks(2, _train, tmp_path, 2, 2, {"deepspeed": settings}, torch.float32):
        assert tokens == alone[3]
        assert curve == pytest.approx(alone[0], rel=2e-3)


def _refused(rank: int, folder, error: Exception | None) -> tuple[str, int | None]:
    """Return this rank's error output and exit code after an uncaught exception. error: the exception, or None for the
    refusal that the Trainer raises.
    """
    _as_torchrun(rank)
    cp = da.ContextParallel(strategy="ring")
    printed = io.StringIO()
    try:
        ContextParallelTrainer(
            model=small.build(), args=arguments(folder, 1, 1, label_smoothing_factor=0.1), context_parallel=cp
        )
    except da.DistattnError as refusal:
        error = error or refusal
    with contextlib.redirect_stderr(printed):
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as end:
            return printed.getvalue(), end.code
    return printed.getvalue(), None


def test_a_refusal_is_one_sentence_of_one_rank(tmp_path):
    outputs, codes = zip(*run_on_ranks(2, _refused, tmp_path, None), strict=True)
    assert codes == (2, 2)
    (sentence,) = "".join(outputs).splitlines()
    assert sentence.startswith("distattn: rank ") and "label_smoothing_factor is not supported" in sentence
    assert "(test_hf_trainer.py, line " in sentence
    # unlike a refusal, any other error is reported by every rank
    for printed, code in run_on_ranks(2, _refused, tmp_path, KeyError("mine")):
        assert "KeyError: 'mine'" in printed and code is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor is not supported"),
        (dict(accelerator_config={"split_batches": True}), "split_batches and dispatch_batches is not supported"),
        (dict(train_sampling_strategy="group_by_length"), "'group_by_length' is not supported"),
    ],
)
def test_batches_that_the_trainer_cannot_split_are_refused(tmp_path, changes, sentence):
    cp = da.ContextParallel(strategy="ring")
    with pytest.raises(da.DistattnError, match=sentence):
        ContextParallelTrainer(model=small.build(), args=arguments(tmp_path, 1, 1, **changes), context_parallel=cp)
    trainer = ContextParallelTrainer(model=small.build(), args=arguments(tmp_path, 1, 1), context_parallel=cp)
    with pytest.raises(da.DistattnError, match="needs a train_dataset"):
        trainer.get_train_dataloader()
