"""Plans of batches: what a batch needs so that its attention layers find their executable, made ahead on a thread."""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.batch.layer_overrides import LayerOverride, LayerOverrides, apply_window
from distattn.batch.packed_batch import checked_layout_options, padded
from distattn.cluster.spec import AnyCluster, resolve_cluster
from distattn.ir.arguments import check_fields
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout, make_layout
from distattn.ir.mask import Mask
from distattn.ir.op import ATTENTION, CONVOLUTION, TOKEN_SHIFT, Op, latent_op, op_of
from distattn.ir.plan import DTYPE_BYTES, Plan, dtype_name
from distattn.kernels.registry import AUTO, load_kernel
from distattn.kernels.trials import Trial
from distattn.ops.attention import attention, autocast_inputs, score_modifiers
from distattn.ops.convolution import causal_conv1d, token_shift
from distattn.ops.executable import (
    EXECUTABLES,
    Executable,
    ExecutionKey,
    PassObserver,
    checked_program,
    kernel_requirements,
)
from distattn.ops.kernel_choice import agreed_ranking, first_that_serves, has_choice, kernel_trials
from distattn.ops.latent import latent_attention, latent_kernel
from distattn.ops.recurrence import recurrence
from distattn.parallel.latent_plan import make_latent_plan
from distattn.parallel.make_plan import check_names, make_plan
from distattn.parallel.runtime.transport import Transport

# of steps between proofs, and of tokens that are padded to
_MOST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """How attention of batches is planned.

    strategy, backward, comm_dtype, cluster and options are as in `make_plan`; layout is a name of LAYOUTS with its options;
    document_mask is what a document attends to in itself (see `Mask.documents`). layers: of some layers, by number (0, 1,
    ...) or kind ("window", "full"), how they are planned otherwise: a mapping with strategy, and maybe backward, options,
    layout and layout_options; tokens are re-laid inside those layers' calls. kernel as in `attention`; max_buffer_bytes
    as in `make_plan`. verify_every: of so many steps the plans of one are proven before they run, the first in any case.
    pad_to: each rank's tokens are padded to a multiple of it. Raises DistattnError for names that do not exist.
    """

    strategy: str
    layout: str = "zigzag"
    layout_options: Mapping[str, Any] | None = None
    document_mask: str | tuple[int, int] = "causal"
    layers: Mapping[int | str, Mapping[str, Any]] | None = None
    kernel: str | None = None
    backward: str | None = None
    comm_dtype: Any = None
    cluster: AnyCluster | str | Path | None = None
    options: Mapping[str, object] | None = None
    max_buffer_bytes: int | None = None
    verify_every: int = 1
    pad_to: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        # compared between ranks by value
        object.__setattr__(self, "cluster", resolve_cluster(self.cluster))
        object.__setattr__(self, "comm_dtype", dtype_name(self.comm_dtype) or None)
        if self.comm_dtype not in (None, *DTYPE_BYTES):
            raise DistattnError(f"comm_dtype is one of {', '.join(DTYPE_BYTES)}, not {self.comm_dtype!r}.")
        check_names(self.strategy, self.backward, self.options)
        checked_layout_options(self.layout, self.layout_options, self.document_mask)
        if self.kernel not in (None, AUTO):
            load_kernel(self.kernel)
        for name in ("verify_every", "pad_to"):
            value = getattr(self, name)
            if not 1 <= value <= _MOST:
                raise DistattnError(f"{name} is a whole number of at least 1, and at most {_MOST:,}, not {value!r}.")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Any:
        """From keyword arguments. Raises DistattnError for one that does not exist."""
        known = [one.name for one in fields(cls)]
        if unknown := settings.keys() - known:
            raise DistattnError(f"there is no setting {sorted(unknown)[0]!r}; there are {', '.join(known)}.")
        if "strategy" not in settings:
            raise DistattnError('a strategy is needed, such as strategy="ring".')
        return cls(**settings)


class AttentionShape(NamedTuple):
    """What one attention layer asks for, beside the batch.

    window: each token sees the last so many, itself among them; of a token shift, its distance. override: how this layer is
    planned otherwise than others. modifiers: of its scores ("softcap", "alibi_slopes"), which not every kernel computes. op: of a
    recurrence heads are those of values, kv_heads those of queries and keys. layout: in which this layer's rows lie, by name, if
    not in the batch's.
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
    """

    def __init__(self, config: PlannerConfig, ranks: Ranks, lay_out: Callable[[Any], tuple[Mask, Layout]]):
        self.config, self.ranks = config, ranks
        self.overrides = LayerOverrides(config.layers)
        # fixed-length batches have the same documents again and again; packed ones never do
        self.lay_out = lru_cache(maxsize=8)(lay_out)
        self.plan = lru_cache(maxsize=8)(self._plan)
        self._shapes: dict[tuple[AttentionShape, torch.device], None] = {}
        # right kernels, fastest first, by what they were tried for
        self._ranked: dict[tuple[AttentionShape, str], list[str]] = {}
        self._lock = threading.Lock()

    def register_shape(self, shape: AttentionShape, device: torch.device) -> None:
        """Later batches are planned for this shape ahead of time."""
        with self._lock:
            self._shapes[shape, device] = None

    def registered_shapes(self) -> tuple[tuple[AttentionShape, torch.device], ...]:
        """The shapes layers have asked for so far. May be called on any thread."""
        with self._lock:
            return tuple(self._shapes)

    def planned(self, batch: BatchKey, shape: AttentionShape, device: torch.device, proven: bool) -> Planned:
        """Plan, prove and lower: the plan of a batch, with this rank's program made. May be called on any thread."""
        config, plan = self.config, self.plan_of(batch, shape)
        # the kernel that is asked for is one of attention
        kernel = config.kernel if shape.op.kind in ("attention", "latent_attention") else None
        if shape.op.kind == "latent_attention" and kernel in (None, AUTO):
            kernel = latent_kernel(plan.call, device)
        ranked = self._ranked.get(self._trial_of(shape, device))
        if ranked is not None:
            kernel = first_that_serves(ranked, kernel_requirements(plan.call, device, shape.modifiers))
        key, _ = checked_program(plan, self.ranks.rank, kernel, device, config.max_buffer_bytes, proven)
        return Planned(plan, key)

    def plan_of(self, batch: BatchKey, shape: AttentionShape) -> Plan:
        """The plan of a batch for a shape. Which modifiers scores have is the kernel's matter, not the plan's."""
        return self.plan(batch, shape._replace(modifiers=()))

    def try_kernels(self, batch: BatchKey, shape: AttentionShape, device: torch.device) -> None:
        """Find the right kernels for calls of such a shape by trial, unless one is asked for. All ranks call it for a new shape.

        Raises DistattnError on all of them where none is right.
        """
        trial = self._trial_of(shape, device)
        # the kernel that is asked for is one of attention
        is_asked_for = shape.op == ATTENTION and self.config.kernel not in (None, AUTO)
        if trial in self._ranked or is_asked_for or not has_choice(shape.op):
            return
        own: dict[str, Trial] = {}
        plan = broken = None
        # what a plan is refused for all ranks hear when they compare plans
        with suppress(DistattnError):
            plan = self.plan_of(batch, shape)
        if plan is not None:
            try:
                own = kernel_trials(plan, self.ranks.rank, kernel_requirements(plan.call, device, shape.modifiers))
            except DistattnError as error:
                # the others wait for this rank's trials, whatever has become of them
                broken = error
        ranked = agreed_ranking(own, device, lambda value: self.ranks.gather(value, "the trial of kernels"), shape.op)
        if broken is not None:
            raise broken
        # without a launch nobody has tried anything: another batch will
        if ranked:
            self._ranked[trial] = ranked

    def _trial_of(self, shape: AttentionShape, device: torch.device) -> tuple[AttentionShape, str]:
        """What trials of kernels are known by: windows of all sizes, and layers' own strategies, are tried as one."""
        return shape._replace(window=shape.window and 1, override=None, layout=None), device.type

    def layout_of(self, batch: BatchKey, name: str | None) -> Layout:
        """The layout of a batch, or the one of that name over its documents."""
        mask, layout = self.lay_out(batch.documents)
        return layout if name is None else make_layout(name, layout.lengths, layout.ranks, mask)

    def close(self) -> None:
        """Forget all plans."""
        self.plan.cache_clear()
        self.lay_out.cache_clear()

    def _plan(self, batch: BatchKey, shape: AttentionShape) -> Plan:
        config = self.config
        mask, layout = self.lay_out(batch.documents)[0], self.layout_of(batch, shape.layout)
        how: dict[str, Any] = dict(strategy=config.strategy, backward=config.backward)
        how["options"] = {**(config.options or {}), **dict(batch.options)}
        comm_dtype = config.comm_dtype
        # of other ops than attention tokens are where attention's are; what attention moves is another matter
        if shape.op == TOKEN_SHIFT:
            mask = Mask.token_shift(layout.lengths, shape.window or 0)
            # whole numbers travel as float64, whatever gradients travel as
            how, comm_dtype = dict(strategy="allgather", backward="keep"), None
        elif shape.op == CONVOLUTION:
            # the few tokens that come stay for the backward pass
            mask = Mask.documents(layout.lengths, ((shape.window or 1) - 1, 0))
            how = dict(strategy="allgather", backward="keep")
        elif shape.op.is_recurrent:
            mask, how = Mask.documents(layout.lengths), dict(strategy="scan")
        elif shape.window is not None:
            mask = Mask.documents(layout.lengths, apply_window(config.document_mask, shape.window))
        if shape.override is not None:
            how |= shape.override.settings(mask, layout)
        of_layer = shape._asdict()
        for name in ("window", "override", "modifiers", "layout"):
            del of_layer[name]
        how |= dict(comm_dtype=comm_dtype, cluster=config.cluster, max_buffer_bytes=config.max_buffer_bytes)
        if shape.op.kind == "latent_attention":
            del of_layer["op"], of_layer["kv_heads"]
            how |= dict(rotary_dim=shape.op.rotary_dim, latent_dim=shape.op.latent_dim)
            return make_latent_plan(mask, layout, **how, **of_layer)
        return make_plan(mask, layout, **how, **of_layer)


def _stays_at_owners(plan: Plan) -> bool:
    """Whether ranks without tokens have no part in a plan."""
    owners = np.flatnonzero(plan.call.layout.shard_sizes())
    tables = plan.forward, plan.backward
    ranks = [column for table in tables for column in (table.tasks["rank"], table.moves["src"], table.moves["dst"])]
    return bool(np.isin(np.concatenate(ranks), owners).all())


class BatchAttention(Protocol):
    """What attention layers are given as their batch: one per rank and micro-batch, or one that follows a pipeline's ticks.

    longest_document: tokens of the longest one of the micro-batch that this rank has a part of, whoever has its end; 0 where that
    is not known.
    """

    longest_document: int = 0

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
        """`distattn.attention` of this rank's tokens (T, heads, dim)."""
        ...

    def check_positions(self, given: Tensor) -> None:
        """Refuse positions (1, T) that a model has made itself, where they are known."""


class LocalBatch(BatchAttention):
    """The packed axis that one batch was laid out on: what attention layers need of it. It travels with the batch.

    positions: of this rank's tokens (1, T), where models are to be held to them. stands_in: whether this rank has no such
    micro-batch, and padding for one. used: whether a layer has asked for attention. number: of the batch, in the run. proven:
    whether its plans are proven before they run.
    """

    positions: Tensor | None = None
    stands_in: bool = False

    def __init__(self, planner: Planner, key: BatchKey, number: int, proven: bool):
        self.planner, self.key, self.number, self.proven = planner, key, number, proven
        self.used = False
        self._executables: dict[tuple[AttentionShape, torch.device], Executable] = {}
        self._ahead: dict[tuple[AttentionShape, torch.device], Future[Planned]] = {}
        self._checked: Tensor | None = None

    # plans are looked up, and maybe made: compiled layers are compiled before and behind it
    @torch.compiler.disable
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
        """`distattn.attention` of this rank's tokens (T, heads, dim), by the plan for these shapes.

        window: each token sees the last so many of its document, itself among them. layer: the layer's number in the model.
        """
        self.used = True
        q_THD, k_TKD, v_TKE = autocast_inputs(q_THD, k_TKD, v_TKE)
        override = self.planner.overrides.of(layer, window)
        asked = score_modifiers(modifiers.get("softcap"), modifiers.get("alibi_slopes"))
        shape = AttentionShape.of(q_THD, k_TKD, v_TKE, window, override, asked)
        executable = self.executable(shape, q_THD.device)
        # padding attends to nothing, but others may need the help of a rank that has nothing else
        return self._without_padding(
            executable, lambda q, k, v: attention(q, k, v, executable, scale=scale, **modifiers), q_THD, k_TKD, v_TKE
        )

    @torch.compiler.disable
    def recurrence(
        self,
        q_TGK: Tensor,
        k_TGK: Tensor,
        v_THV: Tensor,
        op: Op | str,
        *,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """`distattn.recurrence` of this rank's tokens, by the plan for this op ("gated_delta_rule", "ssd", ...) and these shapes.

        Every document of the batch begins with a state of zeros.
        """
        self.used = True
        q_TGK, k_TGK, v_THV = autocast_inputs(q_TGK, k_TGK, v_THV)
        shape = AttentionShape.of(v_THV, q_TGK, v_THV)._replace(head_dim=q_TGK.shape[2], op=op_of(op))
        executable = self.executable(shape, q_TGK.device)
        # a decay of each head has no tokens
        of_heads = g if g is not None and g.dim() == 1 else None

        def compute(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
            return recurrence(q, k, v, executable, g=of_heads if g is None else g, beta=beta, scale=scale)

        by_token = g if of_heads is None else None
        return self._without_padding(executable, compute, q_TGK, k_TGK, v_THV, by_token, beta)

    @torch.compiler.disable
    def latent_attention(
        self,
        q_THD: Tensor,
        rope_TR: Tensor,
        latent_TL: Tensor,
        up_HEL: Tensor,
        scale: float | None = None,
        *,
        window: int | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """`distattn.latent_attention` of this rank's tokens, by the strategy that attention has; window, layer: as there."""
        self.used = True
        q_THD, rope_TR, latent_TL, up_HEL = autocast_inputs(q_THD, rope_TR, latent_TL, up_HEL)
        op, heads, dim = latent_op(rope_TR.shape[1], latent_TL.shape[1]), q_THD.shape[1], q_THD.shape[2]
        values = up_HEL.shape[1] - dim + op.rotary_dim
        override, dtype = self.planner.overrides.of(layer, window), str(q_THD.dtype)[6:]
        shape = AttentionShape(heads, 1, dim, values, dtype, window, override, op=op)
        executable = self.executable(shape, q_THD.device)
        inputs = q_THD, rope_TR, latent_TL
        return self._without_padding(
            executable, lambda q, r, c: latent_attention(q, r, c, up_HEL, executable, scale=scale), *inputs
        )

    @torch.compiler.disable
    def causal_conv1d(
        self, x_TC: Tensor, weight: Tensor, *, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """`distattn.causal_conv1d` of this rank's tokens (T, C), by the plan for filters (C, W), or (C, C / G, W) of G groups."""
        self.used = True
        (x_TC,) = autocast_inputs(x_TC)
        if weight.dim() not in (2, 3):
            raise DistattnError(
                f"weight has shape {tuple(weight.shape)}; (C, W), or (C, C / G, W) of G groups, is wanted."
            )
        channels = weight.shape[1] if weight.dim() == 3 else len(weight)
        groups = max(len(weight) // max(channels, 1), 1)
        dtype, taps = str(x_TC.dtype)[6:], weight.shape[-1]
        shape = AttentionShape(groups, groups, 1, channels, dtype, taps, op=CONVOLUTION)
        executable = self.executable(shape, x_TC.device)
        return self._without_padding(
            executable, lambda x: causal_conv1d(x, weight, executable, bias=bias, activation=activation), x_TC
        )

    @torch.compiler.disable
    def token_shift(self, x_T: Tensor, distance: int = 1, *, fill: int = 0) -> Tensor:
        """What the token `distance` before each of this rank's tokens (T, ...) has, inside documents; after it where negative.

        Token shift and value shift: `token_shift(x)`. Labels of k tokens further ahead (multi-token prediction):
        `token_shift(labels, -k, fill=-100)`. See `distattn.token_shift`.
        """
        self.used = True
        dtype = str(x_T.dtype)[6:] if x_T.is_floating_point() else "float64"
        shape = AttentionShape(1, 1, 1, math.prod(x_T.shape[1:]), dtype, distance, op=TOKEN_SHIFT)
        executable = self.executable(shape, x_T.device)
        return self._without_padding(executable, lambda x: token_shift(x, executable, fill=fill), x_T, fill=fill)

    @property
    def tokens(self) -> int:
        """N, of all ranks together."""
        return self.planner.lay_out(self.key.documents)[1].n

    @property
    def own_tokens(self) -> int:
        """How many of this rank's tokens are of a document; the others are padding."""
        layout = self.planner.lay_out(self.key.documents)[1]
        return 0 if self.stands_in else len(layout.tokens(self.planner.ranks.rank))

    @torch.compiler.disable
    def check_positions(self, given: Tensor) -> None:
        """Refuse positions (1, T) that a model has made itself: rotary embeddings would be those of other tokens."""
        known = self.positions
        if known is None or given is known or given is self._checked:
            return
        if given.shape != known.shape or not torch.equal(given.to(known.device), known):
            raise DistattnError(
                "the model counts positions itself, and would give this rank's tokens those of others: call it with "
                'position_ids=batch["position_ids"].'
            )
        self._checked = given

    def _without_padding(
        self, executable: Executable, compute: Callable[..., Tensor], *by_token: Tensor | None, fill: int = 0
    ) -> Tensor:
        """What `compute` makes of these tensors of this rank's tokens without those that pad them, and `fill` for these."""
        tokens, given = executable.program.tokens, by_token[0]
        padding = padded(tokens, self.planner.config.pad_to) - tokens
        if not padding or given is None or len(given) != tokens + padding:
            return compute(*by_token)
        out = compute(*(None if x is None else x[:tokens] for x in by_token))
        return F.pad(out, (0, 0) * (out.dim() - 1) + (0, padding), value=fill)

    def plan(self, *shape: Any) -> Plan:
        """The plan of this batch for one shape, given as the fields of `AttentionShape`; layers of equal shape share it."""
        return self.planner.plan_of(self.key, AttentionShape(*shape))

    def executable(self, shape: AttentionShape, device: torch.device) -> Executable:
        """The executable of this batch for one shape.

        A shape that an earlier batch had was planned and agreed on ahead. One that is new to the run is planned now, and all
        ranks that share attention compare their plans, once.
        """
        known = shape, device
        if known not in self._executables:
            ahead = self._ahead.pop(known, None)
            plan, key = self._planned_now(shape, device) if ahead is None else ahead.result()
            ranks = self.planner.ranks
            program = EXECUTABLES.program(plan, key, self.proven)
            observer = ranks.observer(self, plan, shape)
            if shape.op != ATTENTION:
                if observer is not None and not observer.allows_interleaving and not _stays_at_owners(plan):
                    raise DistattnError(
                        f"servers compute attention only, and layers of {shape.op.name} are planned on ranks without tokens; "
                        "leave servers out."
                    )
                # speeds are measured on kernels of attention
                observer = None
            self._executables[known] = Executable(program, key, ranks.transport(device), observer)
        return self._executables[known]

    def plan_ahead(self, shapes: Sequence[tuple[AttentionShape, torch.device]]) -> list[Future[Planned]]:
        """Expect to be asked for these shapes: futures for the planning thread to fulfil."""
        self._ahead = {known: Future() for known in shapes}
        return list(self._ahead.values())

    def _planned_now(self, shape: AttentionShape, device: torch.device) -> Planned:
        planner = self.planner
        planner.ranks.begin_shape(self, shape)
        planner.try_kernels(self.key, shape, device)
        found = planner.ranks.agree(lambda: planner.planned(self.key, shape, device, self.proven))
        planner.register_shape(shape, device)
        return found
