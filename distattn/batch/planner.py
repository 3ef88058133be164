"""Plans of batches: what a trainer's batch needs so that its attention layers find their plan, made ahead on a thread."""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distattn.batch.layer_overrides import Way, Ways, narrowed
from distattn.batch.packed_batch import padded
from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Plan
from distattn.kernels.registry import choose_kernel, load_kernel
from distattn.ops.attention import attention
from distattn.ops.executable import Prepared, Use, Watch, demand_of, lower_once, prepare
from distattn.parallel.make_plan import check_names, make_plan


class Shape(NamedTuple):
    """What one attention layer asks for, beside the batch.

    window: of so many tokens each sees the last, itself among them; way: where it is computed otherwise than other layers.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    window: int | None = None
    way: Way | None = None

    @staticmethod
    def of(q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, window: int | None = None, way: Way | None = None) -> Shape:
        heads, kv_heads, dtype = q_THD.shape[1], k_TKD.shape[1], str(q_THD.dtype)[6:]
        return Shape(heads, kv_heads, q_THD.shape[2], v_TKE.shape[2], dtype, window, way)


class Axis(NamedTuple):
    """A batch to its planner: documents, in whatever form the planner's `axis` takes, and options for this batch alone."""

    documents: Hashable
    options: tuple[tuple[str, Any], ...] = ()


class Planner:
    """Makes, proves and caches plans of batches over one group.

    axis: documents of a batch to its mask and layout; inner: what a document of it attends to in itself. ways: of layers, by
    their number or kind (see `ways`), that are computed otherwise than the others. verify_every: of so many batches one is proven
    before it runs, the first in any case; 1 proves all. pad_to: a rank's tokens are padded to a multiple of it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        axis: Callable[[Any], tuple[Mask, Layout]],
        *,
        strategy: str,
        inner: str | tuple[int, int] = "causal",
        ways: Ways | None = None,
        kernel: str | None = None,
        backward: str | None = None,
        wire: str | None = None,
        cluster: AnyCluster | None = None,
        options: Mapping[str, object] | None = None,
        capacity: int | None = None,
        verify_every: int = 1,
        pad_to: int = 1,
    ):
        check_names(strategy, backward, options)
        if kernel is not None:
            load_kernel(kernel)
        if verify_every < 1:
            raise DistattnError(f"verify_every is at least 1, not {verify_every}.")
        if pad_to < 1:
            raise DistattnError(f"pad_to is at least 1, not {pad_to}.")
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group, self.kernel, self.capacity, self.verify_every = group, kernel, capacity, verify_every
        self.ways, self.pad_to = ways or Ways(), pad_to
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)

        def plan(batch: Axis, shape: Shape) -> Plan:
            mask, layout = self.axis(batch.documents)
            if shape.window is not None:
                mask = Mask.documents(layout.lengths, narrowed(inner, shape.window))
            how: dict[str, Any] = dict(strategy=strategy, backward=backward)
            how["options"] = {**(options or {}), **dict(batch.options)}
            if shape.way is not None:
                how |= shape.way.settings(mask, layout)
            of_layer = shape._asdict()
            del of_layer["window"], of_layer["way"]
            return make_plan(mask, layout, comm_dtype=wire, cluster=cluster, **how, **of_layer)

        # fixed-length batches meet the same axis again and again; packed ones never do
        self.axis = lru_cache(maxsize=8)(axis)
        self.plan = lru_cache(maxsize=8)(plan)
        self._needs: dict[tuple[Shape, torch.device], None] = {}
        self._lock = threading.Lock()
        self.worker = ThreadPoolExecutor(1, "distattn-plans")
        self._batches = 0

    def batch(self, axis: Axis) -> ShardedBatch:
        """The next batch."""
        self._batches += 1
        return ShardedBatch(self, axis, self._batches - 1, (self._batches - 1) % self.verify_every == 0)

    def known_needs(self) -> tuple[tuple[Shape, torch.device], ...]:
        """What layers have asked for so far: the next batch's programs are made ahead. From any thread."""
        with self._lock:
            return tuple(self._needs)

    def need(self, shape: Shape, device: torch.device) -> None:
        """Layers ask for this."""
        with self._lock:
            self._needs[shape, device] = None

    def watch(self, batch: ShardedBatch, plan: Plan, shape: Shape) -> Watch | None:
        """Who is told of the batch's passes; nobody."""
        return None


class ShardedBatch:
    """The axis one batch was laid out on: what attention layers need of it. Travels with the batch, not with the model.

    Plans and programs for the shapes that earlier batches asked for are made on a thread, from the moment it exists.
    positions: of this rank's tokens (1, T), where models are to be held to them.
    """

    positions: Tensor | None = None

    def __init__(self, parent: Planner, axis: Axis, number: int, proven: bool):
        self.parent, self.axis, self.number, self.proven = parent, axis, number, proven
        self._prepared: dict[tuple[Shape, torch.device], Prepared] = {}
        self._checked: Tensor | None = None
        # whether any layer has asked for attention
        self.asked = False
        self._plans = {need: parent.worker.submit(self._lowered, *need) for need in parent.known_needs()}

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
        """`distattn.attention` of this rank's tokens (T, heads, dim), with the plan for these shapes.

        window: each token sees the last so many of its document, itself among them. layer: the layer's number in the model.
        """
        self.asked = True
        way = self.parent.ways.of(layer, window)
        ready = self.ready(Shape.of(q_THD, k_TKD, v_TKE, window, way), q_THD.device)
        tokens = ready.lowered.program.tokens
        padding = padded(tokens, self.parent.pad_to) - tokens
        if not padding or len(q_THD) != tokens + padding:
            return attention(q_THD, k_TKD, v_TKE, ready, scale=scale, **modifiers)
        # padding attends to nothing, but others may need the help of a rank that has nothing else
        o_THE = attention(q_THD[:tokens], k_TKD[:tokens], v_TKE[:tokens], ready, scale=scale, **modifiers)
        return F.pad(o_THE, (0, 0, 0, 0, 0, padding))

    @property
    def tokens(self) -> int:
        """N, of all ranks."""
        return self.parent.axis(self.axis.documents)[1].n

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

    def plan(self, *shape: Any) -> Plan:
        """The plan of this batch for one shape of call, given as the fields of `Shape`; layers of the same shape share it."""
        return self.parent.plan(self.axis, Shape(*shape))

    def ready(self, shape: Shape, device: torch.device) -> Prepared:
        """The program of this batch for one shape of call. The first time, all ranks of the group have to ask for it."""
        need, parent = (shape, device), self.parent
        if need not in self._prepared:
            parent.need(shape, device)
            plan = self._plans[need].result() if need in self._plans else self.plan(*shape)
            how: dict[str, Any] = dict(kernel=parent.kernel, device=device, capacity=parent.capacity)
            watch = parent.watch(self, plan, shape)
            if watch is not None:
                watch.prepares()
            how |= dict(proven=self.proven, watch=watch)
            self._prepared[need] = prepare(plan, parent.group, **how)
        return self._prepared[need]

    def _lowered(self, shape: Shape, device: torch.device) -> Plan:
        """On the thread: plan, proof and program, so that nothing is left but to agree with the other ranks."""
        plan = self.plan(*shape)
        kernel = choose_kernel(self.parent.kernel, demand_of(plan.call, device))
        lower_once(plan, Use(self.parent.rank, kernel, device), self.proven)
        return plan
