"""Pipeline stages whose attention is shared: stages go forward and backward together, and those in a bubble help others.

A schedule over `ContextParallel` with data="per_rank". Ranks are numbered stage by stage: rank = stage * replicas + replica;
all ranks of a replica get the same micro-batches.
"""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim, W hidden size

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.batch.local_batch import BatchAttention, LocalBatch
from distattn.batch.packed_batch import Batch
from distattn.batch.planner import AttentionShape
from distattn.batch.pooled_layout import Documents
from distattn.driver.context_parallel import ContextParallel
from distattn.driver.control_channel import BACKWARD, FORWARD, ControlMessage
from distattn.driver.pipeline_ticks import Tick, ticks
from distattn.driver.servers import join_pass
from distattn.driver.step_exchange import GatheredStep
from distattn.ir.arguments import check_fields
from distattn.ir.errors import DistattnError
from distattn.ops.attention import attention, autocast_inputs, score_modifiers
from distattn.ops.executable import EXECUTABLES, Executable, with_device_index
from distattn.parallel.runtime.arenas import ARENAS, ArenaAllocator, aligned_bytes
from distattn.parallel.runtime.communicator import all_gather_objects
from distattn.parallel.runtime.transport import Packet

StageFunction = Callable[[Tensor | None, dict[str, Any]], Tensor]


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """The facts about this rank's stage that a schedule needs.

    shape: of every attention layer; attention_layers: their number on this stage. hidden_size and dtype: of the hidden states
    (1, T, W) that stages pass on. scale (head_dim ** -0.5 by default) and softcap: of the scores, as in `attention`.
    """

    shape: AttentionShape
    attention_layers: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    scale: float | None = None
    softcap: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


class PipelineSchedule:
    """Trains pipeline stages with shared attention.

        schedule = PipelineSchedule(cp, stages=4, spec=StageSpec(...))
        for losses in schedule.train(loader, stage):
            ...

    stage(hidden, batch) -> hidden runs this rank's layers: `hidden` is None on the first stage, and the last one returns the
    loss. batch is a micro-batch of `ContextParallel.steps`. Sum gradients over the replicas of a stage, or call
    `ContextParallel.loss_scale` for another reduction. Raises DistattnError for a driver that pipelines cannot use.
    """

    def __init__(self, cp: ContextParallel, *, stages: int, spec: StageSpec):
        config = cp.config
        if stages < 1 or cp.ranks % stages:
            raise DistattnError(f"{stages} stages do not divide the {cp.ranks} ranks that share attention.")
        keeps = config.backward_policy == "keep"
        if config.servers or config.data != "per_rank" or cp.block_ranks > 1 or keeps or cp.loss_group is not cp.group:
            raise DistattnError(
                'a pipeline needs data="per_rank" without context_parallel_size, servers, a loss group and backward "keep".'
            )
        for name in ("pad_to", "layers"):
            if getattr(config, name) not in (None, 1, {}):
                raise DistattnError(f"a pipeline's layers are all of one shape and unpadded: leave {name} out.")
        shape = spec.shape._replace(modifiers=score_modifiers(spec.softcap, None))
        spec = replace(spec, shape=shape)
        self.cp, self.stages, self.spec = cp, stages, spec
        self.replicas = cp.ranks // stages
        self.stage, self.replica = divmod(cp.rank, self.replicas)
        self.device = with_device_index(spec.device)
        # open it here: the call is collective, and the first exchange may not involve all ranks
        cp.transport(self.device)
        scale = spec.shape.head_dim**-0.5 if spec.scale is None else float(spec.scale)
        self.score = scale, float(spec.softcap)
        depths: list[Any] = [spec.attention_layers]
        if cp.group is not None:
            depths = all_gather_objects(cp.group, spec.attention_layers)
        # attention layers of each stage
        self.depths = [int(depth) for depth in depths[:: self.replicas]]
        self.ticks: list[Tick] = []
        # of the current tick: its direction, the number of calls that this rank's micro-batch has made, and the batch of each
        # shared call. A backward pass uses the batches of its own tick, not those of its forward pass
        self.direction, self.calls_made = FORWARD, 0
        self.batches: list[LocalBatch | None] = []

    def next_batch(self) -> LocalBatch:
        """Return the batch of the call that this rank's micro-batch makes next."""
        layers = self.spec.attention_layers
        call = self.calls_made if self.direction == FORWARD else layers - 1 - self.calls_made
        if not 0 <= call < layers:
            raise DistattnError(f"a {self.direction} pass of stage {self.stage} attends more than {layers} times.")
        self.calls_made += 1
        batch = self.batches[call]
        assert batch is not None
        return batch

    def train(self, loader: Iterable[Any], stage: StageFunction) -> Iterator[list[Tensor]]:
        """Yield this rank's losses of each step of a loader, as in `ContextParallel.steps`; only the last stage has losses."""
        first_of_replicas = list(range(self.replicas))
        same_batch = [rank % self.replicas for rank in range(self.cp.ranks)]
        for packed, gathered in self.cp.gathered_steps(loader, self._plan, same_batch):
            step = _PipelineStep(self, stage, packed, self.cp.loss_scale_of(gathered, first_of_replicas))
            self.ticks = [tick.tick for tick in gathered.prepared]
            for tick in gathered.prepared:
                step.run(tick)
            yield step.losses

    def _plan(self, step: GatheredStep) -> tuple[list[_PlannedTick], list[LocalBatch]]:
        """Return (the ticks of a step, all their batches).

        Stages with fewer layers have no tokens in the calls that they do not make.
        """
        order = ticks(self.stages, max((len(info.documents) for info in step.infos), default=0))
        if not order:
            return [], []
        depths = sorted(set(self.depths))
        documents: list[Documents | None] = []
        for tick in order:
            for depth in depths:
                by_rank: list[tuple[int, ...]] = []
                for micro_batch, layers in zip(tick.micro_batches, self.depths, strict=True):
                    for replica in range(self.replicas):
                        micro_batches = step.infos[replica].documents
                        attends = micro_batch is not None and micro_batch < len(micro_batches) and layers >= depth
                        by_rank.append(micro_batches[micro_batch] if attends and micro_batch is not None else ())
                documents.append(tuple(by_rank) if any(by_rank) else None)
        batches = self.cp.batches(step, documents)
        remaining = iter(batches)
        planned_ticks = []
        for tick in order:
            by_depth = {depth: next(remaining) for depth in depths}
            # call i is made by the stages with more than i layers
            calls = [by_depth[min(d for d in depths if d > call)] for call in range(depths[-1])]
            planned_ticks.append(_PlannedTick(tick, calls))
        return planned_ticks, [batch for batch in batches if batch is not None]


class _PlannedTick(NamedTuple):
    """A tick, and the batch of each shared call; None if no rank has any tokens in it."""

    tick: Tick
    batches: list[LocalBatch | None]


class _PipelineStep:
    """One step on one rank, with the hidden states that wait for their backward pass, by micro-batch."""

    def __init__(self, pipeline: PipelineSchedule, stage: StageFunction, packed: list[Batch], scale: float):
        self.pipeline, self.stage, self.packed, self.scale = pipeline, stage, packed, scale
        self.entered: dict[int, Tensor | None] = {}
        self.left: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []
        # tensors from other stages, by direction and micro-batch
        self.received: dict[tuple[str, int], Tensor] = {}
        self.local: dict[int, dict[str, Any]] = {}

    def run(self, planned: _PlannedTick) -> None:
        """Run this rank's part of a tick: its micro-batch, if it has one, and calls without tokens while others have more.

        Call i is every stage's i-th layer, so a backward pass begins with the calls that this stage does not make. Results for
        the next stage are sent and received at the end of the tick, by all ranks in one exchange; in a queue of single messages,
        a stage would wait for a neighbour that waits for it.
        """
        pipe, tick = self.pipeline, planned.tick
        layers = pipe.spec.attention_layers
        pipe.batches, pipe.direction, pipe.calls_made = planned.batches, tick.direction, 0
        number = self._micro_batch(tick, pipe.stage)
        others = pipe.batches[layers if number is not None else 0 :]
        if tick.direction == BACKWARD:
            self._participate(reversed(others), tick.direction)
        result = None
        if number is not None:
            result = (self._forward if tick.direction == FORWARD else self._backward)(number)
            if pipe.calls_made != layers:
                raise DistattnError(
                    f"stage {pipe.stage} made {pipe.calls_made} attention calls in a {tick.direction} pass, not {layers}."
                )
        if tick.direction == FORWARD:
            self._participate(others, tick.direction)
        self._pass_on(tick, result)

    def _micro_batch(self, tick: Tick, stage: int) -> int | None:
        """Return the micro-batch of a stage of this replica in a tick, or None."""
        number = tick.micro_batches[stage] if 0 <= stage < self.pipeline.stages else None
        return number if number is not None and number < len(self.packed) else None

    def _pass_on(self, tick: Tick, result: Tensor | None) -> None:
        """Send the result of this rank's micro-batch to one neighbour, and receive the other neighbour's result."""
        pipe = self.pipeline
        ahead = 1 if tick.direction == FORWARD else -1
        name = "hidden states" if tick.direction == FORWARD else "gradients of hidden states"
        sends, receives, number = [], [], self._micro_batch(tick, pipe.stage - ahead)
        result = result if 0 <= pipe.stage + ahead < pipe.stages else None
        shape = (1, 0 if number is None else self._local(number)["input_ids"].shape[1], pipe.spec.hidden_size)
        sizes = 0 if result is None else result.nbytes, prod(shape) * pipe.spec.dtype.itemsize
        with torch.no_grad(), ARENAS.borrowed(aligned_bytes(*sizes), pipe.device) as arena:
            allocator = ArenaAllocator(arena)
            if result is not None:
                sends.append(Packet(self._peer(ahead), name, allocator.copy_of(result)))
            if number is not None:
                receives.append(Packet(self._peer(-ahead), name, allocator.tensor(shape, pipe.spec.dtype)))
            # also without messages, since a rank with fewer exchanges than others counts as behind
            pipe.cp.transport(pipe.device).exchange(sends, receives, False, f"in a {tick.direction} tick").wait()
            if number is not None:
                self.received[tick.direction, number] = receives[0].tensor.clone()

    def _local(self, number: int) -> dict[str, Any]:
        """Return this rank's part of a micro-batch, computed once."""
        if number not in self.local:
            self.local[number] = self.pipeline.cp.local_shard(self.packed[number])
        return self.local[number]

    def _forward(self, number: int) -> Tensor:
        """Run a micro-batch forward; return the output for the next stage."""
        pipe = self.pipeline
        local = self._local(number) | {"loss_scale": self.scale, "context_parallel": _TickBatch(pipe)}
        hidden = None
        if pipe.stage:
            hidden = self.received.pop((FORWARD, number)).requires_grad_()
        out = self.stage(hidden, local)
        if pipe.stage + 1 < pipe.stages:
            wanted = (1, local["input_ids"].shape[1], pipe.spec.hidden_size)
            if out.shape != wanted:
                raise DistattnError(f"stage {pipe.stage} returned {tuple(out.shape)}, the next one is given {wanted}.")
            # autocast may have produced another dtype
            out = out.to(pipe.spec.dtype)
        else:
            self.losses.append(out.detach())
        self.entered[number], self.left[number] = hidden, out
        return out.detach()

    def _backward(self, number: int) -> Tensor | None:
        """Run a micro-batch backward; return the gradient for the previous stage, zeros if there is no gradient."""
        pipe = self.pipeline
        hidden, out = self.entered.pop(number), self.left.pop(number)
        last = pipe.stage + 1 == pipe.stages
        torch.autograd.backward(out, None if last else self.received.pop((BACKWARD, number)))
        if hidden is None:
            return None
        return torch.zeros_like(hidden) if hidden.grad is None else hidden.grad

    def _participate(self, batches: Iterable[LocalBatch | None], direction: str) -> None:
        pipe = self.pipeline
        for batch in batches:
            if batch is not None:
                join_pass(batch, ControlMessage(direction, batch.number, pipe.spec.shape, *pipe.score), pipe.device)

    def _peer(self, stages: int) -> int:
        """Return the rank of this replica that is `stages` stages ahead."""
        return self.pipeline.cp.rank + stages * self.pipeline.replicas


class _TickBatch(BatchAttention):
    """The batch of a stage's layers: it computes attention in the current tick."""

    def __init__(self, pipeline: PipelineSchedule):
        self.pipeline = pipeline

    def check_positions(self, positions: Tensor) -> None:
        """Accept the caller's positions of the micro-batch."""

    def attention(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKE: Tensor,
        scale: float | None = None,
        *,
        window: int | None = None,
        layer: int | None = None,
        **modifiers: Any,
    ) -> Tensor:
        """Compute as `LocalBatch.attention`; all layers have the same shape, so `layer` is ignored."""
        q_THD, k_TKD, v_TKE = autocast_inputs(q_THD, k_TKD, v_TKE)
        pipe = self.pipeline
        shape = AttentionShape.of(q_THD, k_TKD, v_TKE, window, modifiers=pipe.spec.shape.modifiers)
        if pipe.direction == BACKWARD:
            raise DistattnError(
                "a pipeline's layers are not recomputed: leave activation checkpointing of attention out."
            )
        score = q_THD.shape[2] ** -0.5 if scale is None else scale, modifiers.pop("softcap", 0.0)
        if score != pipe.score or any(value is not None for value in modifiers.values()):
            raise DistattnError(
                f"the pipeline was made for scale and soft cap {pipe.score}, without other modifiers; a layer asks for {score}"
                f"{''.join(f', {name}' for name, value in modifiers.items() if value is not None)}."
            )
        if shape != pipe.spec.shape:
            raise DistattnError(f"the pipeline was made for {pipe.spec.shape}, a layer has {shape}.")
        executable = _TickExecutable(pipe)
        return attention(q_THD, k_TKD, v_TKE, executable, scale=score[0], softcap=score[1])

    def recurrence(self, *arguments: Any, **named: Any) -> Tensor:
        """Raise DistattnError: a stage without tokens helps others only with attention."""
        raise DistattnError(
            "stages of a PipelineSchedule compute attention only; train models with other layers by ContextParallel.steps, "
            "or in Megatron's pipelines."
        )

    # convolutions and latents are other ops, too
    causal_conv1d = latent_attention = token_shift = prefix_softmax = recurrence


class _TickExecutable(Executable):
    """A stand-in for the executable of the next call, whose forward and backward passes run in different ticks."""

    def __init__(self, pipeline: PipelineSchedule):
        # nothing is kept from the forward pass, since the backward pass has another executable
        self.kept_elements, self._pipeline = 0, pipeline
        self.handle = EXECUTABLES.add(self)

    def for_direction(self, direction: str) -> Executable:
        """Return the executable of the current tick."""
        pipe = self._pipeline
        return pipe.next_batch().executable(pipe.spec.shape, pipe.device)
