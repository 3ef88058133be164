"""The table of strategies: for each name, the function that makes the tables, and how they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from distattn.cluster.spec import AnyCluster
from distattn.ir.arguments import check_fields
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.op import ATTENTION, Op
from distattn.ir.plan import POLICIES, Call, Table
from distattn.parallel.strategies.allgather import allgather
from distattn.parallel.strategies.cad import CadOptions, cad
from distattn.parallel.strategies.cad_greedy import CadGreedyOptions, cad_greedy
from distattn.parallel.strategies.double_ring import DoubleRingOptions, double_ring
from distattn.parallel.strategies.ring import RingOptions, ring
from distattn.parallel.strategies.scan import ScanOptions, scan
from distattn.parallel.strategies.ulysses import ulysses
from distattn.parallel.strategies.usp import UspOptions, usp, usp_backward


@dataclass(frozen=True)
class Strategy:
    """A pure function (call, cluster[, options][, direction]) -> candidate forward tables, and how to use it.

    backward: the default backward policy. options: the frozen dataclass of its options, or None. by_direction: the function
    also takes direction="backward", to assign tasks by their cost in that pass. choose_by: "bytes" chooses the candidate that
    moves the fewest bytes. "seconds" simulates candidates on a ClusterSpec: the first candidate is the one requested, and the
    second moves only what it must. The other candidates are in between, and are generated only if the first is not faster than
    the second. Without a ClusterSpec, the first candidate is chosen. own_backward: candidates for direction="backward" are
    backward tables themselves, not derived from forward tables. The function then also takes working_layout and `seconds`, a
    function that simulates a table of that direction, or None if speeds are unknown. recurrent: True if it can plan
    recurrences. others: True if it can plan all other ops. choose_backward: a function that returns a call's default backward
    policy, for strategies whose default depends on the call.
    """

    forward: Callable[..., Iterable[Table]]
    backward: str
    options: type | None = None
    by_direction: bool = False
    choose_by: str = "bytes"
    own_backward: bool = False
    recurrent: bool = False
    others: bool = True
    choose_backward: Callable[..., str] | None = None

    @property
    def option_names(self) -> list[str]:
        """The names of the options, in the order of their dataclass."""
        return [] if self.options is None else [field.name for field in fields(self.options)]

    def takes(self, option: str) -> bool:
        """Return whether the strategy has an option named `option`."""
        return option in self.option_names

    def default_backward(self, call: Call, cluster: AnyCluster | None, options: Mapping[str, object]) -> str:
        """Return the backward policy of a call for which the user has set no policy."""
        if self.choose_backward is None or self.options is None:
            return self.backward
        return self.choose_backward(call, cluster, self.options(**options))

    def candidates(
        self,
        call: Call,
        cluster: AnyCluster | None,
        options: Mapping[str, object],
        direction: str,
        working_layout: Layout | None,
        seconds: Callable[[Table], float] | None,
    ) -> Iterable[Table]:
        """Return the candidate tables for a call. Raise DistattnError if the strategy cannot plan it.

        working_layout, seconds: used only by strategies with `own_backward`.
        """
        arguments: dict[str, object] = {}
        if self.options is not None:
            arguments["options"] = strategy_options = self.options(**options)
            check_fields(strategy_options)
        if self.by_direction:
            arguments["direction"] = direction
        if self.own_backward:
            arguments |= {"working_layout": working_layout, "seconds": seconds}
        return self.forward(call, cluster, **arguments)


_ALL_STRATEGIES: Mapping[str, Strategy] = {
    "scan": Strategy(scan, "keep", ScanOptions, by_direction=True, own_backward=True, recurrent=True, others=False),
    "ring": Strategy(ring, "refetch-follow", RingOptions),
    "double_ring": Strategy(double_ring, "refetch-follow", DoubleRingOptions),
    "allgather": Strategy(allgather, "refetch-home"),
    "ulysses": Strategy(ulysses, "keep", recurrent=True),
    "usp": Strategy(usp, "refetch-follow", UspOptions, choose_backward=usp_backward),
    "cad": Strategy(cad, "refetch-home", CadOptions, by_direction=True, choose_by="seconds"),
    "cad_greedy": Strategy(cad_greedy, "refetch-home", CadGreedyOptions),
}


def strategies_of(op: Op) -> Mapping[str, Strategy]:
    """Return the strategies that can plan an op, keyed by name."""
    return {
        name: strategy
        for name, strategy in _ALL_STRATEGIES.items()
        if (strategy.recurrent if op.is_recurrent else strategy.others)
    }


STRATEGIES: Mapping[str, Strategy] = strategies_of(ATTENTION)


def check_names(strategy: str, backward: str | None, options: Mapping[str, object] | None, op: Op = ATTENTION) -> None:
    """Raise DistattnError, listing the supported names, if the op does not support a strategy, backward policy or option."""
    strategies = strategies_of(op)
    if strategy not in strategies:
        of_op = "" if op == ATTENTION else f" for {op.name}"
        raise DistattnError(f"strategy {strategy!r} does not exist{of_op}; there are {', '.join(strategies)}.")
    if backward not in (None, "keep") and strategies[strategy].own_backward:
        raise DistattnError(
            f'strategy {strategy} keeps what it received; its backward must be "keep", not {backward!r}.'
        )
    if backward is not None and backward not in POLICIES:
        raise DistattnError(f"backward policy {backward!r} does not exist; there are {', '.join(POLICIES)}.")
    option_names = strategies[strategy].option_names
    for name in (options or {}).keys() - option_names:
        takes = f"it takes {', '.join(option_names)}" if option_names else "it takes none"
        raise DistattnError(f"strategy {strategy} has no option {name!r}; {takes}.")
