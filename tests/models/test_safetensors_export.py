"""Exported folders that plain transformers loads by name, with bitwise equal logits."""

import errno
import json
import os
from pathlib import Path

import model_shapes
import pytest
import torch
from processes import run_on_ranks
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from distattn.adapters import pytorch
from distattn.ir.errors import DistattnError
from distattn.models import export as exporting
from distattn.models.build import materialise, meta_model
from distattn.models.export import export_model, export_safetensors
from distattn.models.safetensors_files import INDEX


@pytest.mark.parametrize("size", [30_000, 10**9])
@pytest.mark.parametrize("name", model_shapes.NAMES)
def test_plain_transformers_computes_the_same_logits(name, size, tmp_path):
    model = model_shapes.materialised(name)
    done = export_model(model, tmp_path / "model", max_shard_bytes=size)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model_shapes.logits(theirs), model_shapes.logits(model))
    model_shapes.assert_equal(theirs.state_dict(), model.state_dict())
    assert (len(done.files) == 1) == (size > 10**6)
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe", "mixtral"])
def test_files_have_the_names_that_transformers_publishes(name, tmp_path):
    model = model_shapes.materialised(name)
    export_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    model_shapes.assert_equal(dict(sorted(ours.items())), dict(sorted(theirs.items())))


def _shards(rank: int, folder: str) -> tuple[tuple[str, ...], int] | None:
    model = meta_model(model_shapes.config("qwen3-moe"))
    pytorch.shard_parameters(model, init_device_mesh("cpu", (3,)))
    materialise(model, 1)
    done = export_model(model, folder, max_shard_bytes=30_000)
    return done and (done.files, done.total_bytes)


def test_shards_are_written_as_the_whole_model_is(tmp_path):
    (names, total), *others = run_on_ranks(3, _shards, str(tmp_path / "sharded"))
    assert others == [None, None]
    export_model(model_shapes.materialised("qwen3-moe"), tmp_path / "whole", max_shard_bytes=30_000)
    files = [file.name for file in (tmp_path / "whole").iterdir()]
    assert set(names) < set(files) and len(files) == len(names) + 2
    for file in files:
        assert (tmp_path / "sharded" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    index = json.loads((tmp_path / "whole" / INDEX).read_text())
    assert index["metadata"]["total_size"] == total
    assert all(os.path.getsize(tmp_path / "whole" / file) < 30_000 + 8_000 for file in names)


def _refused(rank: int, folder: str) -> str:
    model = meta_model(model_shapes.config("llama"))
    pytorch.shard_parameters(model, init_device_mesh("cpu", (2,)))
    materialise(model, 1)
    with pytest.raises(DistattnError) as caught:
        export_model(model, folder)
    return str(caught.value)


def test_all_ranks_learn_that_rank_0_could_not_write(tmp_path):
    errors = run_on_ranks(2, _refused, str(tmp_path))
    assert all("nothing is overwritten" in sentence for sentence in errors) and "rank 0 could not" in errors[1]


def test_one_files_tensors_are_held_at_a_time(tmp_path, monkeypatch):
    model = model_shapes.materialised("gpt-oss")
    held, most = 0, 0

    def tensors():
        nonlocal held, most
        for name, tensor in model.state_dict().items():
            held += tensor.numel() * 4
            most = max(most, held)
            yield name, tensor.clone()

    save = exporting.save_file

    def saved(of_one_file, *more, **named):
        nonlocal held
        save(of_one_file, *more, **named)
        held -= sum(tensor.numel() * 4 for tensor in of_one_file.values())

    monkeypatch.setattr(exporting, "save_file", saved)
    export_safetensors(tensors(), model.config, tmp_path / "model", max_shard_bytes=40_000)
    # at most, a shard and the tensor that did not fit into it are in memory
    assert most <= 40_000 + max(tensor.numel() * 4 for tensor in model.state_dict().values())


def test_the_configuration_says_the_dtype_and_the_class(tmp_path):
    model = model_shapes.materialised("gpt-oss")
    (tmp_path / "tokenizer.json").write_text("{}")
    export_model(model, tmp_path / "model", dtype=torch.bfloat16, tokenizer_files=[tmp_path / "tokenizer.json"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["GptOssForCausalLM"]
    assert (tmp_path / "model" / "tokenizer.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    wanted = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model_shapes.assert_equal(theirs.state_dict(), wanted)


def test_wrong_tensors_are_refused_by_name_and_nothing_is_left(tmp_path):
    model = model_shapes.materialised("llama")
    good = list(model.state_dict().items())
    for tensors, sentence in [
        (good[:-1], "lm_head.weight of LlamaForCausalLM is missing"),
        ([*good, good[0]], "embed_tokens.weight is not a tensor of LlamaForCausalLM, or is repeated"),
        ([("x", torch.ones(1))], "x is not a tensor of LlamaForCausalLM"),
        ([(good[0][0], torch.ones(2, 2))], r"embed_tokens.weight is \(2, 2\), but \(64, 32\) in LlamaForCausalLM"),
    ]:
        with pytest.raises(DistattnError, match=sentence):
            export_safetensors(iter(tensors), model.config, tmp_path / "out", max_shard_bytes=10_000)
    with pytest.raises(DistattnError, match="at least 1"):
        export_safetensors(good, model.config, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(DistattnError, match="no such tokenizer file"):
        export_safetensors(good, model.config, tmp_path / "out", tokenizer_files=["nowhere"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_gives_one_sentence_and_nothing_is_left(tmp_path: Path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporting, "save_file", full)
    model = model_shapes.materialised("llama")
    with pytest.raises(DistattnError, match="out: could not be written: .*No space left on device"):
        export_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
