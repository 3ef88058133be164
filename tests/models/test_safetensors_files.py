"""Reading published files: each rank reads its part by the names in the files, or gets an error naming tensor and file."""

import json
from pathlib import Path

import model_shapes
import pytest
import torch
from processes import run_on_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distattn.adapters import pytorch
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.models.build import meta_model
from distattn.models.export import export_model
from distattn.models.safetensors_files import INDEX, ONE_FILE, load_pretrained

KINDS = ("llama-tied", "yarn", "mistral", "gpt-oss", "qwen3-moe", "mixtral")


def export(name: str, folder: Path, **how) -> dict[str, torch.Tensor]:
    """Export the model `name` with all of its weights. Return its tensors."""
    model = model_shapes.materialised(name)
    export_model(model, folder, **how)
    return model.state_dict()


def loaded(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = meta_model(model_shapes.config(name), dtype=dtype)
    load_pretrained(model, folder)
    return model.state_dict()


def _sharded(rank: int, ranks: int, folder: str) -> dict[str, tuple[int, int, dict[str, torch.Tensor], torch.Tensor]]:
    mesh = init_device_mesh("cpu", (ranks,))
    results = {}
    for name in KINDS:
        model = meta_model(model_shapes.config(name))
        pytorch.shard_parameters(model, mesh)
        read = load_pretrained(model, Path(folder, name))
        held = sum(parameter.to_local().numel() * 4 for parameter in model.parameters())
        whole = {key: tensor.full_tensor() for key, tensor in model.state_dict().items()}
        results[name] = read, held, whole, model_shapes.logits(model)
    return results


# none of the sizes is divisible by 3
@pytest.mark.sampled(3)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_each_rank_reads_its_part_and_no_more(ranks, tmp_path):
    wanted = {name: export(name, tmp_path / name, max_shard_bytes=30_000) for name in KINDS}
    by_rank = run_on_ranks(ranks, _sharded, ranks, str(tmp_path))
    for name in KINDS:
        total = json.loads((tmp_path / name / INDEX).read_text())["metadata"]["total_size"]
        assert sum(results[name][0] for results in by_rank) == total
        for results in by_rank:
            read, held, tensors, logits = results[name]
            assert read == held
            model_shapes.assert_equal(tensors, wanted[name])
            assert torch.equal(logits, model_shapes.logits(model_shapes.materialised(name)))


def _columns(rank: int, folder: str) -> int:
    model = meta_model(model_shapes.config("llama"))
    # shard matrices along their last dimension
    columns = lambda parameter: torch.distributed.tensor.Shard(parameter.dim() - 1)  # noqa: E731
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=columns)
    read = load_pretrained(model, folder)
    whole = {key: tensor.full_tensor() for key, tensor in model.named_parameters()}
    model_shapes.assert_equal(whole, dict(model_shapes.materialised("llama").named_parameters()))
    return read


def test_columns_are_read_where_columns_are_held(tmp_path):
    tensors = export("llama", tmp_path / "model")
    assert run_on_ranks(2, _columns, str(tmp_path / "model")) == [sum(x.numel() * 4 for x in tensors.values()) // 2] * 2


def test_values_are_converted_to_the_models_dtype(tmp_path):
    wanted = export("qwen3-moe", tmp_path / "model")
    got = loaded("qwen3-moe", tmp_path / "model", torch.bfloat16)
    model_shapes.assert_equal(got, {name: tensor.bfloat16() for name, tensor in wanted.items()})


@pytest.fixture
def folder(tmp_path):
    export("llama", tmp_path / "model")
    return tmp_path / "model"


def rewritten(folder: Path, change) -> Path:
    tensors = load_file(folder / ONE_FILE)
    change(tensors)
    save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})
    return folder


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop(K), rf"model: its safetensors have no tensor for {K} of LlamaForCausalLM"),
        (
            lambda tensors: tensors.update(extra=torch.ones(1)),
            "model.safetensors: extra is not a tensor of LlamaForCausalLM",
        ),
        (
            lambda tensors: tensors.update({K: torch.ones(16, 16)}),
            rf"model.safetensors: {K} gives {K} a shape \(16, 16\), but it is \(16, 32\)",
        ),
        (lambda tensors: tensors.update({K: torch.ones(16, 32, dtype=torch.int8)}), rf"{K} is I8; only F64, F32"),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, change, sentence):
    model = meta_model(model_shapes.config("llama"))
    with pytest.raises(DistattnError, match=sentence):
        load_pretrained(model, rewritten(folder, change))
    # nothing was allocated
    assert model.lm_head.weight.is_meta


def test_a_model_that_has_weights_is_refused(folder):
    model = meta_model(model_shapes.config("llama"))
    load_pretrained(model, folder)
    with pytest.raises(DistattnError, match="embed_tokens.weight has values already"):
        load_pretrained(model, folder)


def test_frequencies_that_old_files_hold_are_left_out(folder):
    wanted = loaded("llama", folder)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model_shapes.assert_equal(loaded("llama", rewritten(folder, lambda tensors: tensors.update(old))), wanted)


def test_an_incomplete_list_of_experts_is_refused(tmp_path):
    export("qwen3-moe", tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(
        DistattnError, match=r"layers.1.mlp.experts.gate_up_proj is made of 6 tensors .*, but the files have 5"
    ):
        loaded("qwen3-moe", rewritten(tmp_path / "model", lambda tensors: tensors.pop(name)))


def test_a_tied_tensor_may_have_either_name_or_both(tmp_path):
    wanted = export("llama-tied", tmp_path / "model")
    embedding = wanted["model.embed_tokens.weight"]
    two_names = rewritten(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    model_shapes.assert_equal(loaded("llama-tied", two_names), wanted)
    other = rewritten(two_names, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    model_shapes.assert_equal(loaded("llama-tied", other), wanted)
    with pytest.raises(
        DistattnError, match="lm_head.weight and model.embed_tokens.weight differ, but config.json ties them"
    ):
        loaded(
            "llama-tied", rewritten(other, lambda tensors: tensors.update({"model.embed_tokens.weight": embedding + 1}))
        )


def test_files_that_cannot_be_read_are_named(folder, tmp_path):
    whole = (folder / ONE_FILE).read_bytes()
    for damaged in (whole[:1000], whole[:-1], b"\xff" * 100, b""):
        (folder / ONE_FILE).write_bytes(damaged)
        with pytest.raises(DamagedDataError, match=r"model.safetensors: cannot be read as safetensors"):
            loaded("llama", folder)
    (folder / ONE_FILE).unlink()
    with pytest.raises(DistattnError, match="there is neither model.safetensors nor"):
        loaded("llama", folder)
    export("llama", tmp_path / "many", max_shard_bytes=30_000)
    index = tmp_path / "many" / INDEX
    (tmp_path / "many" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        DistattnError, match="model-00002-of-00003.safetensors: the index names it, but there is no such"
    ):
        loaded("llama", tmp_path / "many")
    for text, sentence in [
        ("[", "is not an index"),
        ("[]", "is not an index"),
        ('{"weight_map": {"a": "../b"}}', "not the name of a"),
    ]:
        index.write_text(text)
        with pytest.raises(DamagedDataError, match=sentence):
            loaded("llama", tmp_path / "many")


def test_quantised_weights_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(DistattnError, match=r"its weights are quantised \(mxfp4\)"):
        loaded("llama", folder)
