"""The training loop: a small Llama on packed documents, every step's tokens and all parameters split over the ranks.

`main` is one rank of a run, started by `distattn.launch`. The run folder holds the resolved
configuration and, of a run on text, tokens and the plan of packs; nothing else is shared but the process group.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils import clip_grad_norm_

from distattn.adapters import pytorch
from distattn.data.loader import PackLoader
from distattn.data.text import VOCABULARY
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError
from distattn.kernels.registry import AUTO, CPU_KERNELS
from distattn.memory.settings import MemorySettings
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.metrics import MetricsReporter
from distattn.training.plan_settings import PlanSettings
from distattn.training.run_data import open_data, piece_rows
from distattn.training.run_folder import RunFolder, StepMetrics
from distattn.training.step_documents import append_documents


def main(folder: str, json_lines: bool) -> int:
    """Run one rank of a run. Returns the exit code."""
    run = RunFolder(Path(folder))
    config = configuration.load(run.config_file)
    # ranks share the machine's cores; more threads than cores only wait for each other
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.parallel.ranks))
    device = torch.device("cpu")
    kernel = config.parallel.kernel
    if torch.cuda.is_available() if kernel == AUTO else kernel not in CPU_KERNELS:
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


def train(run: RunFolder, config: Config, json_lines: bool, device: torch.device) -> None:
    """Train all steps of a run on this rank; rank 0 writes metrics and shows progress."""
    settings = PlanSettings.of_config(config)
    sizes = settings.data_parallel_size, config.parallel.ranks // settings.data_parallel_size
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "cp"))
    with pytorch.context_parallel(mesh, **settings.context_parallel_arguments()) as cp:
        _train_steps(run, config, json_lines, device, mesh, cp)


def _train_steps(
    run: RunFolder, config: Config, json_lines: bool, device: torch.device, mesh: DeviceMesh, cp: ContextParallel
) -> None:
    data = open_data(run, config)
    loader = PackLoader(
        data.plan,
        data.corpora,
        rank=cp.data_parallel_rank,
        size=cp.data_parallel_size,
        steps=config.train.steps,
        vocabulary=data.vocabulary,
        device=device,
    )
    model = build_model(config, "distattn", data.vocabulary, data.context).to(device)
    if cp.rank == 0:
        model.config.save_pretrained(run.folder)
    memory = memory_settings(config)
    memory.apply(model)
    pytorch.shard_parameters(model, mesh)
    parameters = list(model.parameters())
    cp.loss_scale(pytorch.ProbeTarget(model))
    optimizer = torch.optim.AdamW(parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay)
    with MetricsReporter(run, config.train.steps, json_lines, visible=cp.rank == 0) as reporter:
        began = time.perf_counter()
        for number, micro_batches in enumerate(cp.steps(loader)):
            if cp.rank == 0:
                # before anything can go wrong with them
                append_documents(run.documents_file, list(piece_rows(data, number)))
            losses = []
            for local in micro_batches:
                losses.append(pytorch.local_loss(model, local, loss=memory.loss))
                losses[-1].backward()
            norm = pytorch.full_tensor(clip_grad_norm_(parameters, config.train.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()
            mean = cp.mean_loss(losses)
            tokens = sum(local["context_parallel"].tokens for local in micro_batches)
            seconds, began = time.perf_counter() - began, time.perf_counter()
            reporter.report(StepMetrics(number + 1, mean, float(norm), tokens, seconds))


def memory_settings(config: Config) -> MemorySettings:
    """What a run does to save memory."""
    return MemorySettings(**asdict(config.memory))


def build_model(config: Config, attention: str, vocabulary: int = VOCABULARY, context: int = 0) -> Any:
    """Make a Llama from its shape, seeded; nothing is downloaded. attention: a transformers attention implementation.

    vocabulary: token ids are below it. context: tokens of the longest pack; by default those of the longest document.
    """
    # 2 s to import, and only here
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distattn.adapters import huggingface

    huggingface.register()
    shape = config.model
    llama = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=context or config.data.max_document_tokens,
        # transformers' 0.02 suits widths of thousands; this narrow model learns half as fast with it
        initializer_range=shape.hidden_size**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(config.run.seed)
    model = AutoModelForCausalLM.from_config(llama, attn_implementation=attention)
    return model.to(getattr(torch, shape.dtype))
