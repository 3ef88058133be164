"""Pipeline stages that pool their attention: the order in which all of them go forward and backward together.

1F1B lets stages be in different phases at one time; attention can only be pooled among ranks that do the same. So time is cut
into ticks, forward or backward, alike on all stages, as in Zhuang et al. 2025 (arXiv 2510.18121, section 4.1): a stage that has
no micro-batch in a tick (a bubble) only serves. There are as many ticks as 1F1B has slots; the first stages hold up to
2 * stages - 1 micro-batches, not `stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tick(NamedTuple):
    """Forward or backward, and the micro-batch of each stage; None where it only serves."""

    direction: str
    micro_batches: tuple[int | None, ...]


def ticks(stages: int, micro_batches: int) -> list[Tick]:
    """All ticks of a step, in order: a backward tick follows as soon as the last stage has something to take back."""
    if not micro_batches:
        return []
    count = micro_batches + stages - 1

    def tick(direction: str, number: int) -> Tick:
        order = range(stages) if direction == "forward" else reversed(range(stages))
        found = [number - delay if 0 <= number - delay < micro_batches else None for delay in order]
        return Tick(direction, tuple(found))

    out = [tick("forward", number) for number in range(stages - 1)]
    for number in range(count):
        if number + stages - 1 < count:
            out.append(tick("forward", number + stages - 1))
        out.append(tick("backward", number))
    return out


def one_forward_one_backward(stages: int, forward: Sequence[float], backward: Sequence[float]) -> float:
    """Seconds that 1F1B takes without pooling, of micro-batches with these times on every stage; messages take none.

    Narayanan et al. 2021 (arXiv 2104.04473): stage s does min(stages - s, all) forwards first, then one backward after each
    forward.
    """
    count = len(forward)
    there = [[0.0] * count for _ in range(stages)]
    back = [[0.0] * count for _ in range(stages)]
    orders = []
    for stage in range(stages):
        first = min(stages - stage, count)
        order = [("forward", n) for n in range(first)]
        for n in range(count):
            order.append(("backward", n))
            if first + n < count:
                order.append(("forward", first + n))
        orders.append(order)
    at, free = [0] * stages, [0.0] * stages
    done: set[tuple[str, int, int]] = set()
    while any(at[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            while at[stage] < len(orders[stage]):
                direction, n = orders[stage][at[stage]]
                before = (direction, stage - 1 if direction == "forward" else stage + 1, n)
                outer = before[1] < 0 or before[1] >= stages
                if not outer and before not in done:
                    break
                times = there if direction == "forward" else back
                ready = 0.0 if outer else times[before[1]][n]
                free[stage] = max(free[stage], ready) + (forward if direction == "forward" else backward)[n]
                times[stage][n] = free[stage]
                done.add((direction, stage, n))
                at[stage] += 1
    return max(free)
