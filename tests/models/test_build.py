"""Initial weights: independent of the sharding, distributed as transformers draws them, and never complete on one rank."""

from pathlib import Path

import model_shapes
import pytest
import torch
from live_bytes import LiveBytes
from processes import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, MambaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from distattn.adapters import pytorch
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.models.build import llama_config, materialise, materialise_buffers, meta_model, model_config


@pytest.mark.parametrize("name", model_shapes.NAMES)
def test_tensors_have_the_distribution_that_transformers_gives_them(name):
    torch.manual_seed(0)
    config = model_shapes.config(name)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ours = model_shapes.materialised(name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        got = ours.state_dict()[key]
        assert got.dtype == tensor.dtype
        if tensor.unique().numel() <= 1:
            assert torch.equal(got, tensor), key
        elif tensor.numel() > 100:
            # the standard error of a standard deviation is 1 / sqrt(2 n)
            assert abs(got.std() / tensor.std() - 1) < 5 * tensor.numel() ** -0.5, key
            assert not torch.equal(got, tensor), key
    for (key, got), (other, wanted) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert key == other and got.dtype == wanted.dtype and torch.equal(got, wanted), key


def test_a_tied_embedding_is_drawn_once_and_keeps_its_padding_row():
    model = model_shapes.materialised("llama-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight[3].any() and model.lm_head.weight[2].all()


def test_rotary_frequencies_are_float32_in_a_bfloat16_model():
    model = meta_model(model_shapes.config("yarn"), dtype=torch.bfloat16)
    materialise(model, 1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, model_shapes.materialised("yarn").model.rotary_emb.inv_freq)


def test_buffers_alone_are_those_of_the_whole_model():
    for name in model_shapes.NAMES:
        model = meta_model(model_shapes.config(name))
        materialise_buffers(model)
        assert not any(parameter.is_meta for parameter in model.parameters())
        model_shapes.assert_equal(dict(model.named_buffers()), dict(model_shapes.materialised(name).named_buffers()))


def test_seeds_matter_and_torchs_own_generator_is_left_alone():
    before = torch.get_rng_state()
    first, second = (meta_model(model_shapes.config("llama")) for _ in range(2))
    materialise(first, 1)
    materialise(second, 2)
    assert torch.equal(before, torch.get_rng_state())
    layers = first.model.layers
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(layers[0].self_attn.q_proj.weight, layers[1].self_attn.q_proj.weight)


def _gathered(rank: int, sizes: tuple[int, ...], names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards")[-len(sizes) :])
    gathered = {}
    for name in names:
        model = meta_model(model_shapes.config(name))
        for layer in model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        materialise(model, 1)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        whole = {key: tensor.full_tensor() for key, tensor in model.named_parameters()}
        gathered[name] = whole | {"logits": model_shapes.logits(model)} | dict(model.named_buffers())
    return gathered


# none of the sizes is divisible by 3
@pytest.mark.sampled(4)
@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 2)], ids=str)
def test_weights_do_not_depend_on_the_sharding(sizes):
    names = ("llama-tied", "llama3-rope", "qwen3", "gemma", "gpt-oss", "qwen3-moe", "gpt2")
    for gathered in run_on_ranks(int(torch.tensor(sizes).prod()), _gathered, sizes, names):
        for name, tensors in gathered.items():
            model = model_shapes.materialised(name)
            logits = tensors.pop("logits")
            model_shapes.assert_equal(tensors, dict(model.named_parameters()) | dict(model.named_buffers()))
            assert torch.equal(logits, model_shapes.logits(model)), name


def _loss(rank: int, ranks: int) -> tuple[float, float]:
    """Return the loss and gradient norm of a step with attention split over all ranks."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    model = meta_model(model_shapes.config("gpt-oss"))
    pytorch.shard_parameters(model, mesh)
    materialise(model, 1)
    with pytorch.context_parallel(mesh, strategy="ring", kernel="reference") as cp:
        cp.loss_scale(pytorch.ProbeTarget(model))
        (local,) = cp.shard_step([{"input_ids": model_shapes.IDS, "document_lengths": [30, 10]}])
        loss = pytorch.local_loss(model, local)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return cp.mean_loss([loss.detach()]), float(pytorch.full_tensor(norm))


def test_a_step_of_a_sharded_model_is_that_of_one_process():
    wanted = run_on_ranks(1, _loss, 1)[0]
    for got in run_on_ranks(2, _loss, 2):
        # two ranks compute float32 sums in a different order
        assert got == pytest.approx(wanted, rel=1e-5)


def _peak(rank: int, config: LlamaConfig) -> tuple[int, int, int, int]:
    mesh = init_device_mesh("cpu", (4,))
    with LiveBytes() as live:
        model = meta_model(config)
        pytorch.shard_parameters(model, mesh)
        built = live.peak
        materialise(model, 1)
    sizes = [sum(p.numel() * 4 for p in module.parameters(recurse=False)) for module in model.modules()]
    return built, live.peak, sum(p.numel() * 4 for p in model.parameters()), max(sizes)


@pytest.mark.full
def test_a_rank_holds_its_share_and_one_module_of_a_narrow_70b():
    # 80 layers with the proportions of Llama 3 70B, 64 times narrower
    shape = dict(num_layers=80, hidden_size=128, num_attention_heads=64, num_key_value_heads=8, intermediate_size=448)
    config = llama_config(**shape, vocab_size=2004, max_position_embeddings=64)
    for built, peak, whole, largest in run_on_ranks(4, _peak, config):
        assert built < 0.001 * whole
        # norms and rotary frequencies add a few bytes
        assert whole / 4 + largest <= peak < 1.01 * (whole / 4 + largest)


def test_the_page_on_models_has_the_numbers_of_a_70b():
    shape = dict(
        num_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672
    )
    model = meta_model(llama_config(**shape, vocab_size=128_256, max_position_embeddings=8192))
    count = sum(parameter.numel() for parameter in model.parameters())
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert f"{count:,}" in page and f"{largest:,}" in page
    for size in (4, 2):
        for number in (count, count / 8, count / 64, largest):
            assert f"{number * size / 1e9:.1f} GB" in page


def test_tied_tensors_that_are_sharded_apart_are_refused():
    for sentence in run_on_ranks(2, _tied_apart):
        assert "lm_head.weight and model.embed_tokens.weight are tied, but were sharded apart" in sentence


def _tied_apart(rank: int) -> str:
    model = meta_model(model_shapes.config("llama-tied"))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.model.embed_tokens, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(DistattnError) as caught:
        materialise(model, 1)
    return str(caught.value)


def test_a_tensor_that_nothing_initialises_is_refused_by_name(monkeypatch):
    theirs = LlamaPreTrainedModel._init_weights
    skip = lambda self, module: None if "Norm" in type(module).__name__ else theirs(self, module)  # noqa: E731
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", skip)
    with pytest.raises(DistattnError, match="does not initialise model.layers.0.input_layernorm.weight"):
        model_shapes.materialised("llama")


def test_models_that_cannot_be_materialised_are_refused_by_name():
    with pytest.raises(DistattnError, match="has values already"):
        materialise(model_shapes.materialised("llama"), 1)
    model = meta_model(model_shapes.config("llama"))
    model.lm_head = torch.nn.Linear(32, 65, bias=False, device="meta")
    with pytest.raises(DistattnError, match=r"lm_head.weight is \(65, 32\), but \(64, 32\) by the model's config"):
        materialise(model, 1)
    model = meta_model(model_shapes.config("llama"))
    model.extra = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(DistattnError, match="extra.bias is only in one of the model and its configuration"):
        materialise(model, 1)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (T5Config(), "no causal language model of type 't5'"),
        (MambaConfig(num_hidden_layers=1), "layer 0 is a linear_attention layer"),
        (FalconConfig(num_hidden_layers=1), "falcon models have their own attention classes"),
    ],
    ids=lambda case: getattr(case, "model_type", ""),
)
def test_models_that_cannot_be_split_are_refused_by_name(config, sentence):
    with pytest.raises(DistattnError, match=sentence):
        meta_model(config)


def test_configurations_that_cannot_be_read_are_refused_by_name(tmp_path: Path):
    with pytest.raises(DistattnError, match="there is no config.json"):
        model_config(tmp_path)
    file = tmp_path / "config.json"
    for text, error, sentence in [
        ("{", DamagedDataError, "cannot be read as JSON"),
        ("{}", DistattnError, "has no model_type"),
        ('{"model_type": "no_such"}', DistattnError, "model_type 'no_such'"),
        ('{"model_type": "gemma3"}', DistattnError, "takes more than text"),
        ('{"model_type": "llama", "num_attention_heads": "x"}', DistattnError, "cannot read it"),
    ]:
        file.write_text(text)
        with pytest.raises(error, match=sentence):
            model_config(tmp_path)
    model_shapes.config("gpt-oss").save_pretrained(tmp_path)
    assert model_config(str(tmp_path)).num_local_experts == 4
