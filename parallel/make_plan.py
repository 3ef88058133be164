"""From a name to a plan: the table of strategies, and the one function that uses it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import sorted_unique
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import POLICIES, Call, Plan, Table, move_bytes
from distattn.parallel.strategies.allgather import allgather
from distattn.parallel.strategies.cad import cad
from distattn.parallel.strategies.cad_greedy import cad_greedy
from distattn.parallel.strategies.double_ring import double_ring
from distattn.parallel.strategies.ring import ring
from distattn.parallel.strategies.ulysses import ulysses
from distattn.parallel.strategies.usp import usp
from distattn.parallel.tables.backward import derive_backward
from distattn.parallel.tables.relayout import relayout_table


class Strategy(NamedTuple):
    """A pure function (call, cluster, **options) -> candidate forward tables, and the backward policy that suits it."""

    forward: Callable[..., Sequence[Table]]
    backward: str
    # takes direction="backward" as well: tasks of the backward pass are assigned by what they cost there
    by_direction: bool = False


STRATEGIES: Mapping[str, Strategy] = {
    "ring": Strategy(ring, "refetch-follow"),
    "double_ring": Strategy(double_ring, "refetch-follow"),
    "allgather": Strategy(allgather, "refetch-home"),
    "ulysses": Strategy(ulysses, "keep"),
    "usp": Strategy(usp, "refetch-follow"),
    "cad": Strategy(cad, "refetch-home", by_direction=True),
    "cad_greedy": Strategy(cad_greedy, "refetch-home"),
}


# parameters of a strategy that are not options
_OURS = ("call", "cluster", "direction")


def make_plan(
    mask: Mask,
    layout: Layout,
    *,
    strategy: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: str,
    backward: str | None = None,
    comm_dtype: str | None = None,
    cluster: AnyCluster | None = None,
    options: Mapping[str, object] | None = None,
    working_layout: Layout | None = None,
) -> Plan:
    """Plan one attention call: a pure host function, the same on every rank, no torch.

    heads and kv_heads are query and key/value heads on one tensor-parallel rank; dtype is that of q, k and v
    ("float16", "bfloat16", "float32", "float64"). backward is one of POLICIES, by default the strategy's own. cluster
    says which ranks share a node, or, where it is a description, also how fast kernels are; options are the strategy's
    own keyword arguments. Of a strategy's candidates the one that moves fewest bytes is taken, forward and backward each
    (together where the backward keeps what it received). comm_dtype: the dtype outputs and gradients travel in, q's own or (by
    default) that of accumulation; where no two partial results meet, q's own loses nothing.
    working_layout: where the strategy shall have the tokens, if not where q, k, v and o are: it re-lays them inside the call.
    Raises DistattnError when the call cannot be planned as asked.
    """
    check_names(strategy, backward, options)
    if not isinstance(cluster, AnyCluster | None):
        raise DistattnError(f"cluster is a Cluster(nodes, devices) or a description of one, not {cluster!r}.")
    if cluster is not None and cluster.ranks != layout.ranks:
        raise DistattnError(f"the cluster has {cluster.nodes} x {cluster.devices} ranks, the layout {layout.ranks}.")
    call = Call(
        mask, layout, heads, kv_heads, head_dim, head_dim if v_head_dim is None else v_head_dim, dtype, comm_dtype or ""
    )
    chosen = STRATEGIES[strategy]
    policy = backward or chosen.backward
    working = call if working_layout is None else replace(call, layout=working_layout)
    if working.ranks != call.ranks:
        raise DistattnError(f"the working layout has {working.ranks} ranks, the layout {call.ranks}.")

    def tables(**direction: str) -> list[Table]:
        found = list(chosen.forward(working, cluster, **direction, **(options or {})))
        if working_layout is not None:
            found = [relayout_table(call, working, table) for table in found]
        return [_without_idle_steps(table) for table in found]

    candidates = tables()
    anew = chosen.by_direction and policy != "keep"
    backwards = [
        derive_backward(call, t, policy, cluster) for t in (tables(direction="backward") if anew else candidates)
    ]
    there, back = (np.array([_bytes(call, table) for table in tables]) for tables in (candidates, backwards))
    best = (int(there.argmin()), int(back.argmin())) if policy != "keep" else (int((there + back).argmin()),) * 2
    return Plan(call, candidates[best[0]], backwards[best[1]], policy, strategy)


def check_names(strategy: str, backward: str | None, options: Mapping[str, object] | None) -> None:
    """Refuse a strategy, backward policy or option that does not exist, naming those that do."""
    if strategy not in STRATEGIES:
        raise DistattnError(f"strategy {strategy!r} does not exist; there are {', '.join(STRATEGIES)}.")
    if backward is not None and backward not in POLICIES:
        raise DistattnError(f"backward policy {backward!r} does not exist; there are {', '.join(POLICIES)}.")
    known = [name for name in inspect.signature(STRATEGIES[strategy].forward).parameters if name not in _OURS]
    for name in (options or {}).keys() - known:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise DistattnError(f"strategy {strategy} has no option {name!r}; {takes}.")


def _without_idle_steps(table: Table) -> Table:
    """The same table, numbered without the steps in which nobody does anything."""
    busy = sorted_unique(np.concatenate([table.tasks["step"], table.moves["step"]]))
    rows = [{**part, "step": np.searchsorted(busy, part["step"])} for part in (table.tasks, table.moves)]
    return Table(*rows)


def _bytes(call: Call, table: Table) -> int:
    return int(move_bytes(call, table.moves).sum())
