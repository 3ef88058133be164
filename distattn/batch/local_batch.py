"""The operations of a model's layers on one batch: attention, recurrences, convolutions and shifts of this rank's tokens."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.batch.awaited_result import AwaitedResult
from distattn.batch.packed_batch import padded
from distattn.batch.planner import AttentionShape, BatchKey, Planned, Planner
from distattn.batch.pooled_layout import BatchBlock
from distattn.ir.errors import DistattnError
from distattn.ir.op import ATTENTION, CONVOLUTION, TOKEN_SHIFT, Op, latent_op, op_of
from distattn.ir.plan import Plan
from distattn.ops.attention import attention, autocast_inputs, score_modifiers
from distattn.ops.convolution import causal_conv1d, token_shift
from distattn.ops.executable import EXECUTABLES, Executable
from distattn.ops.latent import latent_attention
from distattn.ops.prefix_softmax import prefix_softmax
from distattn.ops.recurrence import recurrence
from distattn.parallel.prefix_softmax_plans import PrefixSoftmaxPlans, prefix_softmax_shapes
from distattn.parallel.runtime.communication.all_reduce import all_reduce_sum
from distattn.parallel.runtime.communication.relaid_rows import RowMoves
from distattn.supervision.heartbeats import set_layer


class BatchAttention(Protocol):
    """The batch that attention layers receive: one per rank and micro-batch, real or emulated.

    longest_document: the length in tokens of the longest document in the micro-batch that this rank shares; 0 if unknown.
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
        """Compute `distattn.attention` for this rank's tokens (T, heads, dim)."""
        ...

    def check_positions(self, positions: Tensor) -> None:
        """Raise DistattnError for wrong positions (1, T), if the correct positions are known."""


class LocalBatch(BatchAttention):
    """One batch, with the operations that layers run on this rank's tokens. The model passes it to its layers.

    positions: the positions (1, T) of this rank's tokens, or None to accept any positions from models. stands_in: True if this
    rank has only padding in place of a micro-batch. layout: the name of the rows' layout, if it is not the batch's. used: True
    once a layer has called an operation. mixed: True once a layer has called a recurrence or a convolution. number: the batch's
    index in the run. proven: True if plans are proven before they run. relaid_spans: whether a span of recurrent layers moves its
    rows, keyed by shape, number of layers and width (see `recurrent_span`). block: the ranks with this batch, and its documents;
    by default all ranks and documents.
    """

    positions: Tensor | None = None
    stands_in: bool = False
    layout: str | None = None

    def __init__(self, planner: Planner, key: BatchKey, number: int, proven: bool, block: BatchBlock | None = None):
        self.planner, self.key, self.number, self.proven = planner, key, number, proven
        self._block = block
        self.used = self.mixed = False
        self.relaid_spans: dict[tuple[AttentionShape, int, int], bool] = {}
        self._row_moves: dict[tuple[str, torch.device], RowMoves] = {}
        self._plans: dict[AttentionShape, Plan] = {}
        self._executables: dict[tuple[AttentionShape, torch.device], Executable] = {}
        self._ahead: dict[tuple[AttentionShape, torch.device], AwaitedResult[Planned]] = {}
        # the executable and the number of padding rows of an attention call, keyed by the call's shapes and settings
        self._calls: dict[tuple[Any, ...], tuple[Executable, int]] = {}
        self._checked: Tensor | None = None

    # excluded from torch.compile, because it looks up plans and may create them
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
        """Compute `distattn.attention` for this rank's tokens (T, heads, dim), with the plan for these shapes.

        window: each token sees the last `window` tokens of its document, including itself. layer: the layer's number in the
        model.
        """
        self.used = True
        modifier_names = score_modifiers(modifiers.get("softcap"), modifiers.get("alibi_slopes"))
        kind = q_THD.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtypes = q_THD.dtype, k_TKD.dtype, v_TKE.dtype, casts
        call = q_THD.shape, k_TKD.shape, v_TKE.shape, dtypes, q_THD.device, window, layer, modifier_names
        if call not in self._calls:
            override = self.planner.overrides.of(layer, window)
            q, k, v = autocast_inputs(q_THD, k_TKD, v_TKE)
            shape = AttentionShape.of(q, k, v, window, override, modifier_names)
            executable = self.executable(shape, q_THD.device)
            self._calls[call] = executable, self._padding(executable, q_THD)
        executable, padding = self._calls[call]
        set_layer(layer)
        if not padding:
            return attention(q_THD, k_TKD, v_TKE, executable, scale=scale, **modifiers)
        # leave out padding; if no rows are left, still call attention, because this rank may have to compute tasks of other ranks
        rows = slice(executable.program.tokens)
        output = attention(q_THD[rows], k_TKD[rows], v_TKE[rows], executable, scale=scale, **modifiers)
        if isinstance(output, tuple):
            o_THE, lse_HT = output
            return cast(Tensor, (_padded(o_THE, padding), F.pad(lse_HT, (0, padding), value=-math.inf)))
        return _padded(output, padding)

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
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
    ) -> Any:
        """Compute `distattn.recurrence` for this rank's tokens, with the plan for these shapes and this op.

        op: an op or its name ("gated_delta_rule", ...). initial_state: (M, H, K, V), a state for each of the M `documents`, on
        every rank that has this batch; 0 by default. Its gradient is this rank's share, to be summed over ranks like any
        parameter's. With return_final_state also return the states after all documents, (M, H, K, V) in fp32 (fp64 for fp64).
        They are equal on all ranks that have this batch, wherever documents end, and can be a later batch's initial states.
        Both states are differentiable. The backward pass sums the gradients of final states over these ranks in a collective
        call, so either all of them use final states or none.
        """
        self.used = self.mixed = True
        q_TGK, k_TGK, v_THV = autocast_inputs(q_TGK, k_TGK, v_THV)
        shape = AttentionShape.of(v_THV, q_TGK, v_THV)._replace(head_dim=q_TGK.shape[2], op=op_of(op))
        executable = self.executable(shape, q_TGK.device)
        # a decay per head has no token axis, so it is passed separately
        of_heads = g if g is not None and g.dim() == 1 else None

        states = self._states_in(initial_state)
        op_of_batch = partial(recurrence, scale=scale, initial_state=states, return_final_state=return_final_state)

        def compute(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Any:
            return op_of_batch(q, k, v, executable, g=of_heads if g is None else g, beta=beta)

        by_token = g if of_heads is None else None
        return self._states_out(self._without_padding(executable, compute, q_TGK, k_TGK, v_THV, by_token, beta))

    @torch.compiler.disable
    def prefix_softmax(self, weights_THL: Tensor, logits_THL: Tensor, v_THV: Tensor) -> Tensor:
        """Compute `distattn.prefix_softmax` for this rank's tokens: Latte, Aaren or causal Efficient Attention.

        weights, logits: (T, H, L), with L latents per head. v: (T, H, V). Every document starts without a state.
        """
        self.used = self.mixed = True
        (v_THV,) = autocast_inputs(v_THV)
        (heads, latents), dtype = logits_THL.shape[1:], str(v_THV.dtype)[6:]
        shapes = prefix_softmax_shapes(heads, latents, v_THV.shape[2], dtype)
        plans = PrefixSoftmaxPlans(*(self.executable(AttentionShape(**shape), v_THV.device) for shape in shapes))
        inputs = v_THV, logits_THL, weights_THL
        return self._without_padding(plans.weighted, lambda v, k, w: prefix_softmax(w, k, v, plans), *inputs)

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
        """Compute `distattn.latent_attention` for this rank's tokens, with attention's strategy.

        window, layer: see `attention`.
        """
        self.used = True
        q_THD, rope_TR, latent_TL, up_HEL = autocast_inputs(q_THD, rope_TR, latent_TL, up_HEL)
        op, heads, dim = latent_op(rope_TR.shape[1], latent_TL.shape[1]), q_THD.shape[1], q_THD.shape[2]
        values = up_HEL.shape[1] - dim + op.rotary_dim
        override, dtype = self.planner.overrides.of(layer, window), str(q_THD.dtype)[6:]
        shape = AttentionShape(heads, 1, dim, values, dtype, window, override, op=op)
        executable = self.executable(shape, q_THD.device)
        inputs = q_THD, rope_TR, latent_TL
        return self._without_padding(
            executable, lambda q, r, c: latent_attention(q, r, c, up_HEL, executable, scale=scale), *inputs, layer=layer
        )

    @torch.compiler.disable
    def causal_conv1d(
        self,
        x_TC: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        activation: str | None = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
    ) -> Any:
        """Compute `distattn.causal_conv1d` for this rank's tokens (T, C).

        weight: filters (C, W), or (C, C / G, W) with G groups. initial_state: (M, C, W - 1), the inputs before each of
        the M `documents`. With return_final_state also return the last W - 1 inputs of each document, in x's dtype. See
        `recurrence` for which ranks have these states and how their gradients are summed.
        """
        self.used = self.mixed = True
        (x_TC,) = autocast_inputs(x_TC)
        if weight.dim() not in (2, 3):
            raise DistattnError(
                f"weight has shape {tuple(weight.shape)}; (C, W), or (C, C / G, W) of G groups, is needed."
            )
        channels = weight.shape[1] if weight.dim() == 3 else len(weight)
        groups = max(len(weight) // max(channels, 1), 1)
        dtype, taps = str(x_TC.dtype)[6:], weight.shape[-1]
        modifiers = ("grouped",) if weight.dim() == 3 else ()
        shape = AttentionShape(groups, groups, 1, channels, dtype, modifiers=modifiers, op=CONVOLUTION, taps=taps)
        executable = self.executable(shape, x_TC.device)
        states = self._states_in(initial_state)
        op_of_batch = partial(causal_conv1d, initial_state=states, return_final_state=return_final_state)

        def compute(x: Tensor) -> Any:
            return op_of_batch(x, weight, executable, bias=bias, activation=activation)

        return self._states_out(self._without_padding(executable, compute, x_TC))

    @torch.compiler.disable
    def token_shift(self, x_T: Tensor, distance: int = 1, *, fill: int = 0) -> Tensor:
        """Shift this rank's tokens (T, ...): replace each with the token `distance` places before it in its document.

        With a negative distance, tokens come from later in the document. `token_shift(x)` is token shift or value
        shift. `token_shift(labels, -k, fill=-100)` returns labels k tokens further ahead (multi-token prediction). See
        `distattn.token_shift`.
        """
        self.used = True
        dtype = str(x_T.dtype)[6:] if x_T.is_floating_point() else "float64"
        shape = AttentionShape(1, 1, 1, math.prod(x_T.shape[1:]), dtype, op=TOKEN_SHIFT, shift_distance=distance)
        executable = self.executable(shape, x_T.device)
        return self._without_padding(executable, lambda x: token_shift(x, executable, fill=fill), x_T, fill=fill)

    @property
    def block(self) -> BatchBlock:
        """The ranks with this batch, and the range of its documents on the axis."""
        if self._block is None:
            layout = self.planner.lay_out(self.key.documents)[1]
            self._block = BatchBlock(range(layout.ranks), range(len(layout.lengths)))
        return self._block

    @property
    def documents(self) -> tuple[int, ...]:
        """The document lengths of this rank's batch, in order; empty if the rank has only padding."""
        lengths, numbers = self.planner.lay_out(self.key.documents)[1].lengths, self.block.documents
        return () if self.stands_in else tuple(lengths[numbers.start : numbers.stop])

    @property
    def tokens(self) -> int:
        """The number N of tokens on all ranks together."""
        return self.planner.layout_of(self.key, None).n

    @property
    def own_tokens(self) -> int:
        """The number of this rank's tokens that belong to a document; the rest are padding."""
        layout = self.planner.layout_of(self.key, self.layout)
        return 0 if self.stands_in else len(layout.tokens(self.planner.ranks.rank))

    @torch.compiler.disable
    def check_positions(self, positions: Tensor) -> None:
        """Raise DistattnError for positions (1, T) other than those of this rank's tokens, such as a model's own count."""
        right_positions = self.positions
        if right_positions is None or positions is right_positions or positions is self._checked:
            return
        if positions.shape != right_positions.shape or not torch.equal(
            positions.to(right_positions.device), right_positions
        ):
            raise DistattnError(
                "the model counts positions itself, and would give this rank's tokens those of others: call it with "
                'position_ids=batch["position_ids"].'
            )
        self._checked = positions

    def _without_padding(
        self,
        executable: Executable,
        compute: Callable[..., Any],
        *by_token: Tensor | None,
        fill: int = 0,
        layer: int | None = None,
    ) -> Any:
        """Apply `compute` to tensors of this rank's tokens, with their padding cut off, and pad its result with `fill`.

        compute: returns a tensor with a row per token, or a tuple of that tensor and the states of documents, which are not
        padded. layer: the layer's number in the model, for descriptions of messages.
        """
        set_layer(layer)
        padding, tokens = self._padding(executable, by_token[0]), executable.program.tokens
        if not padding:
            return compute(*by_token)
        result = compute(*(None if x is None else x[:tokens] for x in by_token))
        out, *states = result if isinstance(result, tuple) else (result,)
        out = _padded(out, padding, fill)
        return (out, *states) if states else out

    def _padding(self, executable: Executable, x: Tensor | None) -> int:
        """Return the number of padding rows in a tensor of this rank's tokens; 0 for other tensors."""
        tokens = executable.program.tokens
        padding = padded(tokens, self.planner.config.pad_to) - tokens
        return padding if x is not None and len(x) == tokens + padding else 0

    def _states_in(self, states_M: Tensor | None) -> Tensor | None:
        """Pad states of this batch's documents to all documents on the axis; this rank does not read the added states."""
        if states_M is None:
            return None
        if not isinstance(states_M, Tensor) or not states_M.dim() or len(states_M) != len(self.documents):
            description = (
                f"of shape {tuple(states_M.shape)}" if isinstance(states_M, Tensor) else type(states_M).__name__
            )
            raise DistattnError(
                f"initial_state is {description}; a tensor with one state for each of the batch's {len(self.documents)} "
                "documents is needed."
            )
        every, first = len(self.planner.lay_out(self.key.documents)[1].lengths), self.block.documents.start
        later = every - first - len(states_M)
        return F.pad(states_M, (0, 0) * (states_M.dim() - 1) + (first, later)) if first or later else states_M

    def _states_out(self, output: Any) -> Any:
        """Return an output with its states cut to this batch's documents and summed over the ranks with this batch.

        output: a tensor, returned unchanged, or a tuple of a tensor and this rank's share of the states of all documents.
        """
        if not isinstance(output, tuple):
            return output
        out, share = output
        ranks, first = self.block.ranks, self.block.documents.start
        batch_states = share[first : first + len(self.documents)]
        if len(ranks) == 1:
            return out, batch_states
        rank = self.planner.ranks.rank
        return out, all_reduce_sum(batch_states, ranks, rank, self.planner.ranks.transport(batch_states.device))

    def plan(self, *shape: Any) -> Plan:
        """Return this batch's plan for the fields of an `AttentionShape`; layers of equal shape share a plan."""
        shape_of_call = AttentionShape(*shape)
        return self._plans.get(shape_of_call) or self.planner.plan_of(self.key, shape_of_call)

    def row_moves(self, layout: str, device: torch.device) -> RowMoves:
        """Return the moves of this rank's rows to the layout named `layout`, as tensors on a device. Results are cached."""
        key = layout, device
        if key not in self._row_moves:
            home, there = self.planner.layout_of(self.key, None), self.planner.layout_of(self.key, layout)
            self._row_moves[key] = RowMoves.of(home, there, self.planner.ranks.rank).to(device)
        return self._row_moves[key]

    def executable(self, shape: AttentionShape, device: torch.device) -> Executable:
        """Return this batch's executable for a shape.

        A shape used by an earlier batch has been planned and agreed on ahead of time. A shape new to the run is planned
        now, and all ranks that share attention compare their plans once.
        """
        asked = shape, device
        if asked not in self._executables:
            ahead = self._ahead.pop(asked, None)
            plan, key = self._planned_now(shape, device) if ahead is None else ahead.result()
            ranks = self.planner.ranks
            program = EXECUTABLES.program(plan, key, self.proven)
            self._plans[shape] = plan
            observer = ranks.observer(self, plan, shape)
            if shape.op != ATTENTION:
                if observer is not None and not observer.allows_interleaving and not _stays_at_owners(plan):
                    raise DistattnError(
                        f"servers compute attention only, and layers of {shape.op.name} are planned on ranks without tokens; "
                        "leave servers out."
                    )
                # speeds are measured on attention kernels only
                observer = None
            self._executables[asked] = Executable(program, key, ranks.transport(device), observer)
        return self._executables[asked]

    def plan_ahead(self, shapes: Sequence[tuple[AttentionShape, torch.device]]) -> list[AwaitedResult[Planned]]:
        """Return a future of the plan for each shape. The caller, the planning thread, must set the futures' results."""
        self._ahead = {key: AwaitedResult(threading.get_ident()) for key in shapes}
        return list(self._ahead.values())

    def _planned_now(self, shape: AttentionShape, device: torch.device) -> Planned:
        planner = self.planner
        planner.ranks.begin_shape(self, shape)
        planner.try_kernels(self.key, shape, device)
        planned = planner.ranks.agree(lambda: planner.planned(self.key, shape, device, self.proven))
        planner.register_shape(shape, device)
        return planned


class RelaidBatch(LocalBatch):
    """A version of a batch whose rows are in another layout. The original batch creates and caches its plans."""

    def __init__(self, batch: LocalBatch, layout: str):
        """Create a version of `batch` whose rows are in the layout named `layout`."""
        super().__init__(batch.planner, batch.key, batch.number, batch.proven, batch._block)
        self.stands_in, self.layout, self._batch = batch.stands_in, layout, batch

    @property
    def block(self) -> BatchBlock:
        """The ranks with this batch. Raises DistattnError if the layout may place its tokens on other ranks."""
        block, ranks = super().block, self.planner.lay_out(self.key.documents)[1].ranks
        if len(block.ranks) < ranks:
            raise DistattnError(
                "a span of re-laid layers has no states of documents where ranks have batches of their own; give the layer the "
                "model's batch, outside of the span."
            )
        return block

    def plan(self, *shape: Any) -> Plan:
        """Return the plan for the layout of this batch's rows. See `LocalBatch.plan`."""
        return self._batch.plan(*AttentionShape(*shape)._replace(layout=self.layout))

    def executable(self, shape: AttentionShape, device: torch.device) -> Executable:
        """Return the executable for the layout of this batch's rows. See `LocalBatch.executable`."""
        self._batch.used = self._batch.mixed = True
        return self._batch.executable(shape._replace(layout=self.layout), device)


def _padded(x: Tensor, padding: int, fill: int = 0) -> Tensor:
    """Append rows of `fill` to a tensor."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, padding), value=fill)


def _stays_at_owners(plan: Plan) -> bool:
    """Return True if only ranks that own tokens take part in a plan."""
    owners = np.flatnonzero(plan.call.layout.shard_sizes())
    tables = plan.forward, plan.backward
    ranks = [column for table in tables for column in (table.tasks["rank"], table.moves["src"], table.moves["dst"])]
    return bool(np.isin(np.concatenate(ranks), owners).all())
