"""Pipeline stages whose attention is shared: stages go forward and backward together, and those in a bubble help others.

A schedule over `ContextParallel` with data="per_rank". Ranks are numbered stage by stage: rank = stage * replicas + replica;
all ranks of a replica are given the same micro-batches.
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
    """What a schedule needs to know of this rank's stage.

    shape: of every attention layer; attention_layers: how many this stage has. hidden_size and dtype: of the hidden states
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
    loss. batch is what `ContextParallel.steps` gives. Sum gradients over the replicas of a stage, or give
    `ContextParallel.loss_scale` what you do instead. Raises DistattnError for a driver that pipelines cannot use.
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
        # a collective call, and the first to send may be some ranks only
        cp.transport(self.device)
        scale = spec.shape.head_dim**-0.5 if spec.scale is None else float(spec.scale)
        self.score = scale, float(spec.softcap)
        depths: list[Any] = [spec.attention_layers]
        if cp.group is not None:
            depths = all_gather_objects(cp.group, spec.attention_layers)
        # attention layers of each stage
        self.depths = [int(depth) for depth in depths[:: self.replicas]]
        self.ticks: list[Tick] = []
        # of the tick that runs (a backward pass belongs to it, not to that of its forward pass): its direction, the batch of
        # each shared call, and how many calls this rank's micro-batch has made
        self.direction, self.made = FORWARD, 0
        self.batches: list[LocalBatch | None] = []

    def next_batch(self) -> LocalBatch:
        """The batch of the call that this rank's micro-batch makes next."""
        layers = self.spec.attention_layers
        call = self.made if self.direction == FORWARD else layers - 1 - self.made
        if not 0 <= call < layers:
            raise DistattnError(f"a {self.direction} pass of stage {self.stage} attends more than {layers} times.")
        self.made += 1
        batch = self.batches[call]
        assert batch is not None
        return batch

    def train(self, loader: Iterable[Any], stage: StageFunction) -> Iterator[list[Tensor]]:
        """For each step of the loader (micro-batches, as for `ContextParallel.steps`) this rank's losses: on the last stage."""
        first_of_replicas = list(range(self.replicas))
        same_batch = [rank % self.replicas for rank in range(self.cp.ranks)]
        for packed, gathered in self.cp.gathered_steps(loader, self._plan, same_batch):
            step = _PipelineStep(self, stage, packed, self.cp.loss_scale_of(gathered, first_of_replicas))
            self.ticks = [tick.tick for tick in gathered.made]
            for tick in gathered.made:
                step.run(tick)
            yield step.losses

    def _plan(self, step: GatheredStep) -> tuple[list[_PlannedTick], list[LocalBatch]]:
        """The ticks of a step, and all their batches.

        Stages with fewer layers have no tokens in the calls they do not make.
        """
        order = ticks(self.stages, max((len(info.documents) for info in step.infos), default=0))
        if not order:
            return [], []
        depths = sorted(set(self.depths))
        documents: list[Documents | None] = []
        for tick in order:
            for depth in depths:
                found: list[tuple[int, ...]] = []
                for micro_batch, layers in zip(tick.micro_batches, self.depths, strict=True):
                    for replica in range(self.replicas):
                        own = step.infos[replica].documents
                        there = micro_batch is not None and micro_batch < len(own) and layers >= depth
                        found.append(own[micro_batch] if there and micro_batch is not None else ())
                documents.append(tuple(found) if any(found) else None)
        made = self.cp.batches(step, documents)
        batches = iter(made)
        out = []
        for tick in order:
            by_depth = {depth: next(batches) for depth in depths}
            # call i is made by the stages with more than i layers
            calls = [by_depth[min(d for d in depths if d > call)] for call in range(depths[-1])]
            out.append(_PlannedTick(tick, calls))
        return out, [batch for batch in made if batch is not None]


class _PlannedTick(NamedTuple):
    """A tick, and the batch of each shared call: None where nobody has any tokens."""

    tick: Tick
    batches: list[LocalBatch | None]


class _PipelineStep:
    """One step on one rank: hidden states that wait for their backward, by micro-batch."""

    def __init__(self, pipeline: PipelineSchedule, stage: StageFunction, packed: list[Batch], scale: float):
        self.pipeline, self.stage, self.packed, self.scale = pipeline, stage, packed, scale
        self.entered: dict[int, Tensor | None] = {}
        self.left: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []
        # what other stages have sent, by direction and micro-batch
        self.received: dict[tuple[str, int], Tensor] = {}
        self.local: dict[int, dict[str, Any]] = {}

    def run(self, planned: _PlannedTick) -> None:
        """This rank's part of a tick: its micro-batch, if it has one, and calls with nothing while others have more.

        Call i is every stage's i-th layer: a backward pass begins with the calls that this stage does not have. What a
        micro-batch gives the next stage is sent and received at the end of the tick, by all in one exchange: in a queue of
        single messages a stage would wait for a neighbour that waits for it.
        """
        pipe, tick = self.pipeline, planned.tick
        layers = pipe.spec.attention_layers
        pipe.batches, pipe.direction, pipe.made = planned.batches, tick.direction, 0
        number = self._micro_batch(tick, pipe.stage)
        others = pipe.batches[layers if number is not None else 0 :]
        if tick.direction == BACKWARD:
            self._participate(reversed(others), tick.direction)
        leaves = None
        if number is not None:
            leaves = (self._forward if tick.direction == FORWARD else self._backward)(number)
            if pipe.made != layers:
                raise DistattnError(
                    f"stage {pipe.stage} made {pipe.made} attention calls in a {tick.direction} pass, not {layers}."
                )
        if tick.direction == FORWARD:
            self._participate(others, tick.direction)
        self._pass_on(tick, leaves)

    def _micro_batch(self, tick: Tick, stage: int) -> int | None:
        """The micro-batch that a stage of this replica has in a tick."""
        number = tick.micro_batches[stage] if 0 <= stage < self.pipeline.stages else None
        return number if number is not None and number < len(self.packed) else None

    def _pass_on(self, tick: Tick, leaves: Tensor | None) -> None:
        """Send what this rank's micro-batch gives its neighbour, and receive what the other neighbour's gives this one."""
        pipe = self.pipeline
        ahead = 1 if tick.direction == FORWARD else -1
        name = "hidden states" if tick.direction == FORWARD else "gradients of hidden states"
        sends, receives, number = [], [], self._micro_batch(tick, pipe.stage - ahead)
        leaves = leaves if 0 <= pipe.stage + ahead < pipe.stages else None
        shape = (1, 0 if number is None else self._local(number)["input_ids"].shape[1], pipe.spec.hidden_size)
        sizes = 0 if leaves is None else leaves.nbytes, prod(shape) * pipe.spec.dtype.itemsize
        with torch.no_grad(), ARENAS.borrowed(aligned_bytes(*sizes), pipe.device) as arena:
            allocator = ArenaAllocator(arena)
            if leaves is not None:
                sends.append(Packet(self._peer(ahead), name, allocator.copy_of(leaves)))
            if number is not None:
                receives.append(Packet(self._peer(-ahead), name, allocator.tensor(shape, pipe.spec.dtype)))
            # also with nothing to say: whoever has come to fewer exchanges than others counts as behind
            pipe.cp.transport(pipe.device).exchange(sends, receives, False, f"in a {tick.direction} tick").wait()
            if number is not None:
                self.received[tick.direction, number] = receives[0].tensor.clone()

    def _local(self, number: int) -> dict[str, Any]:
        """This rank's part of a micro-batch, made once."""
        if number not in self.local:
            self.local[number] = self.pipeline.cp.local_shard(self.packed[number])
        return self.local[number]

    def _forward(self, number: int) -> Tensor:
        """What the next stage is to have."""
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
            # autocast may have left another one
            out = out.to(pipe.spec.dtype)
        else:
            self.losses.append(out.detach())
        self.entered[number], self.left[number] = hidden, out
        return out.detach()

    def _backward(self, number: int) -> Tensor | None:
        """What the stage before is to have: zeros where no gradient goes back."""
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
        """The rank of this replica so many stages on."""
        return self.pipeline.cp.rank + stages * self.pipeline.replicas


class _TickBatch(BatchAttention):
    """What layers of a stage are given as their batch: attention in whatever tick runs."""

    def __init__(self, pipeline: PipelineSchedule):
        self.pipeline = pipeline

    def check_positions(self, given: Tensor) -> None:
        """Positions of the micro-batch are the caller's."""

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
        """As `LocalBatch.attention`; all layers are of one shape, whatever their number."""
        q_THD, k_TKD, v_TKE = autocast_inputs(q_THD, k_TKD, v_TKE)
        pipe = self.pipeline
        shape = AttentionShape.of(q_THD, k_TKD, v_TKE, window, modifiers=pipe.spec.shape.modifiers)
        if pipe.direction == BACKWARD:
            raise DistattnError(
                "a pipeline's layers are not recomputed: leave activation checkpointing of attention out."
            )
        asked = q_THD.shape[2] ** -0.5 if scale is None else scale, modifiers.pop("softcap", 0.0)
        if asked != pipe.score or any(value is not None for value in modifiers.values()):
            raise DistattnError(
                f"the pipeline was made for scale and soft cap {pipe.score}, without other modifiers; a layer asks for {asked}"
                f"{''.join(f', {name}' for name, value in modifiers.items() if value is not None)}."
            )
        if shape != pipe.spec.shape:
            raise DistattnError(f"the pipeline was made for {pipe.spec.shape}, a layer has {shape}.")
        executable = _TickExecutable(pipe)
        return attention(q_THD, k_TKD, v_TKE, executable, scale=asked[0], softcap=asked[1])

    def recurrence(self, *given: Any, **named: Any) -> Tensor:
        """Raises DistattnError: a stage without tokens of its own helps others with attention, and with nothing else."""
        raise DistattnError(
            "stages of a PipelineSchedule compute attention only; train models with other layers by ContextParallel.steps, "
            "or in Megatron's pipelines."
        )

    # convolutions and latents are other ops, too
    causal_conv1d = latent_attention = token_shift = prefix_softmax = recurrence


class _TickExecutable(Executable):
    """Stands for the executable of the next call: forward in one tick, backward in another."""

    def __init__(self, pipeline: PipelineSchedule):
        # nothing is kept from the forward pass, whose executable is not the backward's
        self.kept_elements, self._pipeline = 0, pipeline
        self.handle = EXECUTABLES.add(self)

    def for_direction(self, direction: str) -> Executable:
        """The executable of the tick that runs."""
        pipe = self._pipeline
        return pipe.next_batch().executable(pipe.spec.shape, pipe.device)
