"""Converting a Hugging Face folder to a checkpoint and back with the commands, without a process group."""

import json
from contextlib import closing
from pathlib import Path

import model_shapes
import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from distattn.adapters import pytorch
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch.ckpt import export_hf as ckpt_export_hf
from distattn.launch.ckpt import import_hf as ckpt_import_hf
from distattn.models.build import materialise, meta_model, model_config
from distattn.models.checkpoint_files import checkpoint_tensors
from distattn.models.export import export_model
from distattn.models.safetensors_files import load_pretrained


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3-moe"])
def test_a_folder_becomes_a_checkpoint_and_again_the_same_folder(name, tmp_path, capsys):
    model = model_shapes.materialised(name)
    export_model(model, tmp_path / "published", max_shard_bytes=40_000)
    assert ckpt_import_hf.main([str(tmp_path / "published"), str(tmp_path / "checkpoint")]) == 0
    (tmp_path / "published" / "tokenizer.json").write_text("{}")
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "back"), "--tokenizer", str(tmp_path / "published")]
    assert ckpt_export_hf.main([*arguments, "--max-shard-bytes", "40000"]) == 0
    assert "float32" in capsys.readouterr().out
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["back", "checkpoint", "published"]
    again = meta_model(model_config(tmp_path / "back"))
    load_pretrained(again, tmp_path / "back")
    model_shapes.assert_equal(again.state_dict(), model.state_dict())


def test_dtypes_are_converted_both_ways(tmp_path):
    model = model_shapes.materialised("llama")
    export_model(model, tmp_path / "published", dtype=torch.bfloat16)
    assert ckpt_import_hf.main([str(tmp_path / "published"), str(tmp_path / "one")]) == 0
    assert {tensor.dtype for _, tensor in checkpoint_tensors(tmp_path / "one")} == {torch.bfloat16}
    assert ckpt_import_hf.main([str(tmp_path / "published"), str(tmp_path / "two"), "--dtype", "float32"]) == 0
    got = dict(checkpoint_tensors(tmp_path / "two"))
    model_shapes.assert_equal(got, {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    assert ckpt_export_hf.main([str(tmp_path / "two"), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def _save(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = meta_model(model_shapes.config("llama"))
    pytorch.shard_parameters(model, mesh)
    materialise(model, 1)
    checkpoints = Checkpoints(
        Path(folder) / "checkpoints", group=dist.group.WORLD, facts={}, keep=KeepRule(), warn=pytest.fail
    )
    with closing(checkpoints):
        checkpoints.save(3, {"model": get_model_state_dict(model), "step": 3})
        checkpoints.wait()
    if rank == 0:
        model.config.save_pretrained(folder)


def test_a_sharded_checkpoint_is_exported_by_one_process(tmp_path):
    # the model's configuration is in the run's folder
    run_on_ranks(2, _save, str(tmp_path / "run"))
    assert ckpt_export_hf.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    model = meta_model(model_config(tmp_path / "out"))
    load_pretrained(model, tmp_path / "out")
    model_shapes.assert_equal(model.state_dict(), model_shapes.materialised("llama").state_dict())


def test_folders_that_are_not_checkpoints_are_refused_and_leave_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistattnError, match="has no checkpoints"):
        ckpt_export_hf.main([str(tmp_path / "empty"), str(tmp_path / "out")])
    export_model(model_shapes.materialised("llama"), tmp_path / "published")
    with pytest.raises(DistattnError, match="nothing is overwritten"):
        ckpt_import_hf.main([str(tmp_path / "published"), str(tmp_path / "empty")])
    with pytest.raises(DistattnError, match="has no tokenizer's files"):
        ckpt_export_hf.main([str(tmp_path / "x"), str(tmp_path / "y"), "--tokenizer", str(tmp_path / "empty")])
    ckpt_import_hf.main([str(tmp_path / "published"), str(tmp_path / "checkpoint")])
    with pytest.raises(DistattnError, match="exists; nothing is overwritten"):
        ckpt_export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "empty")])
    (data,) = (tmp_path / "checkpoint").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(DamagedDataError, match=rf"{data.name}"):
        ckpt_export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "out")])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint", "empty", "published"]
