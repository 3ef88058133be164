"""Plans of batches: what a batch needs so that its attention layers find their executable, made ahead on a thread."""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distattn.batch.layer_overrides import LayerOverride, LayerOverrides, apply_window
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout, make_layout
from distattn.ir.mask import Mask
from distattn.ir.op import ATTENTION, CONVOLUTION, TOKEN_SHIFT, Op
from distattn.ir.plan import Plan
from distattn.kernels.registry import AUTO, candidates
from distattn.kernels.trials import Trial
from distattn.ops.executable import (
    ExecutionKey,
    PassObserver,
    checked_program,
    kernel_requirements,
)
from distattn.ops.kernel_choice import common_kernel_ranking, first_supported, local_kernel_trials, may_choose_kernel
from distattn.ops.latent import latent_kernel
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.latent_plan import make_latent_plan
from distattn.parallel.make_plan import make_plan
from distattn.parallel.recurrent_plan import make_recurrent_plan
from distattn.parallel.runtime.transport import Transport

if TYPE_CHECKING:
    from distattn.batch.local_batch import LocalBatch

# steps whose plans are not made ahead if a kernel could not be used: ranks compare their trials again then
_COMPARED_AT = (8, 64)
# the few tokens that convolutions and token shifts receive stay for the backward pass
_GATHERED = LayerOverride("allgather", "keep")


class AttentionShape(NamedTuple):
    """What one attention layer asks for, beside the batch.

    window: of attention, each token sees the last so many, itself among them. override: how this layer is planned otherwise than
    others. modifiers: of its scores ("softcap", "alibi_slopes"), which not every kernel computes. op: of a recurrence heads are
    those of values, kv_heads those of queries and keys. layout: in which this layer's rows lie, by name, if not in the batch's.
    taps: of a convolution's filters. shift_distance: of a token shift, from a token that is read to the one that reads it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    window: int | None = None
    override: LayerOverride | None = None
    modifiers: tuple[str, ...] = ()
    op: Op = ATTENTION
    layout: str | None = None
    taps: int = 0
    shift_distance: int = 0

    @staticmethod
    def of(
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKE: Tensor,
        window: int | None = None,
        override: LayerOverride | None = None,
        modifiers: tuple[str, ...] = (),
    ) -> AttentionShape:
        heads, kv_heads, dtype = q_THD.shape[1], k_TKD.shape[1], str(q_THD.dtype)[6:]
        return AttentionShape(heads, kv_heads, q_THD.shape[2], v_TKE.shape[2], dtype, window, override, modifiers)


class BatchKey(NamedTuple):
    """A batch to its planner: documents, in whatever form the planner's `lay_out` takes, and options of this batch alone."""

    documents: Hashable
    options: tuple[tuple[str, Any], ...] = ()


class Planned(NamedTuple):
    """A plan, and what this rank's program of it is known by."""

    plan: Plan
    key: ExecutionKey


class Ranks(Protocol):
    """The ranks that share attention, as a planner needs them: how they agree on a plan, and how its messages travel."""

    rank: int

    def transport(self, device: torch.device) -> Transport:
        """How messages between such devices travel. The first call for a device is collective."""
        ...

    def begin_shape(self, batch: LocalBatch, shape: AttentionShape) -> None:
        """A batch is about to be planned for a shape that is new to the run; all ranks come to it."""

    def agree(self, make: Callable[[], Planned]) -> Planned:
        """Plan a batch for a shape that is new to the run, by `make`, and compare the plan with the other ranks'.

        A collective call. Where one rank's plan differs or is refused, all raise DistattnError.
        """

    def gather(self, value: Any, what: str) -> list[Any]:
        """A value of every rank, by rank. A collective call; what: ranks do here, for the error of a missing one."""
        ...

    def observer(self, batch: LocalBatch, plan: Plan, shape: AttentionShape) -> PassObserver | None:
        """Who is told of the passes of a batch, if anybody."""


class Planner:
    """Makes and caches the plans of batches over some ranks.

    lay_out: documents of a batch to its mask and layout. Equal documents, as batches of fixed length have, are planned once.
    is_one_block: whether all ranks have the same batch.
    """

    def __init__(
        self,
        config: AttentionConfig,
        ranks: Ranks,
        lay_out: Callable[[Any], tuple[Mask, Layout]],
        is_one_block: bool = True,
    ):
        self.config, self.ranks, self._is_one_block = config, ranks, is_one_block
        # whole numbers travel as float64, whatever gradients travel as
        self._whole_numbers = replace(config, comm_dtype=None)
        self.overrides = LayerOverrides(config.layers)
        # fixed-length batches have the same documents again and again; packed ones never do
        self.lay_out = lru_cache(maxsize=8)(lay_out)
        self.plan = lru_cache(maxsize=8)(self._plan)
        self._shapes: dict[tuple[AttentionShape, torch.device], None] = {}
        # right kernels, fastest first, by what they were tried for
        self._ranked: dict[tuple[AttentionShape, str], list[str]] = {}
        # how often all ranks have compared their trials
        self._comparisons: Counter[tuple[AttentionShape, str]] = Counter()
        self._lock = threading.Lock()

    def register_shape(self, shape: AttentionShape, device: torch.device) -> None:
        """Later batches are planned for this shape ahead of time."""
        with self._lock:
            self._shapes[shape, device] = None

    def registered_shapes(self, step: int = 0) -> tuple[tuple[AttentionShape, torch.device], ...]:
        """Return the shapes layers have asked for so far, for a step's plans to be made ahead. May be called on any thread.

        In a few steps shapes are left out that a kernel could not be used for: layers ask for them, and it is tried again.
        """
        with self._lock:
            shapes = tuple(self._shapes)
        if step not in _COMPARED_AT:
            return shapes
        return tuple((shape, device) for shape, device in shapes if not self._may_find_more(shape, device))

    def planned(self, batch: BatchKey, shape: AttentionShape, device: torch.device, proven: bool) -> Planned:
        """Plan, prove and lower: the plan of a batch, with this rank's program made. May be called on any thread."""
        config, plan = self.config, self.plan_of(batch, shape)
        # the kernel that is asked for is one of attention
        kernel = config.kernel if shape.op.is_softmax else None
        if shape.op.kind == "latent_attention" and kernel in (None, AUTO):
            kernel = latent_kernel(plan.call, device)
        ranked = self._ranked.get(self._trial_of(shape, device))
        if ranked is not None:
            kernel = first_supported(ranked, kernel_requirements(plan.call, device, shape.modifiers))
        key, _ = checked_program(plan, self.ranks.rank, kernel, device, config.max_buffer_bytes, proven)
        return Planned(plan, key)

    def plan_of(self, batch: BatchKey, shape: AttentionShape) -> Plan:
        """The plan of a batch for a shape. Which modifiers scores have is the kernel's matter, not the plan's."""
        return self.plan(batch, shape._replace(modifiers=()))

    def try_kernels(self, batch: BatchKey, shape: AttentionShape, device: torch.device) -> None:
        """Find the right kernels for calls of such a shape by trial, unless one is asked for. All ranks call it for a new shape.

        If it is called again for what has been tried, and a kernel could not be used, ranks compare their trials again, a few
        times: a trial that ran out of memory may find room by then.
        Raises DistattnError on all of them where none is right.
        """
        trial = self._trial_of(shape, device)
        # the kernel that is asked for is one of attention
        is_asked_for = shape.op == ATTENTION and self.config.kernel not in (None, AUTO)
        if is_asked_for or not may_choose_kernel(shape.op):
            return
        if trial in self._ranked and not self._may_find_more(shape, device):
            return
        own: dict[str, Trial] = {}
        plan = broken = None
        # what a plan is refused for all ranks hear when they compare plans
        with suppress(DistattnError):
            plan = self.plan_of(batch, shape)
        if plan is not None:
            try:
                own = local_kernel_trials(
                    plan, self.ranks.rank, kernel_requirements(plan.call, device, shape.modifiers)
                )
            except DistattnError as error:
                # the others wait for this rank's trials, whatever has become of them
                broken = error
        ranked = common_kernel_ranking(
            own, device, lambda value: self.ranks.gather(value, "the trial of kernels"), shape.op
        )
        if broken is not None:
            raise broken
        # without a launch nobody has tried anything: another batch will
        if ranked:
            self._ranked[trial] = ranked
            self._comparisons[trial] += 1

    def _may_find_more(self, shape: AttentionShape, device: torch.device) -> bool:
        """Return whether a kernel could not be used in a few comparisons of all ranks so far; alike on all ranks."""
        trial = self._trial_of(shape, device)
        ranked = self._ranked.get(trial)
        if ranked is None or self._comparisons[trial] > len(_COMPARED_AT):
            return False
        return len(ranked) < len(candidates(device, shape.op))

    def _trial_of(self, shape: AttentionShape, device: torch.device) -> tuple[AttentionShape, str]:
        """Return what trials of kernels are known by: windows, filters and shifts of all sizes are tried as one.

        Strategies are tried one by one, since one computes while messages are in flight, and another does not.
        """
        strategy = shape.override and LayerOverride(shape.override.strategy)
        one_size = shape._replace(window=shape.window and 1, taps=0, shift_distance=0)
        return one_size._replace(override=strategy, layout=None), device.type

    def layout_of(self, batch: BatchKey, name: str | None) -> Layout:
        """The layout of a batch, or the one of that name over its documents."""
        mask, layout = self.lay_out(batch.documents)
        return layout if name is None else make_layout(name, layout.lengths, layout.ranks, mask)

    def close(self) -> None:
        """Forget all plans."""
        self.plan.cache_clear()
        self.lay_out.cache_clear()

    def _plan(self, batch: BatchKey, shape: AttentionShape) -> Plan:
        config, override, op = self.config, shape.override, shape.op
        mask, layout = self.lay_out(batch.documents)[0], self.layout_of(batch, shape.layout)
        # tokens of other ops are where attention's are, but they have strategies of their own
        if op == TOKEN_SHIFT:
            mask = Mask.token_shift(layout.lengths, shape.shift_distance)
            override, config = _GATHERED, self._whole_numbers
        elif op == CONVOLUTION:
            mask, override = Mask.documents(layout.lengths, (shape.taps - 1, 0)), _GATHERED
        elif op.is_recurrent:
            mask = Mask.documents(layout.lengths)
            # states of documents are known to the ranks that have the batch: tokens stay there
            override = None if self._is_one_block else LayerOverride("scan")
        elif shape.window is not None:
            mask = Mask.documents(layout.lengths, apply_window(config.document_mask, shape.window))
        plan: Callable[..., Plan] = partial(make_plan, kv_heads=shape.kv_heads, op=op)
        if op.kind == "latent_attention":
            plan = partial(make_latent_plan, rotary_dim=op.rotary_dim, latent_dim=op.latent_dim)
        if override is not None:
            plan = partial(
                plan,
                strategy=override.strategy,
                backward=override.backward,
                options=dict(override.options),
                working_layout=override.working_layout(mask, layout),
            )
        elif op.is_recurrent:
            # states move or tokens, whichever is faster
            plan = partial(make_recurrent_plan, kv_heads=shape.kv_heads, op=op)
        else:
            plan = partial(plan, options=dict(batch.options))
        heads, head_dim, v_head_dim = shape.heads, shape.head_dim, shape.v_head_dim
        return plan(
            mask, layout, config=config, heads=heads, head_dim=head_dim, v_head_dim=v_head_dim, dtype=shape.dtype
        )
