"""The training loop: a small Llama on packed text, every step's tokens and all parameters split over the ranks.

`main` is one rank of a run, started by `distattn.launch`. The run folder holds the resolved
configuration and the list of documents of every pack; nothing else is shared but the process group.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

from distattn.adapters import pytorch
from distattn.data.text import VOCABULARY, read_tokens
from distattn.ir.errors import DistattnError
from distattn.kernels.registry import CPU_KERNELS
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.metrics import Progress
from distattn.training.run_folder import Run, Step


def main(folder: str, json_lines: bool) -> int:
    """One rank of a run. Returns the exit code."""
    run = Run(Path(folder))
    config = configuration.load(run.config_file)
    # ranks share the machine's cores; more threads than cores only wait for each other
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.parallel.ranks))
    device = torch.device("cpu")
    if config.parallel.kernel not in CPU_KERNELS:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    try:
        train(run, config, json_lines, device)
    except DistattnError as error:
        sys.stderr.write(f"distattn: rank {dist.get_rank()}: {error}\n")
        return error.exit_code
    finally:
        dist.destroy_process_group()
    return 0


def train(run: Run, config: Config, json_lines: bool, device: torch.device) -> None:
    """All steps of a run on this rank; rank 0 writes metrics and shows progress."""
    parallel = config.parallel
    mesh = init_device_mesh(device.type, (parallel.ranks,), mesh_dim_names=("cp",))
    cp = pytorch.context_parallel(
        mesh,
        strategy=parallel.strategy,
        layout=parallel.layout,
        layout_options=parallel.layout_options,
        kernel=parallel.kernel,
        backward=parallel.backward or None,
        cluster=parallel.cluster,
        capacity=parallel.capacity or None,
    )
    model = build_model(config, "distattn").to(device)
    if cp.rank == 0:
        model.config.save_pretrained(run.folder)
    pytorch.shard_parameters(model, mesh)
    parameters = list(model.parameters())
    factor = cp.loss_scale(pytorch.Loop(model))
    optimizer = torch.optim.AdamW(parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay)
    with Progress(run, config.train.steps, json_lines, visible=cp.rank == 0) as progress:
        # a step ahead: its plan is made meanwhile
        given = ({**batch, "input_ids": batch["input_ids"].to(device)} for batch in batches(run))
        sharded = map(cp.shard, itertools.islice(given, config.train.steps))
        following = next(sharded, None)
        for number in range(config.train.steps):
            began = time.perf_counter()
            local, following = following, next(sharded, None)
            assert local is not None
            loss = pytorch.local_loss(model, local)
            loss.backward()
            losses = loss.detach() / factor
            dist.all_reduce(losses)
            norm = pytorch.whole(clip_grad_norm_(parameters, config.train.clip))
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
            progress.step(Step(number + 1, float(losses), float(norm), local["context_parallel"].tokens, seconds))


def build_model(config: Config, attention: str) -> Any:
    """A Llama from its shape, seeded; no download. `attention` is a transformers attention implementation."""
    # 2 s to import, and only here
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distattn.adapters import huggingface

    huggingface.register()
    shape = config.model
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=config.data.max_document,
        # transformers' 0.02 suits widths of thousands; this narrow model learns half as fast with it
        initializer_range=shape.width**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(config.run.seed)
    model = AutoModelForCausalLM.from_config(llama, attn_implementation=attention)
    return model.to(getattr(torch, shape.dtype))


def batches(run: Run) -> Iterator[dict[str, Any]]:
    """The packs of the run's document list, in order: token ids (1, N) and document lengths. Every rank reads all."""
    for pack in run.packs():
        tokens = [read_tokens(document) for document in pack]
        ids = torch.from_numpy(np.concatenate(tokens))[None]
        yield {"input_ids": ids, "document_lengths": [len(document) for document in tokens]}
