"""A bit that flips in weights or optimizer state between two updates is found and named, and the run goes back."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from tiny_runs import new_run, tiny_config

from distattn.checkpoints.checkpoint_folder import list_checkpoints
from distattn.ir.errors import DamagedStateError, DistattnError
from distattn.training import loop
from distattn.training.config.run_file import Config, RunConfig, TrainConfig
from distattn.training.config.sections import CheckpointConfig, EngineConfig, HealthConfig, MemoryConfig, WatchConfig
from distattn.training.engines.engine import open_engine
from distattn.training.reporting.json_lines import read_rows
from distattn.training.run_checkpoints import RunCheckpoints
from distattn.training.run_folder import RunFolder
from distattn.training.watch import state_digest
from distattn.training.watch.state_digest import StateDigest, state_tensors
from distattn.training.watch.weight_growth import WeightGrowth

STEPS = 6


def events_of(run):
    """Return a run's events except health reports, since ranks on a busy machine may be slow."""
    return [event for event in run.events() if event["kind"] != "health"]


def flip(tensor: torch.Tensor, bit: int = 0, at: int = -1) -> None:
    """Change one bit of one element of a tensor, as defective memory would, without PyTorch noticing."""
    byte, shift = divmod(bit, 8)
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach()
    flat.view(torch.uint8).reshape(-1)[at * tensor.element_size() + byte] ^= 1 << shift


def trained_model(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(3, 7, dtype=dtype)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("on_device", [False, True], ids=["by xxh3", "as on a device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_bit_counts_and_names_its_tensor(dtype, on_device, monkeypatch):
    if on_device:
        monkeypatch.setattr(state_digest, "_HOST", ())
    model, optimizer = trained_model(dtype)
    digest = StateDigest(lambda: state_tensors(model.named_parameters(), optimizer))
    assert digest.compare(1) is None and digest.comparisons == 0
    digest.take("the update of step 1")
    names = [f"{kind} {name}".strip() for kind, name, _ in state_tensors(model.named_parameters(), optimizer)]
    assert len(names) == 3 * 4 + 1
    for name, (_, _, tensor) in zip(names, state_tensors(model.named_parameters(), optimizer), strict=True):
        if name == "counts of updates":
            # this tensor is a copy, because the counts are not contiguous, so change an original count instead
            tensor = optimizer.state[model[0].bias]["step"]
        for bit in (0, 8 * tensor.element_size() - 1):
            flip(tensor, bit)
            damage = digest.compare(1)
            flip(tensor, bit)
            assert damage is not None and (damage.ranks, damage.tensors) == ((0,), (name,))
            assert f"{name} changed between the update of step 1 and the update of step 2" in damage.text
    # two changes in different rows that cancel in a sum
    weight = model[0].weight.detach().view(torch.uint8).view(-1)
    other = 7 * dtype.itemsize
    weight[0] += 1
    weight[other] -= 1
    assert digest.compare(1) is not None
    weight[0] -= 1
    weight[other] += 1
    assert digest.compare(1) is None
    digest.forget()
    assert digest.compare(1) is None


def test_repeated_damage_on_one_rank_is_distinguished_from_chance():
    model, optimizer = trained_model(torch.float32)
    digest = StateDigest(lambda: state_tensors(model.named_parameters(), optimizer))
    repeats = []
    for step in range(3):
        digest.take("an update")
        flip(model[0].weight)
        repeats.append(digest.compare(step).repeats)
    assert repeats == [False, False, True]


def test_the_update_that_made_a_weight_grow_is_named():
    model, optimizer = trained_model(torch.float32)
    growth = WeightGrowth(lambda: state_tensors(model.named_parameters(), optimizer))
    assert growth.largest() is None
    for step in range(9):
        with torch.no_grad():
            # biases that start at zero may grow to any size
            model[1].bias.fill_(float(step))
            if step == 3:
                model[0].weight.mul_(2000)
                model[0].bias.mul_(5000)
            if step == 6:
                model[0].weight.fill_(float("nan"))
        growth.after_update(step)
    largest = growth.largest()
    assert (largest.step, largest.name, round(largest.factor)) == (3, "0.bias", 5000)
    assert largest.text(2).startswith("the update of step 4 made weight 0.bias of rank 2 grow 5,000-fold (norm ")
    growth.forget()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    for step, value in ((0, 1.0), (1, float("inf"))):
        with torch.no_grad():
            model[0].weight[0, 0] = value
        growth.after_update(step)
    assert growth.largest().text(0).startswith("the update of step 2 made weight 0.weight of rank 0 infinite or NaN")


def _told(rank: int) -> list[bool]:
    """Return, for each exchange, whether a rank reports a change, while the ranks also send other messages."""
    import torch.distributed as dist

    digest = StateDigest(lambda: [("weight", "w", torch.ones(2))], dist.group.WORLD)
    # no digest was computed, so nothing is sent, and the other ranks need not take part
    changes = [digest.share(False)()] if rank == 0 else []
    digest.take("an update")
    other = torch.zeros(1)
    for changed in (False, rank == 1):
        if rank == 1:
            dist.recv(other, 0)
        told = digest.share(changed)
        # the other rank has not started the exchange
        if rank == 0:
            dist.send(other, 1)
        changes.append(told())
    return changes


def test_ranks_learn_of_a_change_while_they_send_other_messages():
    assert run_on_ranks(2, _told) == [[False, False, True], [False, True]]


# ---- on ranks, in every engine


def config_of(engine: str, texts: Path, folder: Path, **others) -> Config:
    return tiny_config(
        texts,
        folder,
        data=dict(tokens_per_step=128, context_length=128),
        engine=EngineConfig(name=engine, **others),
        train=TrainConfig(steps=STEPS),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=2),
        health=HealthConfig(every_steps=3),
    )


ENGINES = {
    "fsdp2": ("fsdp2", {}),
    "deepspeed 0": ("deepspeed", {"zero_stage": 0}),
    "deepspeed 2": ("deepspeed", {"zero_stage": 2}),
    "deepspeed 3": ("deepspeed", {"zero_stage": 3}),
    "megatron": ("megatron", {}),
    "fsdp2, state on host": ("fsdp2", {}),
}


def _compared(rank: int, config: Config) -> tuple[list[str], list[tuple]]:
    """Return the names of all digested tensors, and the damage found after flipping one bit in each."""
    import small
    import torch.distributed as dist

    os.environ["LOCAL_RANK"] = str(rank)
    if config.engine.name == "megatron":
        import megatron_on_cpu  # noqa: F401
    engine = open_engine(config, torch.device("cpu"), small.VOCABULARY, 128)
    digest = StateDigest(engine.state_tensors, dist.group.WORLD)
    names, damages = [], []
    for batches in engine.cp.steps([[small.micro_batch([9, 14, 5])]] * 3):
        engine.backward(batches)
        engine.clip(1.0)
        # nothing between two updates changes the state
        damages.append(digest.compare(0))
        engine.update(1e-3)
        digest.take("the update of step 1")
    for number, (kind, name, tensor) in enumerate(list(engine.state_tensors())):
        names.append(f"{kind} {name}".strip())
        if rank == 1 and names[-1] != "counts of updates" and tensor.numel():
            flip(tensor, bit=number % 8)
    damage = digest.compare(1)
    damages.append((damage.ranks, damage.text))
    engine.close()
    return names, damages


@pytest.mark.sampled(2)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_engines_digest_everything_that_an_update_changes(texts, tmp_path, engine):
    name, others = ENGINES[engine]
    pytest.importorskip({"fsdp2": "torch", "deepspeed": "deepspeed", "megatron": "megatron.core"}[name])
    config = config_of(name, texts, tmp_path / "run", **others)
    if "host" in engine:
        config = dataclasses.replace(config, memory=MemoryConfig(state_on_host=True))
    (names, damages), (_, other) = run_on_ranks(2, _compared, config)
    assert damages == other and damages[:-1] == [None] * 3
    ranks, text = damages[-1]
    assert ranks == (1,) and text.startswith("rank 1 on ") and "changed between the update of step 1" in text
    kinds = {name.split(" ")[0] for name in names}
    assert {"weight", "exp_avg", "exp_avg_sq"} <= kinds and len(set(names)) == len(names)
    assert ("master" in kinds) == (engine in ("deepspeed 2", "deepspeed 3", "megatron"))


# ---- in a run


def _train_with_flips(rank: int, folder: Path, config: Config, before: tuple[int, ...], kind: str = "weight") -> None:
    """Train. before: the updates, counted from 1 across rollbacks, before which a bit of rank 1's state flips."""
    if config.engine.name == "megatron":
        import megatron_on_cpu  # noqa: F401
    os.environ["LOCAL_RANK"] = str(rank)
    open_engine, done = loop.open_engine, []

    def opened(*args):
        engine = open_engine(*args)
        backward = engine.backward

        def flipping(*backward_args):
            losses = backward(*backward_args)
            done.append(None)
            if rank == 1 and len(done) in before:
                flip(
                    next(
                        part for tensor_kind, _, part in engine.state_tensors() if tensor_kind == kind and part.numel()
                    ),
                    bit=9,
                )
            return losses

        engine.backward = flipping
        return engine

    loop.open_engine = opened
    loop.train(RunFolder(folder), config, True, torch.device("cpu"))


def trained(config: Config, *fault) -> RunFolder:
    run = new_run(config)
    run_on_ranks(2, _train_with_flips, run.folder, config, *fault)
    return run


def rows(run: RunFolder) -> list[tuple]:
    return [(step.step, step.loss, step.grad_norm, step.skipped) for step in run.metrics()]


def test_a_run_with_a_flipped_bit_ends_as_one_without(texts, tmp_path):
    config = config_of("fsdp2", texts, tmp_path / "run")
    wanted = rows(trained(config, ()))
    # the first flip is before the update of step 4; the second, after the rollback, is before that of step 5
    run = trained(dataclasses.replace(config, run=RunConfig(str(tmp_path / "flipped"), 3)), (4, 7), "exp_avg_sq")
    assert rows(run) == wanted and len(wanted) == STEPS
    damaged = [event["text"] for event in events_of(run) if event["kind"] == "damaged state"]
    assert len(damaged) == 2 and all(
        "rank 1 on" in text and ": exp_avg_sq model.embed_tokens.weight" in text for text in damaged
    )
    assert "changed between the update of step 3 and the update of step 4" in damaged[0]
    # the checkpoint of step 4 was copied while the bit flipped, so it does not count, and the run goes back to the
    # checkpoint of step 2
    assert "changed between the update of step 4 and the update of step 5" in damaged[1]
    resumed = [event["text"] for event in events_of(run) if event["kind"] == "resumed"]
    assert resumed == ["Resumed from step-00000002."] * 2
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] == [4, 6]
    told = [row for row in read_rows(run.health_file) if row["damaged"]]
    assert [row["damaged"] for row in told] == [[text] for text in damaged]
    assert read_rows(run.health_file)[-1]["state_checks"] > STEPS


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ranks_of_a_pipeline_that_share_no_loss_learn_of_it_too(texts, tmp_path):
    pytest.importorskip("megatron.core")
    config = config_of("megatron", texts, tmp_path / "run")
    parallel = dataclasses.replace(config.parallel, pipeline_parallel_size=2, kernel="reference")
    run = trained(dataclasses.replace(config, parallel=parallel), (4,), "exp_avg")
    events = [event["kind"] for event in events_of(run)]
    assert events == ["damaged state", "resumed"] and "rank 1 on" in events_of(run)[0]["text"]
    assert [step.step for step in run.metrics()] == list(range(1, STEPS + 1))


@pytest.mark.full
def test_the_last_checkpoint_is_not_one_of_a_damaged_state(texts, tmp_path):
    """Change a bit while the last state is copied, when no later step could reveal it."""
    config = config_of("fsdp2", texts, tmp_path / "run")
    run = new_run(config)
    run_on_ranks(2, _train_and_flip_last, run.folder, config)
    assert [event["kind"] for event in events_of(run)] == ["damaged state", "resumed"]
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] == [4, 6]
    assert rows(run) == rows(trained(dataclasses.replace(config, run=RunConfig(str(tmp_path / "other"), 3)), ()))


def _train_and_flip_last(rank: int, folder: Path, config: Config) -> None:
    save, done = RunCheckpoints.save, []

    def flipping(self, step):
        save(self, step)
        if step == STEPS and rank == 0 and not done:
            done.append(step)
            flip(next(part for kind, _, part in self.engine.state_tensors() if kind == "weight" and part.numel()))

    RunCheckpoints.save = flipping
    loop.train(RunFolder(folder), config, True, torch.device("cpu"))


def _error_of(rank: int, folder: Path, config: Config, before: tuple[int, ...]) -> tuple[str, int, str]:
    with pytest.raises(DistattnError) as raised:
        _train_with_flips(rank, folder, config, before)
    return type(raised.value).__name__, raised.value.exit_code, str(raised.value)


@pytest.mark.full
def test_without_a_checkpoint_the_run_starts_over_and_repeated_damage_ends_it(texts, tmp_path):
    config = config_of("fsdp2", texts, tmp_path / "run")
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=-1))
    for settings, before, error, code, sentence in (
        (config, (2,), DamagedStateError, 4, "There is no checkpoint to go back to"),
        (
            dataclasses.replace(
                config, checkpoint=CheckpointConfig(every_steps=1), watch=WatchConfig(action="rollback")
            ),
            (2, 3, 4),
            DistattnError,
            2,
            "3 times in this run: have the memory of its host tested",
        ),
        (dataclasses.replace(config, watch=WatchConfig(action="stop")), (2,), DistattnError, 2, "distattn resume"),
    ):
        run = new_run(settings)
        for outcome in run_on_ranks(2, _error_of, run.folder, settings, before):
            assert outcome[:2] == (error.__name__, code) and sentence in outcome[2], outcome


def test_periodic_digests_are_also_taken_before_every_save(texts, tmp_path):
    config = dataclasses.replace(config_of("fsdp2", texts, tmp_path / "run"), watch=WatchConfig(digest_every=100))
    run = trained(config, (4, 5))
    # the first flip is between updates that are not compared, the second during the save after step 4
    events = [(event["kind"], event["text"]) for event in events_of(run)]
    assert [kind for kind, _ in events] == ["damaged state", "resumed"]
    assert "between the update of step 4 and the update of step 5" in events[0][1]
    assert events[1][1] == "Resumed from step-00000002."
