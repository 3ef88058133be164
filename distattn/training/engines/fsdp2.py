"""PyTorch's own: parameters, gradients and optimizer sharded by FSDP2 over all ranks, or in groups that hold copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from distattn.adapters import pytorch
from distattn.training.config.plan_settings import attention_config
from distattn.training.config.run_file import Config
from distattn.training.config.run_settings import build_model, configured_model, prepare_layers, tiled_loss
from distattn.training.engines.engine import Batch, EngineState, Keep, OnTokenLosses, PipelineStage, StateTensor, cloned
from distattn.training.learning_rate import parameter_groups, set_learning_rate
from distattn.training.watch.state_digest import state_tensors

# what AdamW keeps of each parameter
_AVERAGES = ("exp_avg", "exp_avg_sq")


class Fsdp2Engine:
    """An `Engine`. Weights and optimizer are float32 where bfloat16 is computed in, and gradients are reduced in float32."""

    def __init__(self, config: Config, device: torch.device, vocabulary: int, context: int):
        parallel, train = config.parallel, config.train
        self.stage = PipelineStage()
        sizes = parallel.data_parallel_size, parallel.split_ranks
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "cp"))
        self.cp = pytorch.context_parallel(mesh, config=attention_config(config))
        self._loss = tiled_loss(config)
        state_device = torch.device("cpu") if config.memory.state_on_host else device
        self.model = build_model(
            config,
            configured_model(config, vocabulary, context),
            device=state_device,
            shard=partial(_shard, config, mesh),
        )
        for buffer in self.model.buffers():
            # these are not sharded, and nobody brings them
            buffer.data = buffer.data.to(device)
        self.cp.loss_scale(pytorch.ProbeTarget(self.model))
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            eps=train.epsilon,
            fused=state_device.type == "cuda",
        )
        # the sharded parameters: those of the model are whole between forward and backward
        self._sharded = dict(self.model.named_parameters())
        # AdamW makes these in its first step; a checkpoint is read into them before
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0, device=state_device)} | {
                name: torch.zeros_like(parameter) for name in _AVERAGES
            }

    def backward(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """See `Engine`. Gradients are reduced after each micro-batch, so that nobody holds a whole one."""
        losses = []
        for batch in batches:
            loss = self._loss_of(batch, on_token_losses)
            loss.backward()
            losses.append(loss.detach())
        return losses

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """See `Engine`."""
        return [self._loss_of(batch, on_token_losses) for batch in batches]

    def clip(self, limit: float) -> float:
        """See `Engine`."""
        return float(pytorch.full_tensor(clip_grad_norm_(list(self.model.parameters()), limit)))

    def update(self, learning_rate: float) -> None:
        """See `Engine`."""
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        """See `Engine`."""
        self.optimizer.zero_grad()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        return self.model.named_parameters()

    def state_tensors(self) -> Iterator[StateTensor]:
        """See `Engine`."""
        return state_tensors(self._sharded.items(), self.optimizer)

    def state(self, keep: Keep = cloned) -> EngineState:
        """See `Engine`. The tensors are the engine's own."""
        named = dict(self.named_parameters())
        exp_avg, exp_avg_sq = (
            {name: self.optimizer.state[parameter][kind] for name, parameter in named.items()} for kind in _AVERAGES
        )
        return EngineState({name: one.detach() for name, one in named.items()}, exp_avg, exp_avg_sq, self._updates())

    def load(self, state: EngineState) -> None:
        """See `Engine`. The tensors are there already."""
        for kept in self.optimizer.state.values():
            kept["step"].fill_(state.updates)

    def close(self) -> None:
        """See `Engine`."""
        self.cp.close()

    def _loss_of(self, batch: Batch, on_token_losses: OnTokenLosses | None) -> Tensor:
        return pytorch.local_loss(self.model, batch, self._loss, on_token_losses)

    def _updates(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])


def _shard(config: Config, mesh: DeviceMesh, model: Any) -> None:
    """Prepare the layers of a model of the meta device, and shard its parameters, each layer's and what is left."""
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
