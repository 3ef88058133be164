"""Tests with nonsense as input: a public function or command either works or refuses with one of our own messages, and
does so quickly.
"""

import inspect
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import distattn as da
from distattn.launch import cli
from distattn.training.config import run_file as configuration

ROOT = Path(__file__).parents[1]
# much longer than any of these calls takes, even on a busy machine
TOO_LONG = 60.0
LENGTHS = [5, 3, 8]
MASK, LAYOUT = da.Mask.documents(LENGTHS), da.Layout.zigzag(LENGTHS, 2)
SHAPE = dict(heads=4, kv_heads=2, head_dim=8, dtype="float32")
PLAN = da.make_plan(MASK, LAYOUT, strategy="ring", **SHAPE)
ALONE = da.make_plan(MASK, da.Layout.zigzag(LENGTHS, 1), strategy="ring", **SHAPE)
IDS = torch.arange(16)[None]
BATCH = {"input_ids": IDS, "document_lengths": LENGTHS}


def anything():
    """Return values of all kinds. Every call creates new values, because some can be used only once."""
    numbers = [0, 1, 2, 3, -1, 7, 64, 10**9, 2**62, 10**30, 1.5, -0.5, float("nan"), float("inf"), True, np.int64(4)]
    texts = ["", "x", "1GB", "ring", "causal", "float32", "h200-1x2", "/nowhere", "a\0b", b"bytes", "é" * 300]
    lists = [[], [1], [0], [-1], [16], [5, 3, 8], [1.5], ["a"], [[1, 2], [3]], [None], (), (1, 2), (2, 1, 0), range(3)]
    maps = [{}, {"a": 1}, {"input_ids": IDS}, {1: 2}, set(), {"chunk": "big"}, {"tolerance": -1}, {"block": 0}]
    arrays = [np.zeros(3), np.arange(4), np.array("a"), np.zeros((2, 6), np.int64), torch.zeros(2, 3), torch.zeros(0)]
    tensors = [torch.ones(16, 4, 8), torch.ones(16, 2, 8), torch.tensor(3), torch.tensor([[1.5]]), IDS, -IDS, IDS > 3]
    ours = [MASK, LAYOUT, PLAN, ALONE, da.Mask, da.Cluster(1, 2), torch.float32, torch.bfloat16, np.float64]
    rest = [None, object(), lambda *args: None, iter([]), Path("nowhere"), type, torch.nn.Linear(2, 2)]
    return [*numbers, *texts, *lists, *maps, *arrays, *tensors, *ours, *rest]


def right_calls():
    """Return (function, valid arguments) for all public functions that a single process can call."""
    calls = [
        (da.Mask.full, dict(n=16)),
        (da.Mask.causal, dict(n=16)),
        (da.Mask.sliding_window, dict(n=16, left=3, right=1, sink_tokens=1)),
        (da.Mask.documents, dict(lengths=LENGTHS, document_mask=(3, 0), sink_tokens=1)),
        (da.Mask.shared_question, dict(lengths=LENGTHS)),
        (da.Mask.causal_blockwise, dict(lengths=LENGTHS)),
        (da.Mask.token_shift, dict(lengths=LENGTHS, distance=1)),
        (da.Mask.prefix_lm, dict(n=16, prefix=4)),
        (da.Mask.prefix_lm_documents, dict(lengths=LENGTHS, prefix=[1, 2, 3])),
        (da.Mask.global_sliding_window, dict(n=16, left=2, right=2, n_global=1)),
        (da.Mask.block_causal, dict(n=16, block=4)),
        (da.Mask.block_causal_documents, dict(lengths=LENGTHS, block=2)),
        (da.Mask.by_head, dict(groups=[(2, MASK), (2, da.Mask.causal(16))])),
        (da.Mask.from_pieces, dict(array=[[0, 4, 0, 4, -9, 0]], n=4)),
        (MASK.area, dict(q=(0, 4), k=(0, 9))),
        (MASK.cut, dict(q=(0, 4), k=(0, 9))),
        (MASK.needed_keys, dict(q_set=[(0, 4)])),
        (MASK.tiles, dict(bm=4, bn=4)),
        (da.Layout.contiguous, dict(lengths=LENGTHS, ranks=2)),
        (da.Layout.zigzag, dict(lengths=LENGTHS, ranks=2)),
        (da.Layout.document_zigzag, dict(lengths=LENGTHS, ranks=2, min_chunk=2)),
        (da.Layout.block_cyclic, dict(lengths=LENGTHS, ranks=2, block=2)),
        (da.Layout.balanced, dict(lengths=LENGTHS, ranks=2, mask=MASK, chunk=2, tolerance=0.1)),
        (da.Layout.placed, dict(lengths=LENGTHS, ranks=2, mask=MASK, tolerance=0.1)),
        (da.Layout.from_chunks, dict(lengths=LENGTHS, chunks=[[(0, 9)], [(9, 16)]])),
        (LAYOUT.tokens, dict(rank=1)),
        (LAYOUT.position_ids, dict(rank=1)),
        (LAYOUT.shard, dict(x=torch.arange(16), rank=1, dim=0)),
        (LAYOUT.unshard, dict(shards=[torch.arange(8), torch.arange(8)], dim=0)),
        (LAYOUT.shift_labels, dict(labels=torch.arange(16), dim=0, ignore_index=-100)),
        (da.Cluster, dict(nodes=1, devices=2)),
        (
            da.make_plan,
            dict(mask=MASK, layout=LAYOUT, strategy="cad", backward="refetch-home", v_head_dim=8, config=None, **SHAPE),
        ),
        (
            da.make_plan,
            dict(mask=MASK, layout=LAYOUT, strategy="ring", comm_dtype="float32", cluster="h200-1x2", **SHAPE),
        ),
        (da.make_plan, dict(mask=MASK, layout=LAYOUT, strategy="cad", options={"block": 4}, **SHAPE)),
        (
            da.make_plan,
            dict(mask=MASK, layout=LAYOUT, strategy="scan", op="kda", options={"state_first": True}, **SHAPE),
        ),
        (da.verify, dict(plan=PLAN, max_buffer_bytes=10**6)),
        (da.simulate, dict(plan=PLAN, cluster="h200-1x2", proof=None)),
        (da.explain, dict(plan=PLAN, cluster=da.Cluster(1, 2))),
        (da.quality, dict(plan=PLAN, cluster=da.Cluster(1, 2))),
        (
            da.prepare,
            dict(plan=ALONE, group=None, kernel="reference", device="cpu", max_buffer_bytes=10**6, proven=True),
        ),
        (da.Plan.load, dict(path="nowhere")),
        (da.cu_seqlens, dict(mask=MASK)),
    ]
    q, k = torch.ones(16, 4, 8), torch.ones(16, 2, 8)
    numbers = dict(group=None, scale=0.5, softcap=0.0, dropout=0.0, kernel="reference", return_lse=False)
    calls.append((da.attention, dict(q_THD=q, k_TKD=k, v_TKE=k, plan=ALONE, **numbers)))
    layer = dict(dtype="float32", heads=4, head_dim=8, v_head_dim=8, options=None)
    on_one_rank = da.Layout.zigzag(LENGTHS, 1)
    gla = da.make_plan(MASK, on_one_rank, strategy="scan", kv_heads=2, op="gla", **layer)
    gates = dict(g=-torch.ones(16, 4, 8), beta=None, initial_state=torch.zeros(3, 4, 8, 8))
    some = dict(group=None, scale=0.5, kernel="chunked", return_final_state=False)
    calls.append((da.recurrence, dict(q_TGK=k, k_TGK=k, v_THV=q, plan=gla, **gates, **some)))
    halo = da.make_plan(
        da.Mask.documents(LENGTHS, (2, 0)), on_one_rank, strategy="ring", kv_heads=4, op="convolution", **layer
    )
    taps = dict(weight=torch.ones(32, 3), plan=halo, group=None, bias=torch.ones(32), activation="silu")
    taps |= dict(initial_state=torch.zeros(3, 32, 2))
    calls.append((da.causal_conv1d, dict(x_TC=torch.ones(16, 32), **taps)))
    moved = da.make_plan(
        da.Mask.token_shift(LENGTHS, 1), on_one_rank, strategy="ring", kv_heads=4, op="token_shift", **layer
    )
    calls.append((da.token_shift, dict(x_T=torch.ones(16, 32), plan=moved, group=None, fill=0)))
    mla = da.make_plan(MASK, on_one_rank, strategy="ring", kv_heads=1, op=da.latent_op(2, 5), **layer)
    latents = dict(rope_TR=torch.ones(16, 2), latent_TL=torch.ones(16, 5), up_HEL=torch.ones(4, 14, 5))
    calls.append((da.latent_attention, dict(q_THD=q, plan=mla, group=None, scale=0.5, kernel="reference", **latents)))
    calls.append((da.latent_op, dict(rotary_dim=2, latent_dim=5)))
    calls.append(
        (da.make_latent_plan, dict(mask=MASK, layout=on_one_rank, strategy="ring", rotary_dim=2, latent_dim=5, **layer))
    )
    calls.append((da.make_recurrent_plan, dict(mask=MASK, layout=on_one_rank, kv_heads=2, op="gla", **layer)))
    sums = dict(heads=4, latents=3, v_head_dim=8, dtype="float32")
    softmaxes = da.make_prefix_softmax_plans(MASK, on_one_rank, **sums)
    logits = dict(logits_THL=torch.ones(16, 4, 3), v_THV=q, plans=softmaxes, group=None)
    states = dict(initial_state=None, return_final_state=False)
    calls.append((da.make_prefix_softmax_plans, dict(mask=MASK, layout=on_one_rank, strategy="scan", **sums)))
    calls.append((da.prefix_softmax, dict(weights_THL=torch.ones(16, 4, 3), **logits, **states)))
    maxima = dict(plan=softmaxes.maximum, group=None, initial_state=torch.zeros(3, 4, 3))
    calls.append((da.prefix_max, dict(x_THV=torch.ones(16, 4, 3), return_final_state=False, **maxima)))
    calls.append((da.Op, dict(name="mine", kind="recurrence", merge="never", decay="token", delta=True)))
    settings = dict(group=None, loss_group=None, strategy="ring", layout="zigzag", layout_options={}, data="replicated")
    settings |= dict(document_mask="causal", kernel="reference", backward="refetch-home", comm_dtype=None, cluster=None)
    settings |= dict(
        options={}, max_buffer_bytes=None, verify_every=2, pad_to=2, servers=0, adaptive=False, timeout=9.0
    )
    calls.append((closed, settings | dict(config=None)))
    del settings["group"], settings["loss_group"]
    calls.append((da.AttentionConfig, settings | dict(layers={0: {"strategy": "ring"}}, context_parallel_size=None)))
    calls.append((da.OverlapSchedule, dict(layers=[torch.nn.Linear(2, 2)], model=None)))
    cp = da.ContextParallel(strategy="ring", kernel="reference")
    run = dict(
        op="gla", layers=2, width=8, heads=4, kv_heads=2, head_dim=8, v_head_dim=8, dtype=torch.float32, device="cpu"
    )
    calls += [
        (cp.shard, dict(batch=BATCH)),
        (lambda **batch: cp.shard(batch), {**BATCH, "labels": IDS, "shift_labels": None}),
        (lambda **batch: cp.shard(batch), {"input_ids": IDS, "position_ids": IDS, "attention_mask": None}),
        (lambda **batch: cp.shard(batch), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
        (cp.shard_step, dict(micro_batches=[BATCH, BATCH])),
        (lambda loader: list(cp.steps(loader)), dict(loader=[BATCH, [BATCH]])),
        (cp.loss_scale, dict(target=None)),
        (cp.mean_loss, dict(losses=[torch.ones(())])),
        (da.recurrent_span, run | dict(batch=cp.shard(BATCH)["context_parallel"])),
    ]
    return calls


def closed(**settings):
    """Create a driver with `settings`, shard a batch and close the driver."""
    with da.ContextParallel(**settings) as cp:
        cp.shard(BATCH)


def some_calls(cases, seed):
    """Call functions with one or two arguments replaced by arbitrary values. Return the failures that are not refusals."""
    chance, wrong = random.Random(seed), {}
    calls = right_calls()
    for _ in range(cases):
        function, right = chance.choice(calls)
        arguments = dict(right)
        for name in chance.sample(list(right), min(len(right), chance.choice([1, 1, 2]))):
            arguments[name] = chance.choice(anything())
        began = time.monotonic()
        try:
            function(**arguments)
        except da.DistattnError as refusal:
            if not str(refusal).strip():
                wrong[f"{function}: an empty sentence"] = arguments
        except Exception as error:
            changed = {name: value for name, value in arguments.items() if value is not right[name]}
            wrong.setdefault(
                f"{getattr(function, '__qualname__', function)}: {type(error).__name__}", (str(error)[:80], changed)
            )
        if time.monotonic() - began > TOO_LONG:
            wrong[f"{function}: too long"] = arguments
    return wrong


def test_right_calls_are_right_and_an_object_fits_nowhere():
    for function, right in right_calls():
        if function is not da.Plan.load:
            function(**right)
        for name in right:
            with pytest.raises(da.DistattnError):
                function(**{**right, name: object()})


def test_every_public_name_is_called():
    called = {getattr(function, "__qualname__", "").split(".")[0] for function, _ in right_calls()}
    # types that are returned rather than created by users, functions that need several ranks, and functions that other
    # calls reach
    others = {"Call", "Executable", "Explanation", "Payload", "Proof", "Table", "Timeline", "block_mask"}
    others |= {
        "RecurrentSpan",
        "PrefixSoftmaxPlans",
        "PrefixSoftmaxState",
        "serve",
        "save_attention",
        "ContextParallel",
    }
    public = {name for name in da.__all__ if not (inspect.isclass(getattr(da, name)) and name.endswith("Error"))}
    assert public <= called | others


@pytest.mark.parametrize(
    ("calls", "seed"),
    [(400, seed) for seed in range(10)]
    + [pytest.param(9600, seed, marks=pytest.mark.full) for seed in range(100, 105)],
)
def test_nonsense_is_refused_in_a_sentence(calls, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = some_calls(calls, seed)
    assert not wrong, "\n".join(f"{failure}: {case}" for failure, case in wrong.items())
    assert not os.listdir(tmp_path)


WORDS = [
    "",
    "x",
    "-1",
    "0",
    "1.5",
    "1e99",
    "nan",
    "/",
    "/dev/null",
    "é",
    "a b",
    "--",
    "-h",
    "=",
    "h200-1x2",
    "4,5",
    "[1,2]",
]
WORDS += [
    "99999999999999999999",
    "true",
    "ring",
    "ring,usp",
    "32:8",
    "0:0",
    "a:b",
    "a\nb",
    "nowhere.toml",
    "4x99999999",
]


def some_commands(cases, seed, folder):
    """Run `cases` random command lines. Return the failures (exceptions, unexpected exit codes and long runs), each
    with its command line.
    """
    chance, wrong = random.Random(seed), {}
    config = folder / "config.toml"
    config.write_text(f'[data]\npath = "{ROOT}/configs"\ntokens_per_step = 4096\n[run]\nfolder = "{folder}/run"\n')
    keys = configuration.all_keys()
    options = ["docs", "tokens", "cluster", "ranks", "strategy", "layout", "heads", "head-dim", "dtype", "json", "html"]
    for _ in range(cases):
        kind = chance.randrange(4)
        if kind == 0:
            line = ["plan", "--docs=300,200", "--cluster=h200-1x2", "--strategy=ring"]
            line += [f"--{chance.choice(options)}={chance.choice(WORDS)}" for _ in range(chance.randrange(1, 3))]
        elif kind == 1:
            line = ["launch", chance.choice(["slurm", "local"]), str(config), "--dry-run"]
            line += [f"--{chance.choice(keys)}={chance.choice(WORDS)}" for _ in range(chance.randrange(1, 3))]
        elif kind == 2:
            line = [
                chance.choice(["plan", "launch", "calibrate", "moon"]),
                *chance.choices(WORDS, k=chance.randrange(1, 3)),
            ]
        else:
            line = [
                "launch",
                chance.choice(["status", "logs", "cancel", "x"]),
                *chance.choices(WORDS, k=chance.randrange(3)),
            ]
        began = time.monotonic()
        try:
            code = cli.main(line)
        except BaseException as error:
            wrong[f"{type(error).__name__}: {str(error)[:90]}"] = line
            continue
        if code not in (0, 1, 2, 3) or time.monotonic() - began > TOO_LONG:
            wrong[f"exit code {code} after {time.monotonic() - began:.0f} s"] = line
    return wrong


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.full] if seed > 1 else []) for seed in range(6)]
)
def test_nonsense_on_the_command_line_is_refused_in_a_sentence(seed, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    wrong = some_commands(200, seed, tmp_path)
    assert not wrong, "\n".join(f"{failure}: {line}" for failure, line in wrong.items())
    assert sorted(os.listdir(tmp_path)) == ["config.toml", "here"]


def test_too_many_arguments_are_reported_with_the_functions_name():
    with pytest.raises(TypeError, match=r"Mask.causal\(\) takes 1 positional argument but 2 were given"):
        da.Mask.causal(1, 2)
