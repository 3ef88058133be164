"""Planted mistakes in model families and trainers are named, none passes as correct, and healthy set-ups have no
findings.
"""

from pathlib import Path

import pytest
from planted import MISTAKES, script
from processes import run_on_ranks

from distattn.doctor import diagnosis
from distattn.doctor.diagnosis import diagnose
from distattn.doctor.rank_run import run_on_this_rank
from distattn.doctor.target import Target
from distattn.launch import doctor_command

BF16 = "bfloat16"
# (family, trainer, mistake, the doctor's name for the mistake), optionally followed by the dtype
PLANTED = [
    ("llama", "loop", "positions from 0", "positions not sharded"),
    ("gpt2", "DDP", "positions from 0", "positions not sharded"),
    ("gemma3", "FSDP2", "positions from 0", "positions not sharded"),
    ("gpt-oss", "DeepSpeed", "positions from 0", "positions not sharded"),
    ("llama", "loop", "positions from 0", "positions not sharded", BF16),
    ("gpt2", "loop", "positions over the pack", "positions not sharded"),
    ("own", "loop", "counts itself", "positions not sharded"),
    ("own", "DDP", "counts itself, learned", "positions not sharded"),
    ("own", "loop", "shift of tokens", "tokens mixed"),
    ("llama", "FSDP2", "no lengths", "documents not separated"),
    ("gpt2", "DeepSpeed", "no lengths", "documents not separated"),
    ("own", "FSDP2", "no lengths", "documents not separated"),
    ("gemma3", "loop", "no lengths", "documents not separated", BF16),
    ("llama", "DDP", "other lengths", "documents not those of the batch"),
    ("own", "DDP", "other lengths", "documents not those of the batch"),
    ("llama", "loop", "full mask", "mask not causal"),
    ("qwen3", "DDP", "full mask", "mask not causal"),
    ("own", "loop", "full mask", "mask not causal", BF16),
    ("llama", "FSDP2", "window of the mask", "document_mask"),
    ("own", "loop", "window of the mask", "document_mask"),
    ("llama", "DDP", "sdpa", "context parallelism off"),
    ("gpt2", "loop", "sdpa", "context parallelism off"),
    ("llama", "FSDP2", "sdpa", "context parallelism off", BF16),
    ("mistral", "loop", "no window", "window dropped"),
    ("gemma3", "DDP", "no window", "window dropped"),
    ("mistral", "FSDP2", "window + 1", "window off by one"),
    ("gpt-oss", "loop", "window - 1", "window off by one"),
    ("gemma3", "DeepSpeed", "window + 1", "window off by one"),
    ("mistral", "loop", "window - 1", "window off by one", BF16),
    ("gemma2", "loop", "no softcap", "softcap dropped"),
    ("gpt-oss", "loop", "no sink", "sink dropped"),
    ("gemma2", "FSDP2", "no scale", "scale dropped"),
    ("llama", "DDP", "other base", "RoPE base"),
    ("gpt-oss", "loop", "other base", "RoPE base"),
    ("llama", "loop", "coarse frequencies", "RoPE base"),
    ("own", "loop", "own base", "RoPE base"),
    ("llama", "FSDP2", "other eps", "setting differs"),
    ("llama", "loop", "model's own loss", "labels shifted twice"),
    ("gpt2", "FSDP2", "model's own loss", "labels shifted twice"),
    ("gemma3", "DeepSpeed", "model's own loss", "labels shifted twice", BF16),
    ("gpt2", "loop", "shifted after sharding", "labels shifted after sharding"),
    ("own", "DDP", "shifted after sharding", "labels shifted after sharding"),
    ("llama", "loop", "not shifted", "labels not shifted"),
    ("gpt-oss", "FSDP2", "not shifted", "labels not shifted"),
    ("llama", "loop", "five lost", "labels lost"),
    ("gpt2", "DeepSpeed", "five lost", "labels lost"),
    ("gemma3", "FSDP2", "one lost", "labels lost", BF16),
    ("own", "DDP", "one lost", "labels lost"),
    ("llama", "DDP", "leaked", "labels over document ends"),
    ("own", "loop", "leaked", "labels over document ends", BF16),
    ("gemma3", "loop", "no label mask", "label mask dropped"),
    ("gpt-oss", "DeepSpeed", "no label mask", "label mask dropped"),
    ("llama", "DDP", "mean on each rank", "mean of means"),
    ("gpt2", "FSDP2", "mean on each rank", "mean of means"),
    ("llama", "loop", "compensated afterwards", "mean of means"),
    ("own", "DDP", "mean of documents", "tokens weighted unequally"),
    ("qwen3", "FSDP2", "a sum", "loss not divided"),
    ("gemma3", "DeepSpeed", "a sum", "loss not divided"),
    ("llama", "DDP", "no scale of the trainer", "loss scale forgotten"),
    ("gpt2", "FSDP2", "no scale of the trainer", "loss scale forgotten"),
    ("own", "DeepSpeed", "no scale of the trainer", "loss scale forgotten"),
    ("llama", "FSDP2", "scale twice", "loss scale doubled"),
    ("gemma3", "DDP", "scale twice", "loss scale doubled", BF16),
    ("llama", "DDP", "not measured", "gradient factor"),
    ("gpt-oss", "FSDP2", "not measured", "gradient factor"),
    ("gpt2", "DeepSpeed", "not measured", "gradient factor"),
    ("own", "loop", "averaged", "gradient factor"),
    ("llama", "loop", "summed twice", "gradient factor"),
    ("qwen3", "loop", "not summed", "gradients not reduced"),
    ("own", "loop", "head not summed", "gradients not reduced"),
    ("gpt2", "loop", "head doubled", "gradient differs"),
    ("llama", "loop", "head doubled", "gradient differs", BF16),
    ("llama", "loop", "head frozen", "gradient missing"),
    ("gpt2", "DDP", "each micro-batch alone", "micro-batches miscounted"),
    ("llama", "FSDP2", "each micro-batch alone", "micro-batches miscounted"),
    ("own", "loop", "divided by the micro-batches", "micro-batches miscounted"),
    ("gpt2", "loop", "dropout", "dropout on"),
    ("gpt2", "DeepSpeed", "dropout", "dropout on"),
    ("llama", "loop", "noise", "random numbers"),
    ("gpt2", "loop", "other seeds", "weights differ"),
    ("own", "loop", "other seeds", "weights differ"),
    ("llama", "loop", "other frequencies on rank 1", "buffers differ"),
    ("own", "loop", "a count of tokens", "buffer not synchronised"),
    ("llama", "DDP", "other batches", "batches differ"),
    ("gemma3", "loop", "halves", "tokens misplaced"),
    ("gpt2", "loop", "padding", "padding kept"),
    ("llama", "loop", "attention dropout", "refused"),
    ("gpt2", "loop", "attention dropout", "refused"),
    ("own", "loop", "no such method", "failed"),
    ("llama", "loop", "exit", "failed"),
    ("llama", "loop", "not a number", "not finite"),
    ("llama", "loop", "head missing on rank 1", "gradient missing"),
    ("llama", "loop", "logits scaled", "unknown"),
    ("llama", "loop", "layer scaled", "values changed"),
    ("own", "loop", "own window", "window off by one"),
    ("own", "loop", "rolled twice", "labels shifted twice"),
    ("own", "DDP", "a layer by itself", "tokens mixed"),
    ("own", "loop", "a tuple, and no lengths", "documents not separated"),
    ("gpt2", "loop", "no dropout on ranks", "gradient factor"),
    ("llama", "loop", "a scaled loss, head doubled", "gradient differs"),
    ("gpt2", "loop", "rank 1 has none", "labels lost"),
    ("llama", "loop", "over all tokens", "loss over all tokens"),
    ("llama", "loop", "tokens left out", "tokens dropped"),
    ("llama", "loop", "up_proj not summed", "gradients not reduced", BF16),
    ("llama", "DDP", "mean on each rank", "mean of means", BF16),
    ("llama", "DDP", "layer scaled a little", "values changed"),
    ("qwen3", "FSDP2", "layer scaled", "values changed", BF16),
]
# the first module with wrong results, keyed by mistake
FIRST = {
    "positions from 0": "model.rotary_emb",
    "no lengths": "model.rotary_emb",
    "no window": "model.layers.0.self_attn.o_proj",
    "layer scaled": "model.layers.1.mlp",
    "layer scaled a little": "model.layers.1.mlp",
}

AUTOCAST = """
def forward(model, part):
    with torch.autocast("cpu", torch.{dtype}):
        return pytorch.forward(model, part)
"""
FAMILIES = ("llama", "gpt2", "gemma3", "gpt-oss", "own")
HEALTHY = {
    **{f"{family}, {on}": (family, on) for family in FAMILIES for on in ("loop", "DDP", "FSDP2", "DeepSpeed")},
    **{f"{family}, {on}, bf16": (family, on, BF16) for family in FAMILIES for on in ("loop", "FSDP2")},
    **{f"{family}, DeepSpeed, bf16": (family, "DeepSpeed", BF16) for family in ("llama", "gpt2")},
    **{f"{family}, fp16": (family, "loop", "float16") for family in ("llama", "mistral", "own")},
    **{f"{family}, fp64": (family, "loop", "float64") for family in ("qwen3", "own")},
    **{f"autocast to {low}": ("llama", "DDP", "float32", AUTOCAST.format(dtype=low)) for low in (BF16, "float16")},
    "gemma2": ("gemma2", "loop"),
    "mistral": ("mistral", "FSDP2"),
    "two micro-batches": ("llama", "loop", "float32", "def batch():\n    return [pack(1), pack(2)]"),
    "two micro-batches of DDP": ("own", "DDP", "float32", "def batch():\n    return [pack(1), pack(2)]"),
    "two micro-batches of DeepSpeed": (
        "gpt2",
        "DeepSpeed",
        "float32",
        "MICRO_BATCHES = 2\ndef batch():\n    return [pack(1), pack(2)]",
    ),
    "tokens spread otherwise": (
        "llama",
        "loop",
        "float32",
        'def context_parallel():\n    return da.ContextParallel(strategy="ulysses", kernel="reference", layout="block_cyclic")',
    ),
    "checkpointed layers": (
        "llama",
        "loop",
        "float32",
        "def model():\n    found = build()\n    found.gradient_checkpointing_enable()\n    return found.train()",
    ),
    "keys of its own": (
        "llama",
        "loop",
        "float32",
        "def batch():\n    return {**pack(), 'weights': torch.ones(97)}\n"
        "def shard(cp, batch):\n    return cp.shard({name: batch[name] for name in batch if name != 'weights'})",
    ),
    "padding": ("gpt2", "loop", "float32", MISTAKES["padding"].split("def shard")[0]),
    "the whole loss on every rank": (
        "llama",
        "loop",
        "float32",
        "def loss(logits, part):\n    share = pytorch.loss_of(logits, part)\n    whole = share.detach().clone()\n"
        "    dist.all_reduce(whole)\n    return share + (whole - share).detach()",
    ),
    "gradients that are reduced when asked for": (
        "llama",
        "loop",
        "float32",
        "def backward(model, loss):\n    loss.backward()\n"
        "def gradients(model):\n    sum_gradients(model)\n    return {name: p.grad for name, p in model.named_parameters()}",
    ),
    "a factor of one's own": (
        "llama",
        "DDP",
        "float32",
        "def setup(cp, model):\n    pass\n"
        "def loss(logits, part):\n    count = (part['labels'] != -100).sum()\n    dist.all_reduce(count)\n"
        "    return F.cross_entropy(logits[0], part['labels'][0], reduction='sum') / count * dist.get_world_size()",
    ),
    "a loss in bf16": (
        "llama",
        "loop",
        BF16,
        "def loss(logits, part):\n"
        "    each = F.cross_entropy(logits[0], part['labels'][0], reduction='none')\n"
        "    return each.float().sum() * part['loss_scale']",
    ),
    "a loss that works in place": (
        "own",
        "loop",
        "float32",
        "def loss(logits, part):\n"
        "    logits -= logits.detach().amax(-1, keepdim=True)\n    return pytorch.loss_of(logits, part)",
    ),
    "a scale of NumPy's": (
        "own",
        "loop",
        "float32",
        "import numpy as np\nclass Scaled(Own):\n    def __init__(self):\n        super().__init__()\n"
        "        self.scale = 1 / np.sqrt(8)\nOwn = Scaled",
    ),
    "weights compensated before backward": (
        "llama",
        "loop",
        "float32",
        "def loss(logits, part):\n    COUNT[0] = (part['labels'] != -100).sum()\n"
        "    return F.cross_entropy(logits[0], part['labels'][0])\nCOUNT = [None]\n"
        "def backward(model, loss):\n    total = COUNT[0].clone()\n    dist.all_reduce(total)\n"
        "    (loss * COUNT[0] / total).backward()\n    sum_gradients(model)",
    ),
    "functions without modules": (
        "own",
        "loop",
        BF16,
        "class Plain(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.table, self.mix, self.back = (nn.Parameter(torch.zeros(64, 32)) for _ in range(3))\n"
        "    def forward(self, input_ids, position_ids, context_parallel):\n"
        "        x = self.table[input_ids[0]]\n        q = rotated((x @ self.mix.T).view(-1, 4, 16)[..., :8], position_ids)\n"
        "        x = x + context_parallel.attention(q, q, q).flatten(1)\n        return (x @ self.back.T)[None]\nOwn = Plain",
    ),
    "batches of an iterator": ("llama", "loop", "float32", MISTAKES["a batch that changes"]),
    "a scaled loss": (
        "llama",
        "loop",
        "float32",
        "def backward(model, loss):\n    (loss * 65536).backward()\n    sum_gradients(model)\n    for p in model.parameters():\n"
        "        p.grad /= 65536",
    ),
}


def _examine(rank: int, scripts: list[str]) -> list[dict]:
    return [run_on_this_rank(Target(path)) for path in scripts]


def diagnoses(folder: Path, texts: list[str]):
    """Return the doctor's diagnoses of scripts. The same two ranks run all scripts in turn."""
    scripts = []
    for number, text in enumerate(texts):
        scripts.append(str(folder / f"target{number}.py"))
        Path(scripts[-1]).write_text(text)
    by_rank = run_on_ranks(2, _examine, scripts)
    return [diagnose(Target(path), results) for path, *results in zip(scripts, *by_rank, strict=True)]


def _name(case) -> str:
    return ", ".join(part for index, part in enumerate(case) if index != 3)


GROUPS = {
    trainer: [case for case in PLANTED if case[1] == trainer] for trainer in ("loop", "DDP", "FSDP2", "DeepSpeed")
}


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.parametrize("trainer", GROUPS)
def test_planted_mistakes_are_named(tmp_path, trainer):
    if trainer == "DeepSpeed":
        pytest.importorskip("deepspeed")
    cases = GROUPS[trainer]
    texts = [script(family, on, mistake, dtype=(*dtype, "float32")[0]) for family, on, mistake, _, *dtype in cases]
    wrong = []
    for case, result in zip(cases, diagnoses(tmp_path, texts), strict=True):
        if not result.findings or result.findings[0].cause != case[3]:
            wrong.append(f"{_name(case)}: {result}")
        if case[0] in ("llama", "mistral") and result.first_difference != FIRST.get(case[2], result.first_difference):
            wrong.append(f"{_name(case)}: {result.first_difference} is named as the first to differ")
    assert not wrong, "\n".join(wrong)


def test_enough_mistakes_are_planted():
    assert len([case for case in PLANTED if case[3] != "unknown"]) >= 60 and len(HEALTHY) >= 40
    assert len({family for family, *_ in PLANTED}) >= 5 and set(GROUPS) == {trainer for _, trainer, *_ in PLANTED}


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.parametrize("trainer", GROUPS)
def test_healthy_set_ups_have_no_finding(tmp_path, trainer):
    if trainer == "DeepSpeed":
        pytest.importorskip("deepspeed")
    cases = {name: case for name, case in HEALTHY.items() if case[1] == trainer}
    texts = [
        script(family, on, dtype=(*rest, "float32")[0], more=rest[1] if len(rest) > 1 else "")
        for family, on, *rest in cases.values()
    ]
    results = dict(zip(cases, diagnoses(tmp_path, texts), strict=True))
    assert not {name: result for name, result in results.items() if result.findings}
    in_fp32 = {name: result for name, result in results.items() if cases[name][2:3] in ((), ("float32",))}
    exact = {name: result.measured["gradient"] for name, result in in_fp32.items()}
    assert not {name: ratio for name, ratio in exact.items() if abs(ratio - 1) > 1e-4 and "autocast" not in name}


def test_ok_mentions_that_the_steps_of_ranks_could_not_be_repeated(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(diagnosis, "Replay", fail)
    (result,) = diagnoses(tmp_path, [script("llama", "loop", dtype="bfloat16")])
    assert not result.findings and result.measured["hidden"] > 0.01
    doctor_command._show_diagnosis(result, 2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "could not be repeated module by module (" in printed and "no hooks here" in printed
    assert "give the doctor the model in float32" in printed
