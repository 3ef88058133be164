"""From a name to a plan: the table of strategies, and the one function that uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from distattn.errors import DistattnError
from distattn.layout import Layout
from distattn.mask import Mask
from distattn.parallel.allgather import allgather
from distattn.parallel.backward import derive
from distattn.parallel.ring import ring
from distattn.parallel.ulysses import ulysses
from distattn.plan import POLICIES, Call, Plan, Table


class Strategy(NamedTuple):
    """A pure function from a call to its forward table, and the backward policy that suits it."""

    forward: Callable[[Call], Table]
    backward: str


STRATEGIES: Mapping[str, Strategy] = {
    "ring": Strategy(ring, "refetch-follow"),
    "allgather": Strategy(allgather, "refetch-home"),
    "ulysses": Strategy(ulysses, "keep"),
}


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
    cluster: None = None,
    options: Mapping[str, object] | None = None,
) -> Plan:
    """Plan one attention call: a pure host function, the same on every rank, no torch.

    heads and kv_heads are query and key/value heads on one tensor-parallel rank; dtype is that of q, k and v
    ("float16", "bfloat16", "float32", "float64"). backward is one of POLICIES, by default the strategy's own.
    Raises DistattnError when the call cannot be planned as asked.
    """
    if strategy not in STRATEGIES:
        raise DistattnError(f"strategy {strategy!r} does not exist; there are {', '.join(STRATEGIES)}.")
    if cluster is not None:
        raise DistattnError("no strategy uses a cluster description yet; leave cluster out.")
    if options:
        raise DistattnError(f"strategy {strategy} has no option {next(iter(options))!r}; it takes none.")
    if backward is not None and backward not in POLICIES:
        raise DistattnError(f"backward policy {backward!r} does not exist; there are {', '.join(POLICIES)}.")
    call = Call(mask, layout, heads, kv_heads, head_dim, head_dim if v_head_dim is None else v_head_dim, dtype)
    chosen = STRATEGIES[strategy]
    forward = chosen.forward(call)
    policy = backward or chosen.backward
    return Plan(call, forward, derive(call, forward, policy), policy, strategy)
