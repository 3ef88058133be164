"""DeepSpeed: parameters, gradients and optimizer state sharded by ZeRO, stages 0 to 3, over all ranks.

DeepSpeed clips gradients inside its step, when the step can no longer be refused. So its clipping is off, and this module
clips the gradient partitions that DeepSpeed's optimizers hold between backward and step.
"""

# P elements of a parameter in this rank's partition

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_, get_total_norm

from distattn.adapters import pytorch
from distattn.adapters.deepspeed import ProbeTarget, SequenceGroups
from distattn.models.shards import shard_rows, whole_modules
from distattn.training.config.plan_settings import attention_config
from distattn.training.config.run_file import Config
from distattn.training.config.run_settings import build_model, configured_model, prepare_layers, tiled_loss
from distattn.training.engines.engine import (
    COUNTS,
    MASTER_WEIGHT,
    WEIGHT,
    Batch,
    EngineState,
    Keep,
    OnTokenLosses,
    PipelineStage,
    StateTensor,
    assign_keepers,
    cloned,
)
from distattn.training.learning_rate import parameter_groups, set_learning_rate
from distattn.training.watch.state_digest import state_tensors

# AdamW's averages for each parameter
_AVERAGES = ("exp_avg", "exp_avg_sq")
# `torch.nn.utils.clip_grad_norm_` adds this to the norm
_CLIP_EPSILON = 1e-6


class DeepSpeedEngine:
    """An `Engine` on DeepSpeed. With bfloat16, master weights, optimizer state and summed gradients are float32.

    DeepSpeed initializes the master weights from the rounded bfloat16 weights. The model is built sharded over all ranks
    and passed to DeepSpeed module by module. Stage 3 partitions each module immediately, so no rank ever holds the
    entire model. From stage 1 on, DeepSpeed itself may skip a step whose gradients are not finite.
    """

    def __init__(self, config: Config, device: torch.device, vocabulary: int, context: int):
        for handler in logging.getLogger("DeepSpeed").handlers:
            # keep DeepSpeed's log off standard output, which programs may parse
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        parallel, train = config.parallel, config.train
        self.stage = PipelineStage()
        sizes = parallel.data_parallel_size, parallel.split_ranks
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "cp"))
        self.cp = pytorch.context_parallel(mesh, config=attention_config(config))
        self._stage, self._device = config.engine.zero_stage, device
        self._loss = tiled_loss(config)
        shard = partial(shard_rows, mesh=pytorch.gradient_mesh(mesh))
        model = build_model(config, configured_model(config, vocabulary, context), device=device, shard=shard)
        prepare_layers(model, config)
        self._keepers = assign_keepers(model, range(dist.get_world_size()))
        settings = _settings(config)
        if device.type == "cpu":
            # keep DeepSpeed from compiling a C++ extension for shared memory
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for module in whole_modules(model, getattr(torch, config.model.dtype)):
            if self._stage == 3:
                deepspeed.zero.Init(module=module, config_dict_or_path=settings)
        self._adam = torch.optim.AdamW(
            parameter_groups(model, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            eps=train.epsilon,
            fused=device.type == "cuda",
        )
        self.engine: Any = deepspeed.initialize(
            model=model, optimizer=self._adam, config=settings, mpu=SequenceGroups(self.cp), dist_init_required=False
        )[0]
        self.model: torch.nn.Module = self.engine.module
        self.cp.loss_scale(ProbeTarget(self.engine, scale_wrt_gas=False))
        self._begin_averages()

    def backward(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Run the forward and backward passes of the micro-batches. See `Engine.backward`."""
        losses = []
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss = pytorch.local_loss(self.engine, batch, self._loss, on_token_losses)
            self.engine.backward(loss, scale_wrt_gas=False)
            losses.append(loss.detach())
        return losses

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Return the losses of micro-batches without gradients. See `Engine.evaluate`."""
        return [pytorch.local_loss(self.engine, batch, self._loss, on_token_losses) for batch in batches]

    @torch.no_grad()
    def clip(self, limit: float) -> float:
        """Clip gradients, and return their norm before clipping. See `Engine.clip`."""
        if self._stage == 0:
            # reduced gradients are equal on all ranks
            return float(clip_grad_norm_(self.model.parameters(), limit))
        gradients = self._gradient_partitions()
        # in a small model, some ranks hold no elements and therefore have no gradients
        squares = get_total_norm(gradients).double().square() if gradients else torch.zeros((), dtype=torch.float64)
        squares = squares.to(self._device)
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        scale = limit / (norm + _CLIP_EPSILON)
        if not scale >= 1:
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    def update(self, learning_rate: float) -> None:
        """Take an optimizer step. See `Engine.update`."""
        set_learning_rate(self._adam, learning_rate)
        self.engine.step()

    def drop(self) -> None:
        """Drop the gradients. See `Engine.drop`."""
        optimizer = self.engine.optimizer
        optimizer.zero_grad()
        self.engine.zero_grad()
        if isinstance(optimizer, BF16_Optimizer):
            optimizer.clear_hp_grads()
        elif self._stage:
            optimizer.averaged_gradients.clear()
            optimizer.micro_step_id = self._first_micro_step

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's parameters; in stage 3, its partitions (P,). See `Engine.named_parameters`."""
        for name, parameter in self._named():
            yield name, parameter.ds_tensor if self._stage == 3 else parameter

    def state_tensors(self) -> Iterator[StateTensor]:
        """Yield the forward pass's weights, and this rank's partitions (P,) of master weights and averages.

        See `Engine.state_tensors`.
        """
        if self._stage == 0:
            yield from state_tensors(self._named(), self._adam)
            return
        for name, parameter in self.named_parameters():
            yield WEIGHT, name, parameter.detach()
        for name, parameter in self._named():
            for kind in ("", *_AVERAGES):
                if self._stage == 3:
                    get = safe_get_local_optimizer_state if kind else safe_get_local_fp32_param
                    yield kind or MASTER_WEIGHT, name, get(parameter, *([kind] if kind else [])).detach()
                elif parameter._hp_mapping is not None:
                    yield kind or MASTER_WEIGHT, name, parameter._hp_mapping.get_hp_fragment(kind or None).detach()
        yield COUNTS, "", torch.stack([parameter_state["step"] for parameter_state in self._adam.state.values()])

    def state(self, keep: Keep = cloned) -> EngineState:
        """Return unpartitioned tensors, gathering one parameter at a time. See `Engine.state`.

        Each rank keeps a share of the tensors, so ranks return different names. All tensors are copies made by `keep`.
        """
        states: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        for name, parameter in self._named():
            for tensors, kind in zip(states, ("", *_AVERAGES), strict=True):
                whole = self._whole(parameter, kind)
                if self._keepers[name] == dist.get_rank():
                    tensors[name] = keep(f"{kind or 'param'}.{name}", whole)
                # free the tensor before the next tensor is gathered
                del whole
        return EngineState(states[0], states[1], states[2], self._updates())

    @torch.no_grad()
    def load(self, state: EngineState) -> None:
        """Load the state: each rank broadcasts the tensors that it keeps. See `Engine.load`."""
        for name, parameter in self._named():
            shape = parameter.ds_shape if self._stage == 3 else parameter.shape
            for tensors, kind in zip(state[:3], ("", *_AVERAGES), strict=True):
                dtype = torch.float32 if self._stage else parameter.dtype
                whole = torch.empty(shape, dtype=dtype, device=self._device)
                if name in tensors:
                    whole.copy_(tensors[name])
                dist.broadcast(whole, self._keepers[name])
                self._set_whole(parameter, whole, kind)
        if self._stage in (1, 2):
            # update the weights of the forward pass from the master weights
            self.engine.optimizer.update_lp_params()
        for parameter_state in self._adam.state.values():
            parameter_state["step"].fill_(state.updates)

    def close(self) -> None:
        """Close the engine. See `Engine.close`."""
        self.engine.destroy()
        self.cp.close()

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Return the named parameters, typed as Any because DeepSpeed's stage 3 adds attributes to them."""
        return self.model.named_parameters()

    def _begin_averages(self) -> None:
        """Create AdamW's averages before its first step, so that a checkpoint can be loaded into them."""
        optimizer = self.engine.optimizer
        self._first_micro_step = getattr(optimizer, "micro_step_id", None)
        if self._stage == 0:
            trained = list(self.model.parameters())
        elif self._stage == 3:
            trained = optimizer.fp32_partitioned_groups_flat
        else:
            trained = [group["params"][0] for group in self._adam.param_groups]
        step_device = self._device if self._device.type == "cuda" else "cpu"
        for parameter in trained:
            self._adam.state[parameter] = {"step": torch.tensor(0.0, device=step_device)}
            self._adam.state[parameter] |= {name: torch.zeros_like(parameter) for name in _AVERAGES}
        if self._stage in (1, 2):
            groups = optimizer.bf16_groups if isinstance(optimizer, BF16_Optimizer) else optimizer.bit16_groups
            for parameters, partition in zip(groups, trained, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, partition, self._adam.state)

    def _gradient_partitions(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            return list(optimizer.fp32_groups_gradient_flat_partition)
        return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]

    def _updates(self) -> int:
        return int(next(iter(self._adam.state.values()))["step"])

    def _whole(self, parameter: Any, kind: str) -> Tensor:
        """Return a whole parameter in the optimizer's precision or, if `kind` is not "", that average. A collective call."""
        if self._stage == 0:
            return self._adam.state[parameter][kind] if kind else parameter
        whole: Tensor = safe_get_full_optimizer_state(parameter, kind) if kind else safe_get_full_fp32_param(parameter)
        return whole

    def _set_whole(self, parameter: Any, whole: Tensor, kind: str) -> None:
        """Set the tensor that `_whole` would return and, in stage 3, the forward pass's weights. A collective call."""
        if self._stage == 0:
            self._whole(parameter, kind).copy_(whole)
        elif self._stage < 3:
            if kind:
                safe_set_full_optimizer_state(parameter, whole, kind)
            else:
                safe_set_full_fp32_param(parameter, whole)
        else:
            size = parameter.ds_tensor.numel()
            padded = torch.zeros(size * dist.get_world_size(), dtype=whole.dtype, device=whole.device)
            padded[: whole.numel()] = whole.flatten()
            part_P = padded[size * dist.get_rank() :][:size]
            if kind:
                safe_set_local_optimizer_state(parameter, part_P, kind)
                return
            safe_set_local_fp32_param(parameter, part_P)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(whole)


def _settings(config: Config) -> dict[str, Any]:
    """Return DeepSpeed's configuration. `backward`, not DeepSpeed, counts micro-batches, and `clip` clips gradients."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if config.model.dtype == "bfloat16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings
