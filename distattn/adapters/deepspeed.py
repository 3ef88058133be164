"""DeepSpeed 0.19: ZeRO stages 0 to 3 over all data- and context-parallel ranks.

    cp = da.ContextParallel(group, loss_group=all_ranks, strategy="ring")
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=SequenceGroups(cp), ...)
    cp.loss_scale(ProbeTarget(engine))
    engine.backward(local_loss(engine, cp.shard(batch)))
    engine.step()

DeepSpeed's divisor of gradients depends on the ZeRO stage and on the numbers of sequence-parallel ranks and micro-batches, so
`loss_scale` measures it. Pass `mpu` rather than `mesh_param` (or data_parallel_size and sequence_parallel_size in the
configuration): with those, DeepSpeed 0.19 does not reduce over sequence-parallel ranks in stages 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from distattn.adapters.pytorch import (
    full_tensor,
    gradients_aside,
    logits_of,
    output_layer_of,
    probed_parameters,
    trained_layer,
)
from distattn.driver.context_parallel import ContextParallel
from distattn.driver.parameter_probe import ProbedParameter
from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.communication.communicator import new_group


class SequenceGroups:
    """The `mpu` of `deepspeed.initialize`: the ranks that split a sequence, and the ranks over which ZeRO shards and reduces.

    cp: a `ContextParallel` whose loss group contains all ranks. Ranks that hold the same batch split its sequences.
    """

    def __init__(self, cp: ContextParallel):
        if cp.group is None or cp.loss_group is None:
            raise DistattnError("DeepSpeed needs torch.distributed; call deepspeed.init_distributed first.")
        if cp.config.servers:
            raise DistattnError("DeepSpeed trains on all ranks, so no rank can only serve; leave servers out.")
        if dist.get_world_size(cp.loss_group) != dist.get_world_size():
            raise DistattnError(
                f"DeepSpeed trains on all {dist.get_world_size()} ranks, the loss group has "
                f"{dist.get_world_size(cp.loss_group)}; give ContextParallel loss_group=torch.distributed.group.WORLD."
            )
        self._split: Any = cp.batch_group()
        self._all: Any = cp.loss_group
        self._alone = new_group([dist.get_rank()])

    def initialize_sequence_parallel(self, size: int) -> None:
        """Check the size. DeepSpeed only tests that this method exists; the groups come from the `ContextParallel`."""
        if size != self.get_sequence_parallel_world_size():
            raise DistattnError(
                f"sequences are split over {self.get_sequence_parallel_world_size()} ranks, not {size}."
            )

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """Return the group of ranks that split a sequence."""
        return self._split  # type: ignore[no-any-return]

    def get_sequence_parallel_world_size(self) -> int:
        """Return the number of ranks that split a sequence."""
        return dist.get_world_size(self._split)

    def get_sequence_parallel_rank(self) -> int:
        """Return this rank's index among the ranks that split a sequence."""
        return dist.get_rank(self._split)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the group of all ranks, which share the parameters."""
        return self._all  # type: ignore[no-any-return]

    def get_sequence_data_parallel_world_size(self) -> int:
        """Return the number of ranks that share the parameters."""
        return dist.get_world_size(self._all)

    def get_sequence_data_parallel_rank(self) -> int:
        """Return this rank's index among all ranks."""
        return dist.get_rank(self._all)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return a group of this rank alone, since there is no tensor parallelism."""
        return self._alone

    def get_model_parallel_rank(self) -> int:
        """Return 0, since there is no tensor parallelism."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """Return 1, since there is no tensor parallelism."""
        return 1


def set_data_parallel_size(engine: Any, size: int) -> None:
    """Set the sample counts of an engine created without `SequenceGroups`. size: the number of data-parallel replicas.

    Without this call, DeepSpeed assumes that every rank has its own samples. This affects what it reports, not gradients.
    """
    samples = engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps() * size
    engine._config.train_batch_size = engine.tput_timer.batch_size = samples


class ProbeTarget:
    """A DeepSpeed engine, which `ContextParallel.loss_scale` probes between two steps, not during gradient accumulation.

    scale_wrt_gas: the value that you pass to `engine.backward`. forward: computes logits from a batch, by default by calling
    the engine. output_layer: the linear layer that computes logits, by default that of `output_layer_of`.
    """

    def __init__(
        self,
        engine: Any,
        *,
        scale_wrt_gas: bool = True,
        forward: Callable[[Mapping[str, Any]], Tensor] | None = None,
        output_layer: torch.nn.Module | None = None,
    ):
        if isinstance(engine, PipelineEngine):
            raise DistattnError(
                "DeepSpeed's PipelineModule passes only tensors from stage to stage, and no sharded batch; use ZeRO, or "
                "Megatron-core's pipeline (distattn.adapters.megatron)."
            )
        if engine.has_moe_layers:
            raise DistattnError(
                "DeepSpeed's expert parallelism reduces experts over its own groups, which is not supported."
            )
        self.engine, self._output_layer, self._scale_wrt_gas = engine, output_layer, scale_wrt_gas
        self._forward = forward or (lambda batch: logits_of(engine, batch))
        self.micro_batches_per_step = engine.gradient_accumulation_steps() if scale_wrt_gas else None

    def layer(self) -> torch.nn.Module:
        """Return the output layer, or another layer that is trained if the output layer is frozen."""
        return trained_layer(self.engine.module, self._output())

    def vocab_rows(self) -> int:
        """Return the number of rows of the output layer's full weight, even if it is partitioned."""
        weight: Any = self._output().weight
        return getattr(weight, "ds_shape", weight.shape)[0]

    def backward(self, batch: Mapping[str, Any], loss_of: Callable[[Tensor], Tensor]) -> None:
        """Run the backward pass as for the last micro-batch of a step."""
        self.engine.backward(loss_of(self._forward(batch)), scale_wrt_gas=self._scale_wrt_gas)

    def inputs(self, x: Tensor) -> Tensor:
        """Return the layer's input unchanged."""
        return x

    def gradient(self) -> Tensor:
        """Return the gradient of the layer's weight, divided by the fp16 loss scale."""
        weight: Any = self.layer().weight
        return full_tensor(safe_get_full_grad(weight)) / (getattr(self.engine.optimizer, "loss_scale", None) or 1.0)

    def parameters(self) -> list[ProbedParameter]:
        """Return all of the model's parameters. Those that stage 3 partitions are empty, since ranks hold different parts."""
        scale = getattr(self.engine.optimizer, "loss_scale", None) or 1.0

        def gradient_of(parameter: Any) -> Tensor | None:
            gradient = safe_get_full_grad(parameter)
            return None if gradient is None else gradient / scale

        return probed_parameters(self.engine.module, gradient_of)

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Set gradients aside while the context is open, then restore them. Raises DistattnError in the middle of a step."""
        engine, optimizer = self.engine, self.engine.optimizer
        steps = engine.gradient_accumulation_steps()
        if engine.micro_steps % steps:
            raise DistattnError(
                f"{engine.micro_steps % steps} of a step's {steps} micro-batches are done; probe between steps."
            )
        boundary = engine._is_gradient_accumulation_boundary
        averaged = dict(getattr(optimizer, "averaged_gradients", {}))
        micro_step = getattr(optimizer, "micro_step_id", None)
        if steps > 1:
            engine.set_gradient_accumulation_boundary(True)
        with gradients_aside(engine.module):
            try:
                yield
            finally:
                optimizer.zero_grad()
                engine.zero_grad()
                # ZeRO accumulates gradients in these attributes until its optimizer takes a step
                if micro_step is not None:
                    optimizer.averaged_gradients.clear()
                    optimizer.averaged_gradients.update(averaged)
                    optimizer.micro_step_id = micro_step
                if steps > 1:
                    engine.set_gradient_accumulation_boundary(boundary)

    def _output(self) -> torch.nn.Module:
        return self._output_layer or output_layer_of(self.engine.module)
