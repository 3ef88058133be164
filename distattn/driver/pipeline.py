"""Pipeline stages whose attention is one pool: stages go forward and backward together, and those in a bubble serve.

Ranks are numbered stage by stage: rank = stage * replicas + replica. A replica's ranks are given the same micro-batches.
"""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim, W width of the hidden states

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.batch.packed_batch import Rows
from distattn.batch.planner import Shape, ShardedBatch
from distattn.driver.pipeline_ticks import Tick, ticks
from distattn.driver.pool import Documents, Pool, Told
from distattn.driver.servers import join
from distattn.ir.errors import DistattnError
from distattn.parallel.make_plan import STRATEGIES

Stage = Callable[[Tensor | None, dict[str, Any]], Tensor]


class Pipeline:
    """Trains `stages` pipeline stages with pooled attention.

    shape: of every attention layer. calls: attention layers of this rank's stage. width, dtype: of the hidden states (1, T, W)
    that stages pass on. scale, softcap: of the scores, as in `attention`. pool: options of `Pool`. Sum gradients over the
    replicas of a stage: losses are scaled for that.

        for losses in pipeline.train(loader, stage):
            ...

    stage(hidden, batch) -> hidden runs this rank's layers: `hidden` is None on the first stage, and the last one returns the
    loss. batch has what `Pool.steps` gives; its `context_parallel.attention` is pooled.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        stages: int,
        shape: Shape,
        calls: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        scale: float | None = None,
        softcap: float = 0.0,
        **pool: Any,
    ):
        self.pool = Pool(group, **pool)
        if stages < 1 or self.pool.ranks % stages:
            raise DistattnError(f"{stages} stages do not divide the {self.pool.ranks} ranks of the pool.")
        keeps = (pool.get("backward") or STRATEGIES[pool.get("strategy", "cad")].backward) == "keep"
        if self.pool.servers or self.pool.context_parallel > 1 or keeps:
            raise DistattnError("a pipeline's pool has no servers, no context parallelism and no backward policy keep.")
        self.stages, self.replicas = stages, self.pool.ranks // stages
        self.stage, self.replica = divmod(self.pool.rank, self.replicas)
        self.shape, self.calls, self.width, self.dtype = shape, calls, width, dtype
        self.device = torch.device(device)
        self.score = (shape.head_dim**-0.5 if scale is None else float(scale), float(softcap))
        depths: list[Any] = [calls]
        if self.pool.group is not None:
            depths = [None] * self.pool.ranks
            dist.all_gather_object(depths, calls, group=self.pool.group)
        self.depths = [int(found) for found in depths[:: self.replicas]]
        self.ticks: list[Tick] = []
        # of the tick that runs (a backward pass belongs to it, not to that of its forward pass): its direction, the batch of each
        # pooled call, and how many calls this rank's micro-batch has made
        self.direction, self.made = "forward", 0
        self.batches: list[ShardedBatch | None] = []

    def now(self) -> ShardedBatch:
        """The batch of the call that this rank's micro-batch makes next."""
        call = self.made if self.direction == "forward" else self.calls - 1 - self.made
        if not 0 <= call < self.calls:
            raise DistattnError(f"a {self.direction} pass of stage {self.stage} attends more than {self.calls} times.")
        self.made += 1
        batch = self.batches[call]
        assert batch is not None
        return batch

    def train(self, loader: Iterable[Any], stage: Stage) -> Iterator[list[Tensor]]:
        """For each step of the loader (micro-batches, as for `Pool.steps`) this rank's losses: on the last stage only."""
        # a replica's ranks have the same micro-batches
        twins = [rank % self.replicas for rank in range(self.pool.ranks)]
        for rows, heard in self.pool.told(loader, self._plan, twins):
            step = _Step(self, stage, rows, self.pool.loss_scale(heard.told[: self.replicas]))
            self.ticks = [tick for tick, _ in heard.made]
            for tick, batches in heard.made:
                step.run(tick, batches)
            step.finish()
            yield step.losses

    def _plan(self, number: int, told: list[Told]) -> list[tuple[Tick, list[ShardedBatch | None]]]:
        """The ticks of a step, with the batch of each pooled call: None where nobody has any tokens.

        Stages with fewer layers have no tokens in the calls they do not make.
        """
        order = ticks(self.stages, max((len(rank.documents) for rank in told), default=0))
        if not order:
            return []
        depths = sorted(set(self.depths))
        documents: list[Documents | None] = []
        for tick in order:
            for depth in depths:
                found: list[tuple[int, ...]] = []
                for micro_batch, layers in zip(tick.micro_batches, self.depths, strict=True):
                    for replica in range(self.replicas):
                        own = told[replica].documents
                        there = micro_batch is not None and micro_batch < len(own) and layers >= depth
                        found.append(own[micro_batch] if there and micro_batch is not None else ())
                documents.append(tuple(found) if any(found) else None)
        batches = iter(self.pool.numbered(number, documents, told))
        out = []
        for tick in order:
            made = {depth: next(batches) for depth in depths}
            # call i is made by the stages with more than i layers
            out.append((tick, [made[min(d for d in depths if d > call)] for call in range(depths[-1])]))
        return out

    def close(self) -> None:
        """End the pool. Every rank calls it."""
        self.pool.close()


class _Step:
    """One step on one rank: hidden states that wait for their backward, by micro-batch."""

    def __init__(self, pipeline: Pipeline, stage: Stage, rows: list[Rows], scale: float):
        self.pipeline, self.stage, self.rows, self.scale = pipeline, stage, rows, scale
        self.entered: dict[int, Tensor | None] = {}
        self.left: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []
        self.sent: list[Any] = []

    def run(self, tick: Tick, batches: list[ShardedBatch | None]) -> None:
        """This rank's part of a tick: its micro-batch, if it has one, and calls with nothing while others have more.

        Call i is every stage's i-th layer: a backward pass begins with the calls that this stage does not have.
        """
        pipe = self.pipeline
        pipe.batches, pipe.direction, pipe.made = batches, tick.direction, 0
        number = tick.micro_batches[pipe.stage]
        has = number is not None and number < len(self.rows)
        others = pipe.batches[pipe.calls if has else 0 :]
        if tick.direction == "backward":
            self._serve(reversed(others), tick.direction)
        if has:
            assert number is not None
            (self._forward if tick.direction == "forward" else self._backward)(number)
            if pipe.made != pipe.calls:
                raise DistattnError(
                    f"stage {pipe.stage} made {pipe.made} attention calls in a {tick.direction} pass, not {pipe.calls}."
                )
        if tick.direction == "forward":
            self._serve(others, tick.direction)

    def finish(self) -> None:
        """Wait for what was sent."""
        for work, _ in self.sent:
            work.wait()

    def _forward(self, number: int) -> None:
        pipe = self.pipeline
        local = pipe.pool.part(self.rows[number]) | {"loss_scale": self.scale, "context_parallel": _Pooled(pipe)}
        hidden = None
        if pipe.stage:
            hidden = self._received((1, local["input_ids"].shape[1], pipe.width), -1).requires_grad_()
        out = self.stage(hidden, local)
        self.entered[number], self.left[number] = hidden, out
        if pipe.stage + 1 < pipe.stages:
            self._send(out.detach(), 1)
        else:
            self.losses.append(out.detach())

    def _backward(self, number: int) -> None:
        pipe = self.pipeline
        hidden, out = self.entered.pop(number), self.left.pop(number)
        torch.autograd.backward(out, self._received(tuple(out.shape), 1) if pipe.stage + 1 < pipe.stages else None)
        if hidden is not None and hidden.grad is not None:
            self._send(hidden.grad, -1)

    def _serve(self, batches: Iterable[ShardedBatch | None], direction: str) -> None:
        pipe = self.pipeline
        for batch in batches:
            if batch is not None:
                join(batch, direction == "forward", pipe.shape, pipe.device, pipe.score)

    def _send(self, x: Tensor, stages: int) -> None:
        x = x.contiguous()
        # lives until it is sent
        self.sent.append((dist.isend(x, self._peer(stages), self.pipeline.pool.group), x))

    def _received(self, shape: tuple[int, ...], stages: int) -> Tensor:
        x = torch.empty(shape, dtype=self.pipeline.dtype, device=self.pipeline.device)
        dist.recv(x, self._peer(stages), self.pipeline.pool.group)
        return x

    def _peer(self, stages: int) -> int:
        pool = self.pipeline.pool
        assert pool.group is not None
        return dist.get_global_rank(pool.group, pool.rank + stages * self.pipeline.replicas)


class _Pooled:
    """What layers of a stage are given as their batch: attention in whatever tick runs."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def check_positions(self, given: Tensor) -> None:
        """Those of the micro-batch are the caller's."""

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
        """As `ShardedBatch.attention`; all layers are of one shape and way, whatever their number."""
        pipe, shape = self.pipeline, Shape.of(q_THD, k_TKD, v_TKE, window)
        given = q_THD.shape[2] ** -0.5 if scale is None else scale, modifiers.pop("softcap", 0.0)
        if given != pipe.score or any(value is not None for value in modifiers.values()):
            raise DistattnError(
                f"the pipeline was made for scale and soft cap {pipe.score}, without other modifiers; a layer asks for {given}"
                f"{''.join(f', {name}' for name, value in modifiers.items() if value is not None)}."
            )
        if shape != pipe.shape:
            raise DistattnError(f"the pipeline was made for {pipe.shape}, a layer has {shape}.")
        return _Attention.apply(q_THD, k_TKD, v_TKE, pipe)


class _Attention(torch.autograd.Function):
    """Forward in the pool of one tick, backward in that of another."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pipeline: Pipeline) -> Tensor:
        if pipeline.direction == "backward":
            raise DistattnError(
                "a pipeline's layers are not repeated: leave activation checkpointing of attention out."
            )
        handle, kept = _now(pipeline)
        o, lse, _ = torch.ops.distattn.forward(q, k, v, None, None, handle, kept, *pipeline.score)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.pipeline = pipeline
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        handle, _ = _now(ctx.pipeline)
        given = do.contiguous(), None, q, k, v, None, None, o, lse, q.new_empty(0), handle, *ctx.pipeline.score
        dq, dk, dv, _ = torch.ops.distattn.backward(*given)
        return dq, dk, dv, None


def _now(pipeline: Pipeline) -> tuple[int, int]:
    """(handle, numbers kept) of the next call in the tick that runs."""
    ready = pipeline.now().ready(pipeline.shape, pipeline.device)
    return ready.handle, ready.kept
