"""The first parts of doctor scripts: correct model families and trainers."""

HEAD = """
import os
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig,
                          GPT2Config, GptOssConfig, LlamaConfig, MistralConfig, Qwen3Config)

import distattn as da
from distattn.adapters import huggingface, pytorch

SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.4, pad_token_id=0, bos_token_id=None, eos_token_id=None)
LENGTHS = [41, 1, 23, 32]
DTYPE = torch.{dtype}
ON_RANKS = dist.is_initialized


def attention_of(changes):
    # an attention implementation that forgets something, or has something else
    def attention(module, q, k, v, mask, **kwargs):
        return huggingface.attention_forward(module, q, k, v, None, **{{**kwargs, **changes(module, kwargs)}})
    AttentionInterface.register("careless", attention)
    AttentionMaskInterface.register("careless", huggingface.mask_pattern)
    return "careless"


def pack(seed=0, tokens=sum(LENGTHS)):
    ids = torch.randint(1, 64, (1, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 5:30] = -100
    return {{"input_ids": ids, "labels": labels, "document_lengths": LENGTHS}}


def batch():
    return pack()


def config():
    return CONFIG


def attention():
    return "distattn"


def build():
    huggingface.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(), attn_implementation=attention()).to(DTYPE)


def sum_gradients(model):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
"""
FAMILIES = {
    "llama": "CONFIG = LlamaConfig(**SIZE)",
    "qwen3": "CONFIG = Qwen3Config(**SIZE, tie_word_embeddings=True)",
    "mistral": "CONFIG = MistralConfig(**SIZE, sliding_window=6)",
    "gpt2": """
CONFIG = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
                    attn_pdrop=0.0, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
""",
    "gemma2": "CONFIG = Gemma2Config(**SIZE, sliding_window=6, attn_logit_softcapping=1.0, query_pre_attn_scalar=100)",
    "gemma3": """
CONFIG = Gemma3TextConfig(**SIZE, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
""",
    "gpt-oss": """
CONFIG = GptOssConfig(**SIZE, sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
""",
    "own": """
class Alone:
    # attention of one process
    def attention(self, q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)[0].transpose(0, 1)


def rotated(x, positions, base=100.0):
    # (tokens, heads, dim)
    angles = positions[0][:, None] * base ** (-torch.arange(4, device=x.device) / 4)
    cos, sin, (a, b) = angles.cos()[:, None], angles.sin()[:, None], x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.mlp = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, position_ids, context_parallel):
        q, k, v = self.qkv(self.norm(x[0])).view(-1, 3, 4, 8).unbind(1)
        q, k = rotated(q, position_ids), rotated(k, position_ids)
        x = x + self.out(context_parallel.attention(q, k, v).flatten(1))
        return x + self.mlp(F.gelu(x))


class Own(nn.Module):
    def __init__(self, learned=False):
        super().__init__()
        self.tokens, self.places = nn.Embedding(64, 32), nn.Embedding(128, 32) if learned else None
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(self, input_ids, position_ids, context_parallel):
        x = self.tokens(input_ids)
        if self.places is not None:
            x = x + self.places(position_ids)
        for block in self.blocks:
            x = block(x, position_ids, context_parallel)
        return self.lm_head(x)


def build():
    torch.manual_seed(0)
    model = Own()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.to(DTYPE)


def reference(model, ids):
    return model(ids, torch.arange(ids.shape[1])[None], Alone())
""",
}
FAMILIES["hybrid"] = (
    FAMILIES["own"]
    + """
from distattn.kernels.recurrence.tokens import RecurrenceTokens, token_by_token


def read(q, k, v, g, beta, sequences):
    # each sequence of tokens from an empty state, token by token
    x = RecurrenceTokens(*(y.float() for y in (q * q.shape[2] ** -0.5, k, v, g, beta)))
    out = torch.zeros_like(x.v)
    for own in sequences:
        part = RecurrenceTokens(*(y[own] for y in x))
        out = out.index_copy(0, own, token_by_token(part, [(0, len(own))], x.v.new_zeros(1, 4, 8, 8))[0])
    return out.to(v.dtype)


class Alone(Alone):
    def recurrence(self, q, k, v, op, g, beta):
        return read(q, k, v, g, beta, [torch.arange(len(q))])

    def causal_conv1d(self, x, weight, bias):
        return F.conv1d(F.pad(x.t(), (3, 0))[None], weight[:, None], bias, groups=32)[0].t()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.qkv = nn.LayerNorm(32), nn.Conv1d(32, 32, 4, groups=32), nn.Linear(32, 96)
        self.gates, self.out = nn.Linear(32, 8), nn.Linear(32, 32)

    def convolved(self, x, context_parallel):
        return context_parallel.causal_conv1d(x, self.conv.weight.squeeze(1), bias=self.conv.bias)

    def forward(self, x, position_ids, context_parallel):
        normed = self.norm(x[0])
        q, k, v = self.qkv(F.silu(self.convolved(normed, context_parallel))).view(-1, 3, 4, 8).unbind(1)
        decay, beta = self.gates(normed).chunk(2, -1)
        how = dict(g=-0.02 * F.softplus(decay.float()), beta=beta.sigmoid())
        o = context_parallel.recurrence(q, F.normalize(k, dim=-1), v, "gated_delta_rule", **how)
        return x + self.out(o.flatten(1))


class Own(Own):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Recurrent(), Block(), Recurrent()])
"""
)
TRAINERS = {
    "loop": """
def model():
    return build()
""",
    "DDP": """
def model():
    return nn.parallel.DistributedDataParallel(build()) if ON_RANKS() else build()
def setup(cp, model):
    cp.loss_scale(pytorch.ProbeTarget(model))
def backward(model, loss):
    loss.backward()
""",
    "FSDP2": """
def model():
    found = build()
    if ON_RANKS():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
        if hasattr(found, "get_decoder"):
            for layer in (found.get_decoder().h if hasattr(found.get_decoder(), "h") else found.get_decoder().layers):
                fully_shard(layer, mesh=mesh)
        fully_shard(found, mesh=mesh)
    return found
def setup(cp, model):
    cp.loss_scale(pytorch.ProbeTarget(model))
def backward(model, loss):
    loss.backward()
""",
    "DeepSpeed": """
MICRO_BATCHES = 1
def model():
    if not ON_RANKS():
        return build()
    import deepspeed
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = build()
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_BATCHES,
                "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    if DTYPE == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1, momentum=0.9)
    return deepspeed.initialize(model=found, model_parameters=found.parameters(), optimizer=optimizer, config=settings)[0]
def setup(cp, model):
    from distattn.adapters import deepspeed
    cp.loss_scale(deepspeed.ProbeTarget(model))
def backward(model, loss):
    model.backward(loss)
    if not model.is_gradient_accumulation_boundary():
        model.step()
def gradients(model):
    from deepspeed.utils import safe_get_full_grad
    return {name: safe_get_full_grad(p).clone() for name, p in model.module.named_parameters()}
""",
}
