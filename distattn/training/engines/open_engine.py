"""The engine that a run file names; nothing of the others is imported."""

from __future__ import annotations

import importlib
import os

import torch

from distattn.ir.errors import DistattnError
from distattn.training.config.run_file import Config
from distattn.training.engines.engine import Engine

# by name: its class, and the package it needs beside torch and transformers, with our extra that installs it
_ENGINES = {
    "fsdp2": ("Fsdp2Engine", "", ""),
    "deepspeed": ("DeepSpeedEngine", "deepspeed", "deepspeed"),
    "megatron": ("MegatronEngine", "megatron", "megatron"),
}


def open_engine(config: Config, device: torch.device, vocabulary: int, context: int) -> Engine:
    """Build the model and the optimizer of a run in `engine.name`. A collective call of all ranks.

    vocabulary: token ids are below it. context: tokens of the longest pack. Raises DistattnError where the engine's package is
    not installed.
    """
    made, package, extra = _ENGINES[config.engine.name]
    if device.type == "cpu":
        # DeepSpeed asks for it where it is imported, and else looks for GPUs
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        module = importlib.import_module(f"distattn.training.engines.{config.engine.name}")
    except ModuleNotFoundError as error:
        if not package or (error.name or "").partition(".")[0] != package:
            raise
        raise DistattnError(
            f'engine.name: "{config.engine.name}" needs the package {package}; run pip install "distattn[{extra}]".'
        ) from None
    engine: Engine = getattr(module, made)(config, device, vocabulary, context)
    return engine
