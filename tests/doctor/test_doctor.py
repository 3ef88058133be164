"""The doctor names planted mistakes, finds nothing where there is none, and looks at the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from transformers import LlamaConfig
from waiting import LIMIT_SECONDS

from distattn.doctor.environment import check_machine
from distattn.doctor.rank_run import run_on_this_rank
from distattn.doctor.target import Target
from distattn.ir.errors import DistattnError
from distattn.launch import doctor_command as doctor

pytestmark = pytest.mark.sampled(4)

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, GptOssConfig, Gemma2Config, LlamaConfig

import distattn as da
from distattn.adapters import huggingface, pytorch

TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.4, pad_token_id=0, bos_token_id=None, eos_token_id=None)
LENGTHS = [41, 1, 23, 32]


def build(config=None, attention="distattn", **how):
    huggingface.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or LlamaConfig(**TINY), attn_implementation=attention, **how)


def model():
    return build()


def batch():
    ids = torch.randint(1, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :30] = -100
    return {"input_ids": ids, "labels": labels, "document_lengths": LENGTHS}


def careless(name, changes):
    # an attention implementation that forgets something
    def attention(module, q, k, v, mask, **kwargs):
        return huggingface.attention_forward(module, q, k, v, None, **{**kwargs, **changes})
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, huggingface.mask_pattern)
    return name


def sum_gradients(model):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
"""
MISTAKES = {
    "positions not sharded": """
def model():
    return build(attention=careless("no positions", {"position_ids": None}))
def forward(model, part):
    local = torch.arange(part["input_ids"].shape[1])[None]
    return pytorch.forward(model, {**part, "position_ids": local})
""",
    "documents not separated": """
def shard(cp, batch):
    return cp.shard({name: batch[name] for name in ("input_ids", "labels")})
""",
    "context parallelism off": """
def forward(model, part):
    model.set_attn_implementation("sdpa")
    return model(part["input_ids"], position_ids=part["position_ids"], use_cache=False).logits
""",
    "mask not causal": """
def context_parallel():
    return da.ContextParallel(strategy="ring", kernel="reference", document_mask="full")
""",
    "window dropped": """
from transformers import MistralConfig
def model():
    return build(MistralConfig(**TINY, sliding_window=6), careless("no window", {"sliding_window": None}))
""",
    "softcap dropped": """
def model():
    config = Gemma2Config(**TINY, sliding_window=6, attn_logit_softcapping=1.0, query_pre_attn_scalar=8)
    return build(config, careless("no cap", {"softcap": None}))
""",
    "sink dropped": """
def model():
    config = GptOssConfig(**TINY, sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
    return build(config, careless("no sink", {"s_aux": None}))
""",
    "scale dropped": """
def model():
    config = Gemma2Config(**TINY, sliding_window=6, query_pre_attn_scalar=100)
    return build(config, careless("no scale", {"scaling": None}))
""",
    "labels shifted after sharding": """
def loss(logits, part):
    ids = part["input_ids"][0]
    valid = (part["labels"] != -100).sum()
    return F.cross_entropy(logits[0, :-1], ids[1:], reduction="sum") * part["loss_scale"]
def batch():
    ids = torch.randint(1, 64, (1, 97), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "document_lengths": LENGTHS}
""",
    "labels not shifted": """
def loss(logits, part):
    return F.cross_entropy(logits[0], part["input_ids"][0], reduction="sum") * part["loss_scale"]
def batch():
    return {"input_ids": torch.randint(1, 64, (1, 97), generator=torch.Generator().manual_seed(0))}
""",
    "label mask dropped": """
def shard(cp, batch):
    return cp.shard({name: batch[name] for name in ("input_ids", "document_lengths")})
""",
    "mean of means": """
def loss(logits, part):
    return F.cross_entropy(logits[0], part["labels"][0]) / dist.get_world_size()
""",
    "loss not divided": """
def loss(logits, part):
    return F.cross_entropy(logits[0], part["labels"][0], reduction="sum")
""",
    "gradient factor": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    for p in model.parameters():
        p.grad /= dist.get_world_size()
""",
    "gradients not reduced": """
def backward(model, loss):
    loss.backward()
""",
    "gradient differs": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    model.lm_head.weight.grad *= 2
""",
    "gradient missing": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    if dist.get_rank() == 1:
        model.lm_head.weight.grad = None
""",
    "padding kept": """
def batch():
    ids = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
def shard(cp, batch):
    return cp.shard({name: batch[name] for name in ("input_ids", "labels")})
""",
    "random numbers": """
def forward(model, part):
    return pytorch.forward(model, part) + torch.randn(1)
""",
    "weights differ": """
def model():
    found = build()
    torch.nn.init.normal_(found.lm_head.weight, generator=torch.Generator().manual_seed(torch.distributed.get_rank()
                          if dist.is_initialized() else 0))
    return found
""",
    "batches differ": """
def batch():
    ids = torch.randint(1, 64, (1, 30), generator=torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0))
    return {"input_ids": ids}
""",
    "tokens misplaced": """
def shard(cp, batch):
    part = cp.shard(batch)
    half = sum(LENGTHS) // 2
    return {**part, "input_ids": batch["input_ids"][:, :half] if cp.rank == 0 else batch["input_ids"][:, half:]}
""",
    "refused": """
def model():
    return build(LlamaConfig(**TINY, attention_dropout=0.5)).train()
""",
    "failed": """
def loss(logits, part):
    return logits.no_such_thing()
""",
    "not finite": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    model.model.layers[1].mlp.up_proj.weight.grad[0, 0] = float("nan")
""",
    "unknown": """
def forward(model, part):
    return pytorch.forward(model, part) * (1.5 + torch.arange(64) / 64)
""",
}
FIRST = {
    "positions not sharded": "model.rotary_emb",
    "documents not separated": "model.rotary_emb",
    "window dropped": "model.layers.0.self_attn.o_proj",
}


def _examine(rank: int, target: str) -> dict:
    return run_on_this_rank(Target(target))


def diagnosis(folder: Path, body: str):
    script = folder / "target.py"
    script.write_text(SCRIPT + body)
    found = run_on_ranks(2, _examine, str(script))
    return doctor.compare_with_one_process(Target(str(script)), found)


@pytest.mark.parametrize("cause", MISTAKES)
def test_a_planted_mistake_is_named(tmp_path, cause):
    found = diagnosis(tmp_path, MISTAKES[cause])
    assert [finding.cause for finding in found.findings][:1] == [cause], found
    assert found.findings[0].observed and found.findings[0].remedy
    if cause in FIRST:
        assert found.first_difference == FIRST[cause]


@pytest.mark.full
def test_the_rank_that_failed_first_is_blamed(tmp_path):
    body = """
def forward(model, part):
    if dist.is_initialized() and dist.get_rank() == 1:
        raise RuntimeError("the real cause")
    return pytorch.forward(model, part)
"""
    script = tmp_path / "target.py"
    script.write_text(SCRIPT + body)
    # ranks that end, as they do for the command: the other one loses its connection
    (finding,) = doctor.examine_target(str(script), 2).findings
    assert finding.cause == "failed" and "rank 1: RuntimeError: the real cause (target.py, line" in finding.observed


HEALTHY = {
    "checkpointed layers": """
def model():
    found = build()
    found.gradient_checkpointing_enable()
    return found.train()
""",
    "keys of its own": """
def batch():
    ids = torch.randint(1, 64, (1, 97), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "document_lengths": LENGTHS, "weights": torch.ones(97)}
def shard(cp, batch):
    return cp.shard({name: batch[name] for name in ("input_ids", "document_lengths")})
""",
    "llama": "",
    "gpt-oss": """
def model():
    return build(GptOssConfig(**TINY, sliding_window=6, num_local_experts=2, num_experts_per_tok=1))
""",
    "gemma2": """
def model():
    return build(Gemma2Config(**TINY, sliding_window=6, attn_logit_softcapping=1.0, query_pre_attn_scalar=100))
""",
    "padding": MISTAKES["padding kept"].split("def shard")[0],
    "whole loss on every rank": """
def loss(logits, part):
    share = F.cross_entropy(logits[0], part["labels"][0], reduction="sum") * part["loss_scale"]
    whole = share.detach().clone()
    dist.all_reduce(whole)
    return share + (whole - share).detach()
""",
    "sharded parameters": """
from torch.distributed.device_mesh import init_device_mesh
def model():
    found = build()
    if dist.is_initialized():
        pytorch.shard_parameters(found, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",)))
    return found
def setup(cp, model):
    cp.loss_scale(pytorch.ProbeTarget(model))
def backward(model, loss):
    loss.backward()
""",
    "DDP": """
def model():
    found = build()
    return torch.nn.parallel.DistributedDataParallel(found) if dist.is_initialized() else found
def setup(cp, model):
    assert cp.loss_scale(pytorch.ProbeTarget(model)) == dist.get_world_size()
def backward(model, loss):
    loss.backward()
""",
    "gradients that are reduced when asked for": """
def backward(model, loss):
    loss.backward()
def context_parallel():
    cp = da.ContextParallel(strategy="ulysses", kernel="reference", layout="document_zigzag", layout_options={"min_chunk": 8})
    return cp
def shard(cp, batch):
    return cp.shard(batch)
def gradients(model):
    sum_gradients(model)
    return {name: p.grad for name, p in model.named_parameters()}
""",
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_where_nothing_is_wrong(tmp_path, name):
    found = diagnosis(tmp_path, HEALTHY[name])
    assert not found.findings, found
    assert found.measured["loss"] == pytest.approx(1, abs=1e-4)
    assert found.measured["gradient"] == pytest.approx(1, abs=1e-3)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distattn.launch.cli", "doctor", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)


@pytest.mark.full
def test_the_command_examines_a_configuration_and_says_so(tmp_path):
    tiny = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    LlamaConfig(**tiny, bos_token_id=None, eos_token_id=None).save_pretrained(tmp_path)
    done = run(str(tmp_path), "--ranks", "4")
    assert done.returncode == 0, done.stderr
    assert "4 ranks compute what one process does" in done.stdout
    script = tmp_path / "target.py"
    script.write_text(SCRIPT + MISTAKES["gradient factor"])
    done = run(str(script), "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["findings"][0]["cause"] == "gradient factor" and report["measured"]["gradient"] == pytest.approx(0.5)
    done = run(str(script))
    assert "wrong gradient factor: all gradients are 0.5 times the right ones on 2 ranks" in " ".join(
        done.stdout.split()
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.py"], "there is no script nowhere.py"),
        (["nowhere"], "neither a script"),
        (["--ranks", "0"], "at least 1, not 0"),
        (["--rank", "2"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, sentence, capsys):
    from distattn.launch import cli

    assert cli.main(["doctor", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_script_without_a_model_or_with_strange_functions_is_refused(tmp_path):
    script = tmp_path / "target.py"
    script.write_text("x = 1")
    with pytest.raises(DistattnError, match="has no function model"):
        Target(str(script))
    script.write_text("def model(): pass\ndef loss(logits): pass")
    with pytest.raises(DistattnError, match="loss is a function that takes logits, part"):
        Target(str(script))
    script.write_text("import torch\ndef model(): return torch.nn.Linear(2, 2)")
    target = Target(str(script))
    with pytest.raises(DistattnError, match="has to define reference"):
        target.reference(target.model(), torch.zeros(1, 2))
    for text, sentence in (
        ("def model(:", "cannot be imported: SyntaxError: .* .target.py, line 1."),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
        ("def model(): pass\nloss = 3.0", "loss is a function that takes logits, part"),
        ("def model(): pass\ndef prepare(cp, model): pass", "Did you mean setup.cp, model.[?]"),
        ("def model(): pass\nbatch = {}", "batch is a function that takes nothing"),
    ):
        script.write_text(text)
        with pytest.raises(DistattnError, match=sentence):
            Target(str(script))
    script.write_text("def model(): pass\ndef forward(model, part, **more): pass")
    Target(str(script))
    script.write_text("def model(): raise ValueError('no weights')")
    with pytest.raises(DistattnError, match="model.. fails in one process.*ValueError: no weights"):
        doctor.compare_with_one_process(Target(str(script)), [{}])


def test_the_machine_is_looked_at(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    found = {check.name: check for check in check_machine()}
    assert {"python", "torch", "triton", "ports", "host name", "/dev/shm"} <= found.keys()
    assert found["torch"].ok and found["ports"].ok
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"].ok is None
    assert found["MASTER_ADDR"].ok is False and found["MASTER_ADDR"].advice
