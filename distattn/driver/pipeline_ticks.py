"""The order in which pipeline stages that pool their attention go forward and backward together.

In 1F1B, stages are in different phases at the same time, but attention can only be pooled among ranks in the same phase. So time
is divided into ticks, forward or backward on all stages, as in Zhuang et al. 2025 (arXiv 2510.18121, section 4.1). A stage
without a micro-batch in a tick (a bubble) only serves. There are as many ticks as 1F1B has slots; the first stages hold up to
2 * stages - 1 micro-batches, not `stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tick(NamedTuple):
    """The direction of a tick, and the micro-batch of each stage; None if the stage only serves."""

    direction: str
    micro_batches: tuple[int | None, ...]


def ticks(stages: int, micro_batches: int) -> list[Tick]:
    """Return all ticks of a step in order: a backward tick follows as soon as the last stage has a micro-batch for it."""
    if not micro_batches:
        return []
    count = micro_batches + stages - 1

    def tick(direction: str, number: int) -> Tick:
        order = range(stages) if direction == "forward" else reversed(range(stages))
        numbers = [number - delay if 0 <= number - delay < micro_batches else None for delay in order]
        return Tick(direction, tuple(numbers))

    all_ticks = [tick("forward", number) for number in range(stages - 1)]
    for number in range(count):
        if number + stages - 1 < count:
            all_ticks.append(tick("forward", number + stages - 1))
        all_ticks.append(tick("backward", number))
    return all_ticks


def one_forward_one_backward(stages: int, forward: Sequence[float], backward: Sequence[float]) -> float:
    """Return the seconds of 1F1B without pooling. forward, backward: seconds of each micro-batch on every stage.

    Messages take no time. Narayanan et al. 2021 (arXiv 2104.04473): stage s runs min(stages - s, all) forwards first, then one
    backward after each forward.
    """
    count = len(forward)
    forward_ends = [[0.0] * count for _ in range(stages)]
    backward_ends = [[0.0] * count for _ in range(stages)]
    orders = []
    for stage in range(stages):
        first = min(stages - stage, count)
        order = [("forward", n) for n in range(first)]
        for n in range(count):
            order.append(("backward", n))
            if first + n < count:
                order.append(("forward", first + n))
        orders.append(order)
    position, free = [0] * stages, [0.0] * stages
    done: set[tuple[str, int, int]] = set()
    while any(position[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            while position[stage] < len(orders[stage]):
                direction, n = orders[stage][position[stage]]
                before = (direction, stage - 1 if direction == "forward" else stage + 1, n)
                outer = before[1] < 0 or before[1] >= stages
                if not outer and before not in done:
                    break
                ends = forward_ends if direction == "forward" else backward_ends
                ready = 0.0 if outer else ends[before[1]][n]
                free[stage] = max(free[stage], ready) + (forward if direction == "forward" else backward)[n]
                ends[stage][n] = free[stage]
                done.add((direction, stage, n))
                position[stage] += 1
    return max(free)
