"""Plans of batches, made ahead on a thread so that attention layers find their executables ready."""

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
from distattn.kernels.registry import AUTO, candidate_kernels
from distattn.kernels.trials import Trial
from distattn.ops.executable import ExecutionKey, PassObserver, checked_program, kernel_requirements
from distattn.ops.kernel_choice import common_kernel_ranking, first_supported, local_kernel_trials, may_choose_kernel
from distattn.ops.latent import latent_kernel
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.latent_plan import make_latent_plan
from distattn.parallel.make_plan import make_plan
from distattn.parallel.recurrent_plan import make_recurrent_plan
from distattn.parallel.runtime.communication.transport import Transport

if TYPE_CHECKING:
    from distattn.batch.local_batch import LocalBatch

# in these steps, shapes for which a kernel was unusable are not planned ahead, so that ranks try it again
_COMPARED_AT = (8, 64)
# the strategy of convolutions and token shifts, which receive few tokens and therefore keep them for the backward pass
_GATHERED = LayerOverride("allgather", "keep")


class AttentionShape(NamedTuple):
    """The properties of one layer that its plan and kernel depend on, besides the batch.

    heads, kv_heads: for a recurrence, the value heads, and the query and key heads. window: for attention, each token sees the
    last `window` tokens, including itself. override: how to plan this layer, if not like the others. modifiers: changes to its
    scores ("softcap", "alibi_slopes"), which some kernels do not support. layout: the name of the layout of this layer's rows, if
    not the batch's. taps: the length of a convolution's filters. shift_distance: the distance of a token shift, from the token
    read to the token that reads it.
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
    """A batch's key in the planner. documents: the argument of `Planner.lay_out`. options: strategy options for this batch."""

    documents: Hashable
    options: tuple[tuple[str, Any], ...] = ()


class Planned(NamedTuple):
    """A plan, and the key of this rank's program."""

    plan: Plan
    key: ExecutionKey


class PlanningRanks(Protocol):
    """The interface to the ranks that share attention: how they agree on a plan, and how messages travel."""

    rank: int

    def transport(self, device: torch.device) -> Transport:
        """Return the transport for messages between devices of this type. The first call for a type is collective."""
        ...

    def begin_shape(self, batch: LocalBatch, shape: AttentionShape) -> None:
        """Prepare for planning a batch for a shape new to the run. All ranks call this."""

    def agree(self, make: Callable[[], Planned]) -> Planned:
        """Create a plan for a shape new to the run by calling `make`, and compare it with the other ranks' plans.

        A collective call. If one rank's plan differs or is refused, all ranks raise DistattnError.
        """

    def gather(self, value: Any, activity: str) -> list[Any]:
        """Gather a value from every rank; return the values in rank order. A collective call.

        activity: describes the call in errors.
        """
        ...

    def observer(self, batch: LocalBatch, plan: Plan, shape: AttentionShape) -> PassObserver | None:
        """Return the observer of a batch's passes; None if they are not observed."""


class Planner:
    """A planner of batches over some ranks, with a cache of plans.

    lay_out: returns the mask and the layout of a batch's documents. Equal documents, as in batches of fixed length, are planned
    once. is_one_block: True if all ranks have the same batch.
    """

    def __init__(
        self,
        config: AttentionConfig,
        ranks: PlanningRanks,
        lay_out: Callable[[Any], tuple[Mask, Layout]],
        is_one_block: bool = True,
    ):
        self.config, self.ranks, self._is_one_block = config, ranks, is_one_block
        # integers are sent as float64, regardless of the dtype for gradients
        self._whole_numbers = replace(config, comm_dtype=None)
        self.overrides = LayerOverrides(config.layers)
        # small caches suffice: fixed-length batches repeat the same documents, and packed batches never repeat any
        self.lay_out = lru_cache(maxsize=8)(lay_out)
        self.plan = lru_cache(maxsize=8)(self._plan)
        self._shapes: dict[tuple[AttentionShape, torch.device], None] = {}
        # correct kernels, fastest first, keyed by the result of `_trial_of`
        self._ranked: dict[tuple[AttentionShape, str], list[str]] = {}
        # how often ranks have compared their trials, with the same keys
        self._comparisons: Counter[tuple[AttentionShape, str]] = Counter()
        self._lock = threading.Lock()

    def register_shape(self, shape: AttentionShape, device: torch.device) -> None:
        """Register a shape, so that later batches are planned for it ahead of time."""
        with self._lock:
            self._shapes[shape, device] = None

    def registered_shapes(self, step: int = 0) -> tuple[tuple[AttentionShape, torch.device], ...]:
        """Return the shapes requested by layers so far, to plan them a step ahead. May be called on any thread.

        In a few steps, shapes with an unusable kernel are left out, so that layers request them and kernels are tried again.
        """
        with self._lock:
            shapes = tuple(self._shapes)
        if step not in _COMPARED_AT:
            return shapes
        return tuple((shape, device) for shape, device in shapes if not self._may_find_more(shape, device))

    def planned(self, batch: BatchKey, shape: AttentionShape, device: torch.device, proven: bool) -> Planned:
        """Plan a batch, prove the plan if `proven`, and lower it to this rank's program. May be called on any thread."""
        config, plan = self.config, self.plan_of(batch, shape)
        # the configured kernel applies only to attention
        kernel = config.kernel if shape.op.is_softmax else None
        if shape.op.kind == "latent_attention" and kernel in (None, AUTO):
            kernel = latent_kernel(plan.call, device)
        ranked = self._ranked.get(self._trial_of(shape, device))
        if ranked is not None:
            kernel = first_supported(ranked, kernel_requirements(plan.call, device, shape.modifiers))
        key, _ = checked_program(plan, self.ranks.rank, kernel, device, config.max_buffer_bytes, proven)
        return Planned(plan, key)

    def plan_of(self, batch: BatchKey, shape: AttentionShape) -> Plan:
        """Return the plan of a batch for a shape. Score modifiers affect the kernel, not the plan."""
        return self.plan(batch, shape._replace(modifiers=()))

    def try_kernels(self, batch: BatchKey, shape: AttentionShape, device: torch.device) -> None:
        """Find the correct kernels for a shape by trial, unless a kernel is configured. All ranks call this for a new shape.

        If a kernel was unusable, a few later calls for the shape compare the ranks' trials again, because a trial that ran out of
        memory may then succeed. Raise DistattnError on all ranks if no kernel is correct.
        """
        trial = self._trial_of(shape, device)
        # the configured kernel applies only to attention
        is_asked_for = shape.op == ATTENTION and self.config.kernel not in (None, AUTO)
        if is_asked_for or not may_choose_kernel(shape.op):
            return
        if trial in self._ranked and not self._may_find_more(shape, device):
            return
        trials: dict[str, Trial] = {}
        plan = broken = None
        # if the plan is refused, the later comparison of plans reports the refusal to all ranks
        with suppress(DistattnError):
            plan = self.plan_of(batch, shape)
        if plan is not None:
            try:
                trials = local_kernel_trials(
                    plan, self.ranks.rank, kernel_requirements(plan.call, device, shape.modifiers)
                )
            except DistattnError as error:
                # raise the error only after the exchange of trials, because the other ranks wait for this rank's
                broken = error
        ranked = common_kernel_ranking(
            trials, device, lambda value: self.ranks.gather(value, "the trial of kernels"), shape.op
        )
        if broken is not None:
            raise broken
        # if no rank had a launch to try kernels on, let a later batch try them
        if ranked:
            self._ranked[trial] = ranked
            self._comparisons[trial] += 1

    def _may_find_more(self, shape: AttentionShape, device: torch.device) -> bool:
        """Return True if a kernel was unusable, and comparisons are left in which it may become usable. Equal on all ranks."""
        trial = self._trial_of(shape, device)
        ranked = self._ranked.get(trial)
        if ranked is None or self._comparisons[trial] > len(_COMPARED_AT):
            return False
        return len(ranked) < len(candidate_kernels(device, shape.op))

    def _trial_of(self, shape: AttentionShape, device: torch.device) -> tuple[AttentionShape, str]:
        """Return the key of a shape's kernel trials; windows, filters and shifts of all sizes share a key.

        Strategies have separate keys, because some compute while messages are in flight and others do not.
        """
        strategy = shape.override and LayerOverride(shape.override.strategy)
        one_size = shape._replace(window=shape.window and 1, taps=0, shift_distance=0)
        return one_size._replace(override=strategy, layout=None), device.type

    def layout_of(self, batch: BatchKey, name: str | None) -> Layout:
        """Return a batch's own layout, or the layout named `name` over its documents."""
        mask, layout = self.lay_out(batch.documents)
        return layout if name is None else make_layout(name, layout.lengths, layout.ranks, mask)

    def close(self) -> None:
        """Forget all plans."""
        self.plan.cache_clear()
        self.lay_out.cache_clear()

    def _plan(self, batch: BatchKey, shape: AttentionShape) -> Plan:
        config, override, op = self.config, shape.override, shape.op
        mask, layout = self.lay_out(batch.documents)[0], self.layout_of(batch, shape.layout)
        # ops other than attention use attention's layout, but strategies of their own
        if op == TOKEN_SHIFT:
            mask = Mask.token_shift(layout.lengths, shape.shift_distance)
            override, config = _GATHERED, self._whole_numbers
        elif op == CONVOLUTION:
            mask, override = Mask.documents(layout.lengths, (shape.taps - 1, 0)), _GATHERED
        elif op.is_recurrent:
            mask = Mask.documents(layout.lengths)
            # only the ranks that hold a batch have the states of its documents, so its tokens stay on these ranks
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
            # choose whether states or tokens move, whichever is faster
            plan = partial(make_recurrent_plan, kv_heads=shape.kv_heads, op=op)
        else:
            plan = partial(plan, options=dict(batch.options))
        heads, head_dim, v_head_dim = shape.heads, shape.head_dim, shape.v_head_dim
        return plan(
            mask, layout, config=config, heads=heads, head_dim=head_dim, v_head_dim=v_head_dim, dtype=shape.dtype
        )
