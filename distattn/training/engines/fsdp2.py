"""PyTorch's FSDP2: parameters, gradients and optimizer state sharded over all ranks, or in each of several groups of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from distattn.adapters import huggingface, pytorch
from distattn.adapters.huggingface_rope import rope_by_length
from distattn.driver.overlap import OverlapSchedule
from distattn.ir.errors import DistattnError
from distattn.training.config.plan_settings import attention_config
from distattn.training.config.run_file import Config
from distattn.training.config.run_settings import build_model, configured_model, prepare_layers, tiled_loss
from distattn.training.engines.engine import Batch, EngineState, Keep, OnTokenLosses, PipelineStage, StateTensor, cloned
from distattn.training.learning_rate import parameter_groups, set_learning_rate
from distattn.training.watch.state_digest import state_tensors

# AdamW's averages for each parameter
_AVERAGES = ("exp_avg", "exp_avg_sq")
# number of micro-batches that take turns: while the messages of one are in transit, the other computes
_TAKE_TURNS = 2


class Fsdp2Engine:
    """An `Engine` on FSDP2. With bfloat16, weights and optimizer state are float32, and so is gradient reduction."""

    def __init__(self, config: Config, device: torch.device, vocabulary: int, context: int):
        parallel, train = config.parallel, config.train
        self.stage = PipelineStage()
        sizes = parallel.data_parallel_size, parallel.split_ranks
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "cp"))
        self.cp = pytorch.context_parallel(mesh, config=attention_config(config))
        self._loss = tiled_loss(config)
        model_shape = configured_model(config, vocabulary, context)
        if parallel.overlap:
            _check_overlap(model_shape)
        state_device = torch.device("cpu") if config.memory.state_on_host else device
        self.model = build_model(config, model_shape, device=state_device, shard=partial(_shard, config, mesh))
        for buffer in self.model.buffers():
            # FSDP2 neither shards buffers nor moves them to the device
            buffer.data = buffer.data.to(device)
        self._schedule = OverlapSchedule(self.model.get_decoder().layers, self.model) if parallel.overlap else None
        self.cp.loss_scale(pytorch.ProbeTarget(self.model))
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            eps=train.epsilon,
            fused=state_device.type == "cuda",
        )
        # keep the sharded parameters: between forward and backward, the model has unsharded parameters in their place
        self._sharded = dict(self.model.named_parameters())
        # AdamW would create its averages in the first step, but a checkpoint may be loaded into them before that
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0, device=state_device)} | {
                name: torch.zeros_like(parameter) for name in _AVERAGES
            }

    def backward(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Run the forward and backward passes. See `Engine.backward`.

        Gradients are reduced after each micro-batch (or pair), so no rank keeps unsharded gradients. A single micro-batch, such
        as in the second run of a refused step, runs without taking turns.
        """
        losses: list[Tensor] = []
        if self._schedule is not None and len(batches) > 1:
            for first in range(0, len(batches), _TAKE_TURNS):
                pair = batches[first : first + _TAKE_TURNS]
                losses += self._schedule.step([partial(self._loss_of, batch, on_token_losses) for batch in pair])
            return losses
        for batch in batches:
            loss = self._loss_of(batch, on_token_losses)
            loss.backward()
            losses.append(loss.detach())
        return losses

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Return the losses of micro-batches without gradients. See `Engine.evaluate`."""
        return [self._loss_of(batch, on_token_losses) for batch in batches]

    def clip(self, limit: float) -> float:
        """Clip gradients, and return their norm before clipping. See `Engine.clip`."""
        return float(pytorch.full_tensor(clip_grad_norm_(list(self.model.parameters()), limit)))

    def update(self, learning_rate: float) -> None:
        """Take an optimizer step. See `Engine.update`."""
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Drop the gradients. See `Engine.drop`."""
        self.optimizer.zero_grad()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's parameters. See `Engine.named_parameters`."""
        return self.model.named_parameters()

    def state_tensors(self) -> Iterator[StateTensor]:
        """Yield this rank's shards of weights and optimizer state. See `Engine.state_tensors`."""
        return state_tensors(self._sharded.items(), self.optimizer)

    def state(self, keep: Keep = cloned) -> EngineState:
        """Return the engine's own tensors, not copies. See `Engine.state`."""
        named = dict(self.named_parameters())
        exp_avg, exp_avg_sq = (
            {name: self.optimizer.state[parameter][kind] for name, parameter in named.items()} for kind in _AVERAGES
        )
        model = {name: parameter.detach() for name, parameter in named.items()}
        return EngineState(model, exp_avg, exp_avg_sq, self._updates())

    def load(self, state: EngineState) -> None:
        """Set the step counts. All other values are already in the engine's own tensors. See `Engine.load`."""
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"].fill_(state.updates)

    def close(self) -> None:
        """Close the engine. See `Engine.close`."""
        self.cp.close()

    def _loss_of(self, batch: Batch, on_token_losses: OnTokenLosses | None) -> Tensor:
        return pytorch.local_loss(self.model, batch, self._loss, on_token_losses)

    def _updates(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])


def _check_overlap(shape: Any) -> None:
    """Raise DistattnError if micro-batches cannot take turns in this model. shape: its transformers configuration."""
    if huggingface.has_recurrence_or_convolution(shape):
        raise DistattnError(
            f"parallel.overlap: {shape.model_type} has recurrent layers or convolutions, which do not take turns; use false."
        )
    if rope := rope_by_length(shape):
        raise DistattnError(
            f"parallel.overlap: RoPE of type {rope} scales by one micro-batch's longest document, and two take turns; use false."
        )
    if getattr(shape, "output_router_logits", False):
        raise DistattnError(
            "parallel.overlap: a router loss (output_router_logits) reads tensors inside of layers, which take turns; use false."
        )


def _shard(config: Config, mesh: DeviceMesh, model: Any) -> None:
    """Prepare the layers of a model on the meta device, then shard each layer and the parameters outside layers."""
    prepare_layers(model, config)
    flat, size = pytorch.gradient_mesh(mesh), config.engine.shard_size or config.parallel.ranks
    if size < config.parallel.ranks:
        shape = config.parallel.ranks // size, size
        flat = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    policy = half if config.model.dtype == "bfloat16" else MixedPrecisionPolicy()
    state = CPUOffloadPolicy(pin_memory=flat.device_type == "cuda") if config.memory.state_on_host else OffloadPolicy()
    for layer in [*model.get_decoder().layers, model]:
        fully_shard(layer, mesh=flat, mp_policy=policy, offload_policy=state)
    pytorch.sum_fsdp_gradients(model)
