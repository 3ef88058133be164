"""Counting a run's bytes: meta tensors give the count of real tensors, and arithmetic gives the sizes of FSDP2's
shards.
"""

import json
from dataclasses import replace

import hybrid_models
import pytest
import small
import torch
from processes import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distattn as da
from distattn.adapters import huggingface
from distattn.cluster.spec import load
from distattn.ir.errors import DistattnError
from distattn.launch.plan_command import main
from distattn.launch.train_command import main as train
from distattn.memory.accounting import ATTENTION, LOSS, AllocationWatch, StateBytes
from distattn.memory.settings import MemorySettings
from distattn.ops.executable import Executable, ExecutionKey, checked_program
from distattn.parallel.runtime.communication.transport import SingleRankTransport
from distattn.training.config import run_file as configuration
from distattn.training.run_memory import (
    fit_line,
    memory_json,
    memory_of_config,
    memory_of_run,
    memory_table,
    on_meta,
    step_memory,
)

TOKENS = 96
SETTINGS = [
    MemorySettings(),
    MemorySettings(loss_tile_tokens=16),
    MemorySettings(mlp_tile_tokens=16),
    MemorySettings(activation_checkpointing="full"),
    MemorySettings(activation_checkpointing="save_attention"),
    MemorySettings(loss_tile_tokens=8, mlp_tile_tokens=8, activation_checkpointing="full", offload=True),
]


def plan(tokens=TOKENS, ranks=1, **how):
    shape = dict(heads=4, kv_heads=2, head_dim=8, dtype="float32")
    return da.make_plan(da.Mask.causal(tokens), da.Layout.zigzag([tokens], ranks), strategy="ring", **shape, **how)


def executable(device, of=None):
    key, program = checked_program(of or plan(), 0, "reference", torch.device("cpu"), None, False)
    key = key if device == "cpu" else ExecutionKey(0, "reference", torch.device("meta"))
    return Executable(program, key, SingleRankTransport())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_meta_tensors_count_what_real_ones_take(settings):
    # vocabulary and feed-forward layers wide enough to matter
    changes = dict(vocab_size=500, intermediate_size=200)
    real = step_memory(AllocationWatch("cpu"), small.build(torch.float32, **changes), executable("cpu"), settings)
    model = on_meta(lambda: small.build(torch.float32, **changes))
    counted = step_memory(AllocationWatch("meta"), model, executable("meta"), settings)
    assert counted.saved == pytest.approx(real.saved, rel=0.02)
    assert counted.host == real.host
    most = max(real.working.values())
    for name, size in real.working.items():
        assert counted.working[name] == pytest.approx(size, rel=0.02, abs=0.02 * most), name


# make all layers dense, since the grouping of experts depends on values
DENSE = dict(vocab_size=300, first_k_dense_replace=2)


def by_latents():
    model = hybrid_models.build("deepseek_v3", torch.float32, **DENSE)
    huggingface.attend_by_latents(model)
    return model


def test_latents_are_counted_as_real_ones_are():
    shape = dict(heads=4, kv_heads=1, head_dim=12, v_head_dim=6, dtype="float32", op=da.latent_op(4, 16))
    of = da.make_plan(da.Mask.causal(TOKENS), da.Layout.zigzag([TOKENS], 1), strategy="ring", **shape)
    settings = MemorySettings(activation_checkpointing="full", loss_tile_tokens=16)
    real = step_memory(AllocationWatch("cpu"), by_latents(), executable("cpu", of), settings)
    counted = step_memory(AllocationWatch("meta"), on_meta(by_latents), executable("meta", of), settings)
    assert counted.saved == pytest.approx(real.saved, rel=0.02)
    assert counted.working == pytest.approx(real.working, rel=0.02)


def test_a_run_by_latents_counts_all_keys_and_values_that_a_rank_expands(tmp_path):
    hybrid_models.config("deepseek_v3", **DENSE).save_pretrained(tmp_path)
    settings = ["--model.path", str(tmp_path), "--reference_check.steps", "0", "--parallel.ranks", "2"]
    settings += ["--parallel.strategy", "allgather", "--parallel.kernel", "reference", "--memory.loss_tile_tokens", "8"]
    settings += ["--memory.activation_checkpointing", "full", "--parallel.latents"]
    tokens = 512
    # per token, a head has 12 key and 6 value elements in fp32, expanded from latents or gathered, and as many
    # gradients
    sizes = tokens * 4 * (12 + 6) * 4 * 2
    for latents in ("True", "False"):
        rows = memory_of_config(configuration.load("configs/tiny.toml", [*settings, latents]), [[tokens]])
        assert all(sizes < row.counts.working[ATTENTION] < 3 * sizes for row in rows), latents


def test_earlier_memory_is_not_counted_but_new_memory_at_its_address_is():
    watch = AllocationWatch("cpu")
    for _ in range(100):
        older = torch.zeros(64)
        with watch:
            older.view(8, 8)
            assert watch.alive == 0
        del older
        with watch:
            newer = torch.zeros(64)
        assert watch.alive == newer.nbytes
        del newer


def test_settings_that_save_memory_do_save_memory():
    def counted(settings):
        changes = dict(vocab_size=5000, intermediate_size=500, num_hidden_layers=4)
        return step_memory(
            AllocationWatch("meta"),
            on_meta(lambda: small.build(torch.float32, **changes)),
            executable("meta"),
            settings,
        )

    plain, loss, mlp, full, attention, all_of_it = map(counted, SETTINGS)
    # a tiled loss has the logits of 8 or 16 tokens at a time instead of 96
    assert plain.working[LOSS] > 4 * loss.working[LOSS]
    assert mlp.saved < 0.75 * plain.saved
    assert full.saved < attention.saved < 0.5 * plain.saved
    # the inputs of four layers, 96 x 32 elements each, are on the host
    assert all_of_it.host == 4 * TOKENS * 32 * 4 and all_of_it.saved < full.saved


def sharded(rank):
    model = small.build(torch.float32)
    whole = StateBytes.of(model, list(model.model.layers), 2, master_weights=False)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def local(tensors):
        return sum(tensor.to_local().nbytes for tensor in tensors)

    moments = [moment for state in optimizer.state.values() for name, moment in state.items() if name != "step"]
    held = (model.parameters(), (parameter.grad for parameter in model.parameters()), moments)
    return tuple(whole), [local(tensors) for tensors in held]


def test_state_is_what_fsdp2_shards():
    for (parameters, gradients, optimizer, *_), bytes_ in run_on_ranks(2, sharded):
        assert [parameters, gradients, optimizer] == pytest.approx(bytes_, rel=0.01)


def test_ranks_with_equally_many_tokens_share_a_line():
    settings = MemorySettings(activation_checkpointing="full", loss_tile_tokens=8)
    rows = memory_of_run(lambda: small.build(torch.float32), plan(97, 4), settings, master_weights=True)
    assert (
        sorted(rank for row in rows for rank in row.ranks) == [0, 1, 2, 3]
        and sum(len(row.ranks) * row.tokens for row in rows) == 97
    )
    lines = memory_table(rows, 4)
    assert "gathered" in lines[1] and len(lines) == len(rows) + 3
    on_host = memory_of_run(lambda: small.build(torch.float32), plan(97, 4), settings, state_on_host=True)
    assert on_host[0].total < rows[0].total and on_host[0].host > 0


@pytest.mark.sampled(5)
@pytest.mark.parametrize("settings", SETTINGS)
def test_many_equal_layers_are_counted_by_few(settings):
    def model():
        return small.build(torch.float32, num_hidden_layers=9)

    (row,) = memory_of_run(model, plan(), settings)
    assert row.counts == step_memory(AllocationWatch(), on_meta(model), executable("meta"), settings)


def test_the_extremes_of_unequal_ranks_give_the_memory_needed():
    ends = [0, 5, 17, 30, 32, 60, 97]
    layout = da.Layout.from_chunks([97], [[chunk] for chunk in zip(ends, ends[1:], strict=False)])
    shape = dict(heads=4, kv_heads=2, head_dim=8, dtype="float32", strategy="ring")
    uneven = da.make_plan(da.Mask.causal(97), layout, **shape)
    settings = MemorySettings(activation_checkpointing="full", loss_tile_tokens=8)
    few, every = (
        memory_of_run(lambda: small.build(torch.float32), uneven, settings, extremes=extremes) for extremes in (1, 0)
    )
    assert len(every) == 6 and len(few) < 5 and [few[0].tokens, few[-1].tokens] == [2, 37]
    assert max(row.total for row in few) == max(row.total for row in every)
    assert (
        memory_table(few, 6)[-1] == f"{6 - len(few)} ranks have numbers of tokens between these, and were not counted"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(loss_tile_tokens=-1), "loss_tile_tokens: must be at least 0, not -1"),
        (
            dict(activation_checkpointing="some"),
            "activation_checkpointing: there is no 'some'; there are " + "none, full, save_attention",
        ),
        (dict(offload=True), "offload takes the inputs of checkpointed layers"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(DistattnError, match=message):
        MemorySettings(**wrong)


def test_plan_shows_the_memory_of_a_run(capsys):
    arguments = ["configs/tiny.toml", "--memory", "--memory.activation_checkpointing", "full"]
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:3] == ["ranks", "tokens", "weights"] and table[2].startswith("0-3")
    assert table[-1].startswith("without a cluster it is unknown whether the run fits")
    assert main([*arguments, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["ranks"] == [0, 1, 2, 3] and row["total"] > row["saved"] > 0
    with pytest.raises(DistattnError, match="--memory needs a run: name its configuration"):
        main(["--docs", "4096", "--cluster", "h200-1x8", "--memory"])


@pytest.mark.full
def test_a_run_trains_with_all_memory_settings(tmp_path):
    settings = [
        "loss_tile_tokens",
        "64",
        "mlp_tile_tokens",
        "32",
        "activation_checkpointing",
        "full",
        "offload",
        "True",
    ]
    memory = [word if i % 2 else f"--memory.{word}" for i, word in enumerate(settings)]
    small_run = ["--train.steps", "2", "--parallel.ranks", "2", "--run.folder", str(tmp_path / "run")]
    assert train(["configs/tiny.toml", *small_run, "--reference_check.steps", "2", *memory]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--memory.offload", "True"], "memory.offload: needs memory.activation_checkpointing"),
        (["--memory.activation_checkpointing", "some"], "memory.activation_checkpointing: there is no 'some'"),
        (["--memory.loss_tile_tokens", "-1"], "memory.loss_tile_tokens: must be at least 1, not -1"),
    ],
)
def test_impossible_configurations_are_refused(settings, message):
    with pytest.raises(DistattnError, match=message):
        configuration.load("configs/tiny.toml", settings)


def test_a_count_gives_the_memory_and_whether_it_fits():
    rows = memory_of_run(lambda: small.build(torch.float32), plan(97, 4), MemorySettings(loss_tile_tokens=8))
    cluster = load("h200-1x4")
    assert fit_line(rows, cluster).startswith("fits: ") and " 141" in fit_line(rows, cluster)
    tiny = replace(cluster, device=replace(cluster.device, memory_gb=1e-6))
    assert fit_line(rows, tiny).startswith("does not fit: ")
    assert [row["fits"] for row in json.loads(memory_json(rows, tiny))] == [False] * len(rows)
