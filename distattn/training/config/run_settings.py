"""Converts a run file's settings into those of transformers, PyTorch and other parts of distattn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from distattn.adapters import huggingface
from distattn.adapters.huggingface_rope import rope_by_length
from distattn.cluster.spec import load as load_cluster
from distattn.ir.errors import DistattnError
from distattn.kernels.registry import AUTO, CPU_KERNELS
from distattn.memory.settings import MemorySettings
from distattn.memory.tiled_loss import TiledLoss
from distattn.models.build import llama_config, materialise, meta_model, model_config
from distattn.models.safetensors_files import load_pretrained
from distattn.training.config.run_file import Config
from distattn.training.learning_rate import ScheduleSettings
from distattn.training.reporting.model_flops import ModelFlops, flops_utilisation
from distattn.training.watch.numerics_watch import WatchSettings


def configured_model(config: Config, vocabulary: int, context: int) -> Any:
    """Return the transformers configuration of the run's model: that in model.path, or that of a Llama.

    vocabulary: upper bound (exclusive) of token ids. context: tokens in the longest pack. Raises DistattnError if the
    folder has no configuration, or if the reference check would compute a different model.
    """
    model = config.model
    if model.path:
        shape = model_config(model.path)
        if config.reference_check.steps and (kind := rope_by_length(shape)):
            raise DistattnError(
                f"reference_check.steps: the reference computes one document at a time, so it scales the model's {kind} RoPE by "
                "that document's length, not by that of the pack's longest document; set it to 0."
            )
        if config.reference_check.steps and getattr(shape, "output_router_logits", False):
            raise DistattnError(
                f"reference_check.steps: the replay in plain transformers has no router loss, which {model.path} asks for "
                "(output_router_logits); set it to 0."
            )
        return shape
    return llama_config(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_size,
        intermediate_size=model.intermediate_size,
        vocab_size=vocabulary,
        max_position_embeddings=context,
    )


def build_model(
    config: Config,
    shape: Any,
    attention: str = huggingface.NAME,
    device: str | torch.device = "cpu",
    shard: Callable[[Any], None] = lambda model: None,
) -> Any:
    """Return a run's model with its initial weights. shape: its transformers configuration.

    shard: called on the model while it is on the meta device, so that no rank ever holds another rank's shard.
    """
    model = meta_model(shape, attention, weight_dtype(config))
    shard(model)
    if config.model.weights == "pretrained":
        load_pretrained(model, config.model.path, device)
    else:
        materialise(model, config.run.seed, device)
    return model


def runs_on_gpus(config: Config) -> bool:
    """Return whether ranks compute on GPUs. The kernel decides; with kernel "auto", they do if there are GPUs."""
    kernel = config.parallel.kernel
    return torch.cuda.is_available() if kernel == AUTO else kernel not in CPU_KERNELS


def weight_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the trained weights: float32 if computation is in bfloat16, otherwise the dtype of computation."""
    name = config.model.dtype
    return torch.float32 if name == "bfloat16" else getattr(torch, name)


def tiled_loss(config: Config) -> TiledLoss:
    """Return the loss function, which computes logits and loss for one tile of tokens at a time."""
    return TiledLoss(tile_tokens=config.memory.loss_tile_tokens, z_loss=config.train.z_loss)


def memory_settings(config: Config) -> MemorySettings:
    """Return the settings of tiling, recomputation and offload."""
    settings = asdict(config.memory)
    del settings["state_on_host"]
    return MemorySettings(**settings)


def prepare_layers(model: Any, config: Config) -> None:
    """Set up compilation, tiling and recomputation of a model's layers as the run file says. Call it before sharding.

    It also lets consecutive recurrent layers use a different layout if that is faster, and applies parallel.latents.
    """
    huggingface.relayout_recurrent_spans(model)
    if config.parallel.latents:
        huggingface.attend_by_latents(model)
    memory, layers = memory_settings(config), list(model.get_decoder().layers)
    if config.engine.compile and memory.offload:
        # compile only the forward functions: the offload's copies to the host cannot be compiled
        for layer in layers:
            layer.forward = torch.compile(layer.forward)
    memory.apply(model)
    if config.engine.compile and not memory.offload:
        for layer in layers:
            layer.compile()


def schedule_settings(config: Config) -> ScheduleSettings:
    """Return the settings of the learning-rate schedule."""
    train = config.train
    return ScheduleSettings(
        train.learning_rate,
        train.steps,
        train.schedule,
        train.warmup_steps,
        train.min_learning_rate if train.schedule != "constant" else 0.0,
        train.decay_share,
    )


def watch_settings(config: Config) -> WatchSettings:
    """Return the settings of the numerics watch."""
    watch = config.watch
    return WatchSettings(watch.action, watch.spike_window, watch.spike_threshold)


class Utilisation(NamedTuple):
    """Computes the MFU of steps. ranks: number of devices. peak_tflops: peak of one device."""

    flops: ModelFlops
    ranks: int
    peak_tflops: float

    @staticmethod
    def of_config(config: Config, shape: Any) -> Utilisation | None:
        """Return a calculator for the devices in cluster.description, or None if that is not set or ranks compute on CPUs."""
        if not config.cluster.description or config.parallel.kernel in CPU_KERNELS:
            return None
        peak = load_cluster(config.cluster.description).device.peak_tflops
        return Utilisation(ModelFlops.of_model(meta_model(shape)), config.parallel.ranks, peak)

    def of_step(self, lengths: Sequence[int], seconds: float) -> float:
        """Return a step's MFU in [0, 1]. lengths: the number of tokens in each document piece of the step."""
        return flops_utilisation(self.flops.of_documents(lengths), seconds, self.ranks, self.peak_tflops)
