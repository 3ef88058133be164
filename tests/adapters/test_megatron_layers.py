"""Megatron-core's latent attention, Gated DeltaNet, Mamba-2 and experts on CPU ranks compared to a single process."""

import zlib

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import small  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.mamba import MambaModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.ssm import gated_delta_net, mamba_mixer  # noqa: E402
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules  # noqa: E402
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig  # noqa: E402
from megatron_models import (  # noqa: E402
    SequenceNorm,
    build,
    config_of,
    context_parallel,
    schedule,
    start,
    wrapped,
)
from processes import run_on_ranks  # noqa: E402
from test_megatron import zigzag  # noqa: E402

import distattn as da  # noqa: E402
from distattn.adapters import megatron  # noqa: E402

pytestmark = pytest.mark.sampled(4)

LATENT = dict(
    of=MLATransformerConfig,
    multi_latent_attention=True,
    num_query_groups=None,
    q_lora_rank=16,
    kv_lora_rank=12,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=6,
)
MODELS = {
    "latent": {**LATENT, "rope_type": "rope"},
    "latent, yarn": {**LATENT, "q_lora_rank": None, "rope_type": "yarn", "original_max_position_embeddings": 16},
    "gated delta net": dict(
        linear_key_head_dim=6,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        deterministic_mode=True,
    ),
    # numbers of heads that context-parallel ranks could not split evenly
    "mamba": dict(mamba_state_dim=6, mamba_head_dim=8, mamba_num_heads=6, mamba_num_groups=2, num_layers=3),
}
RECURRENT = ["gated delta net", "mamba"]


class DenseAttention(torch.nn.Module):
    """Latent attention as Transformer Engine computes it. Megatron's own core attention requires equal widths of keys
    and values.
    """

    def __init__(self, config, softmax_scale: float, **others):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q, k, v, mask, **others):
        scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * self.scale
        weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,kbhe->qbhe", weights, v).flatten(2)


class GatedNorm(torch.nn.Module):
    """A norm over each group of channels, which mamba-ssm has only on GPUs."""

    def __init__(self, width: int, eps: float, group_size: int, **others):
        super().__init__()
        self.weight, self.eps, self.group = torch.nn.Parameter(torch.ones(width)), eps, group_size

    def forward(self, x):
        return F.rms_norm(x.unflatten(-1, (-1, self.group)), (self.group,), eps=self.eps).flatten(-2) * self.weight


def read_token_by_token(zxbcdt, weight, bias, dt_bias, a, D, headdim, ngroups, **others):  # noqa: N803
    """Compute token by token what mamba-ssm's fused kernel returns without a norm, (B, T, H * headdim)."""
    heads = len(a)
    inner = heads * headdim
    z, mixed, dt = zxbcdt.split([inner, zxbcdt.shape[-1] - 2 * inner + inner - heads, heads], -1)
    width = weight.shape[1]
    padded = F.pad(mixed, (0, 0, width - 1, 0))
    mixed = F.silu(sum(padded[:, i : i + mixed.shape[1]] * weight[:, i] for i in range(width)) + bias)
    keys = (mixed.shape[-1] - inner) // 2
    x, b, c = mixed.split([inner, keys, keys], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (y.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for y in (b, c))
    dt = F.softplus(dt + dt_bias)
    state, out = x.new_zeros(len(x), heads, b.shape[-1], headdim), []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        state = state * torch.exp(step * a[:, None, None]) + step * b[:, t, :, :, None] * x[:, t, :, None]
        out.append(torch.einsum("bhn,bhnp->bhp", c[:, t], state) + D[:, None] * x[:, t])
    return torch.stack(out, 1).flatten(2) * F.silu(z)


def without_kernels() -> None:
    """Replace the GPU kernels of Megatron's layers with their definitions in this process."""
    multi_latent_attention.HAVE_TE = False
    moe_utils.te_general_gemm = None
    gated_delta_net.HAVE_FLA = mamba_mixer.HAVE_MAMBA_SSM = True
    gated_delta_net.l2norm = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    mamba_mixer.ExtendedRMSNorm = GatedNorm
    mamba_mixer.mamba_split_conv1d_scan_combined = read_token_by_token
    torch.compiler.set_stance("force_eager")


def layer_spec(config, kind: str):
    latent = bool(getattr(config, "multi_latent_attention", False))
    layer, first = (
        get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, multi_latent_attention=latent, normalization="RMSNorm"
        )
        for _ in range(2)
    )
    norm = SequenceNorm if config.sequence_parallel else WrappedTorchNorm
    if config.sequence_parallel:
        for spec in (layer, first):
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    if kind == "gated delta net":
        parts = gated_delta_net.GatedDeltaNetSubmodules(ColumnParallelLinear, norm, RowParallelLinear)
        first.submodules.self_attention = ModuleSpec(gated_delta_net.GatedDeltaNet, submodules=parts)
        return TransformerBlockSubmodules(layer_specs=[first, layer], layer_norm=norm)
    if kind == "mamba":
        parts = mamba_mixer.MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear)
        mixer = ModuleSpec(mamba_mixer.MambaMixer, submodules=parts)
        recurrent = MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=get_bias_dropout_add)
        stack = MambaStackSubmodules(ModuleSpec(MambaLayer, submodules=recurrent), attention_layer=layer)
        return ModuleSpec(MambaStack, params={"post_layer_norm": False}, submodules=stack)
    return layer


def model_of(kind: str, config, ours: bool):
    without_kernels()
    spec = layer_spec(config, kind)
    if not ours and "latent" in kind:
        spec.submodules.self_attention.submodules.core_attention = DenseAttention
    if ours:
        spec = megatron.replace_core_attention(spec, kernel="reference")
    if kind != "mamba":
        return build(config, spec, position_embedding_type="rope")
    torch.manual_seed(0)
    settings = dict(hybrid_override_pattern="M*M", position_embedding_type="rope")
    return MambaModel(config, spec, small.VOCABULARY, 128, **settings)


def sums_of(model) -> list[torch.Tensor]:
    """Return a rank's gradients, summed over all ranks."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)
    return [parameter.grad for parameter in model.parameters()]


def _stock(rank: int, kind: str):
    """Return (loss, gradients, weights by name) of Megatron's own layers in one process, one document at a time."""
    start()
    model = model_of(kind, config_of(**MODELS[kind]), ours=False)
    total, valid = torch.zeros(()), 0
    for batch in small.step(0, 2):
        for ids in batch["input_ids"].split(batch["document_lengths"], 1):
            causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
            logits = model(ids, torch.arange(ids.shape[1])[None], causal)[0, :-1]
            total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            valid += ids.shape[1] - 1
    (total / valid).backward()
    return float(total / valid), sums_of(model), {name: weight.detach() for name, weight in model.named_parameters()}


def _ours(rank: int, kind: str, cp: int):
    start(cp=cp)
    config = config_of(cp=cp, **MODELS[kind])
    model = megatron.use_batch_positions(model_of(kind, config, ours=True))
    loss = 0.0
    with context_parallel(pad_to=2) as ours:
        for part in ours.shard_step(small.step(0, 2)):
            losses, loss_of = megatron.forward_step(iter([part]), model, config)
            share, _ = loss_of(losses)
            share.backward()
            loss += float(share.detach())
    whole = torch.tensor(loss)
    dist.all_reduce(whole)
    return float(whole), sums_of(model)


def same(results, wanted, tolerance: float = 1e-4) -> None:
    for loss, gradients in results:
        assert loss == pytest.approx(wanted[0], rel=1e-5)
        assert small.norm_ratio(gradients, wanted[1]) == pytest.approx(1, abs=tolerance)
        for gradient, wanted_gradient in zip(gradients, wanted[1], strict=True):
            assert float((gradient - wanted_gradient).norm()) <= tolerance * float(wanted_gradient.norm()) + 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_layers_of_packed_documents_are_megatrons_own_of_each_document(kind):
    (wanted,) = run_on_ranks(1, _stock, kind)
    for cp in (1, 2, 4):
        same(run_on_ranks(cp, _ours, kind, cp), wanted)


def _own_batches(rank: int, kind: str, cp: int):
    """Return [(loss, gradients)] of rows and of a pack that Megatron's own loaders shard, summed over ranks."""
    start(cp=cp)
    model = model_of(kind, config_of(cp=cp, **MODELS[kind]), ours=True)
    ids = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([0, 8, 40, 48], dtype=torch.int32)
    results = []
    for ids_, lengths, packed in (
        (ids, [48], None),
        (ids[:1], [8, 32, 8], PackedSeqParams("thd", ends, ends, max_seqlen_q=32, max_seqlen_kv=32)),
    ):
        tokens, labels = (zigzag(x, lengths, rank, cp) for x in (ids_, ids_.roll(-1, 1)))
        losses = model(tokens, torch.zeros_like(tokens), None, labels=labels, packed_seq_params=packed)
        losses.sum().backward()
        total = losses.detach().sum()
        dist.all_reduce(total)
        results.append((float(total), [gradient.clone() for gradient in sums_of(model)]))
        model.zero_grad()
    megatron.close(model)
    return results


@pytest.mark.parametrize("kind", ["latent", "gated delta net", "mamba"])
def test_batches_of_megatrons_own_loaders_do_not_depend_on_the_number_of_ranks(kind):
    (wanted,) = run_on_ranks(1, _own_batches, kind, 1)
    for results in run_on_ranks(2, _own_batches, kind, 2):
        for result, wanted_result in zip(results, wanted, strict=True):
            same([result], wanted_result)


def sections_of(name: str, config) -> list[int]:
    """Return the sizes of the sections of a full weight, each of which is split over the tensor-parallel ranks."""
    if "linear_fc1" in name:
        return [config.ffn_hidden_size] * 2
    inner, keys = config.mamba_num_heads, config.mamba_num_groups * config.mamba_state_dim
    if "mixer." in name:
        inner *= config.mamba_head_dim
        of_projection, of_convolution = [inner, inner, keys, keys, config.mamba_num_heads], [inner, keys, keys]
    else:
        keys, heads = config.linear_num_key_heads * config.linear_key_head_dim, config.linear_num_value_heads
        values = heads * config.linear_value_head_dim
        of_projection, of_convolution = [keys, keys, values, values, heads, heads], [keys, keys, values]
    return of_projection if "in_proj" in name else of_convolution if "conv1d" in name else []


def _tensor_parallel(rank: int, kind: str, weights: dict, gradients: list, changes: dict):
    """Return the loss on 2 tensor- x 2 context-parallel ranks, and this rank's gradient errors, keyed by name."""
    start(tp=2, cp=2)
    config = config_of(tp=2, cp=2, calculate_per_token_loss=True, **MODELS[kind], **changes)
    model = megatron.use_batch_positions(model_of(kind, config, ours=True))

    def own(name: str, weight, whole):
        if not getattr(weight, "tensor_model_parallel", False):
            return whole
        dim = getattr(weight, "partition_dim", -1)
        dim = 0 if dim < 0 else dim
        parts = whole.split(sections_of(name, config) or whole.shape[dim], dim)
        return torch.cat([part.chunk(2, dim)[parallel_state.get_tensor_model_parallel_rank()] for part in parts], dim)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(own(name, weight, weights[name]))
    chunk = wrapped(config, model, distributed_optimizer=False)
    with context_parallel(pad_to=2) as ours:
        reports = schedule(chunk, config, ours.shard_step(small.step(0, 2)))
    sums = torch.stack([sum(report[name] for report in reports).double() for name in ("loss_sum", "tokens")])
    dist.all_reduce(sums)
    errors = {}
    for (name, weight), whole in zip(model.named_parameters(), gradients, strict=True):
        wanted = own(name, weight, whole)
        errors[name] = float((weight.main_grad - wanted).norm() / wanted.norm())
    return float(sums[0] / sums[1]), errors


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_with_tensor_parallelism_are_those_of_one_process(kind, sequence_parallel):
    ((wanted, gradients, weights),) = run_on_ranks(1, _stock, kind)
    changes = {"sequence_parallel": sequence_parallel}
    for loss, errors in run_on_ranks(4, _tensor_parallel, kind, weights, gradients, changes):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert not {name: error for name, error in errors.items() if error > 1e-4}


def _parts_of_heads(rank: int) -> None:
    start(tp=2)
    config = config_of(tp=2, **MODELS["gated delta net"] | dict(linear_num_key_heads=1))
    with pytest.raises(da.DistattnError, match="linear_num_key_heads is 1, and heads are split over 2 tensor-parallel"):
        model_of("gated delta net", config, ours=True)


def test_tensor_parallelism_over_parts_of_heads_is_refused():
    run_on_ranks(2, _parts_of_heads)


EXPERTS = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
    moe_aux_loss_coeff=[2.0, 1.0],
    moe_z_loss_coeff=0.05,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=0.25,
    moe_ffn_hidden_size=24,
)


def _experts(rank: int, cp: int, ep: int, per_token: bool, stock_router: bool = False):
    """Return (loss, gradients by name, router biases, tokens counted by a probe) of a step of Megatron's schedule."""
    import megatron_on_cpu  # noqa: F401

    without_kernels()
    how = dict(context_parallel_size=cp, expert_model_parallel_size=ep, create_gloo_process_groups=False)
    parallel_state.initialize_model_parallel(1, 1, **how)
    config = config_of(cp=cp, expert_model_parallel_size=ep, calculate_per_token_loss=per_token, **EXPERTS)
    spec = megatron.replace_core_attention(layer_spec(config, "experts"), kernel="reference")
    model = megatron.use_batch_positions(build(config, spec))
    first = parallel_state.get_expert_model_parallel_rank() * EXPERTS["num_moe_experts"] // ep
    names = {}
    for name, parameter in model.named_parameters():
        before, separator, after = name.partition("local_experts.")
        number, _, rest = after.partition(".")
        names[parameter] = f"{before}{separator}{first + int(number)}.{rest}" if separator else name
        # use the same weights on every rank that holds an expert
        seeded = torch.Generator().manual_seed(zlib.crc32(names[parameter].encode()))
        torch.nn.init.normal_(parameter, std=0.2, generator=seeded)
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    for router in routers if stock_router else ():
        router.__class__ = TopKRouter
        megatron.padding_of = lambda *args: None
    chunk = wrapped(config, model, distributed_optimizer=False)
    # the stock router counts padding tokens, so add none
    with context_parallel(pad_to=1 if stock_router else 4) as ours:
        chunks = megatron.ProbeTarget([chunk], 2)
        ours.loss_scale(chunks)
        counted = [float(router.local_tokens_per_expert.sum()) for router in routers]
        chunk.zero_grad_buffer()
        reports = schedule(chunk, config, ours.shard_step(small.step(0, 2)))
    sums = torch.stack([sum(report[name] for report in reports).double() for name in ("loss_sum", "tokens")])
    dist.all_reduce(sums)
    gradients = {names[parameter]: chunks._gathered_gradient(parameter).clone() for parameter in model.parameters()}
    return float(sums[0] / sums[1]), gradients, [router.expert_bias for router in routers], counted


@pytest.mark.parametrize("per_token", [True, False])
def test_experts_and_the_losses_of_their_routers_are_those_of_one_process(per_token):
    ((loss, gradients, biases, _),) = run_on_ranks(1, _experts, 1, 1, per_token, True)
    for cp, ep in ((1, 1), (2, 2), (4, 1)):
        for got_loss, got, got_biases, counted in run_on_ranks(cp, _experts, cp, ep, per_token):
            assert got_loss == pytest.approx(loss, rel=1e-5)
            assert counted == [0, 0], "the probe has counted tokens"
            for bias, wanted_bias in zip(got_biases, biases, strict=True):
                assert torch.equal(bias, wanted_bias)
            for name, gradient in got.items():
                assert float((gradient - gradients[name]).norm()) <= 1e-4 * float(gradients[name].norm()), name
