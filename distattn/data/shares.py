"""How the packs of a step are dealt out to data-parallel shares: arithmetic that every rank does alike."""

from __future__ import annotations

from distattn.data.pack_plan import PackPlan, StepPacks
from distattn.ir.errors import DistattnError


def deal_packs(record: StepPacks, size: int) -> list[list[int]]:
    """Numbers of the packs of each share, in the plan's order.

    Each pack, the largest first, goes to the share with the fewest slots so far (`StepPacks.slots`), the first of equals.
    So packs of one slot are dealt out in turn, a pack in the place of several counts as so many, and no share is without a pack
    unless there are fewer packs than shares.
    """
    slots = record.slots
    taken = [0] * size
    shares: list[list[int]] = [[] for _ in range(size)]
    for pack in sorted(range(len(slots)), key=lambda pack: -slots[pack]):
        share = taken.index(min(taken))
        taken[share] += slots[pack]
        shares[share].append(pack)
    return [sorted(share) for share in shares]


def check_shares(plan: PackPlan, size: int, begin: int, end: int, even: bool = False) -> None:
    """Raise DistattnError where a step from `begin` to before `end` has fewer packs than shares; even: or not equally many each.

    Looks at the last step, which may have fewer packs than others, and at full steps of each context length. Where a document
    that is kept whole takes the place of several packs, a step may turn out to have too few only when it is dealt out.
    """
    if begin == end:
        return
    for step in [begin, *(first for first, _ in plan.rule.context if begin < first < end)]:
        packs = plan.rule.packs_at(step)
        check_counts(plan, size, step, packs, even and packs % size != 0)
    last = plan.step(end - 1)
    check_counts(plan, size, end - 1, len(last.packs), even and len(last.packs) % size != 0)


def check_counts(plan: PackPlan, size: int, step: int, packs: int, uneven: bool) -> None:
    """Raise DistattnError where a step has fewer packs than shares, or, if `uneven`, since they are not equally many for each."""
    if step == plan.full_steps:
        without = f"leave out step {step:,}, the plan's last and not a full one (drop_last=True)"
    else:
        without = f"end before step {step:,} (steps)"
    if packs < size:
        raise DistattnError(
            f"{plan.path}: step {step:,} has {packs:,} packs, too few for {size:,} shares; {without}, use at most {packs:,} "
            "shares with more ranks each, or plan more tokens_per_step."
        )
    if uneven:
        raise DistattnError(
            f"{plan.path}: {packs:,} packs of step {step:,} cannot be dealt out evenly to {size:,} shares; {without}, use "
            "another number of shares, or leave out even."
        )
