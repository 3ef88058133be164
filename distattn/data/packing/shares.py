"""How the packs of a step are dealt out to data-parallel shares: a computation with the same result on every rank."""

from __future__ import annotations

from distattn.data.packing.pack_plan import PackPlan, StepPacks
from distattn.ir.errors import DistattnError


def deal_packs(record: StepPacks, size: int) -> list[list[int]]:
    """Return the numbers of the packs of each share, in the plan's order.

    Each pack, the largest first, goes to the share with the fewest slots so far (`StepPacks.slots`), and to the first of several
    such shares. So packs of one slot are dealt out in turn, and a pack in the place of several counts as several. Every share
    gets a pack if there are at least as many packs as shares.
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
    """Raise DistattnError if a step from `begin` to before `end` has fewer packs than shares.

    even: or if shares get unequal numbers.

    Checks the last step, which may have fewer packs than others, and full steps of each context length. If a document that is
    kept whole takes the place of several packs, a step with too few packs may be found only when it is dealt out.
    """
    if begin == end:
        return
    for step in [begin, *(first for first, _ in plan.rule.context if begin < first < end)]:
        packs = plan.rule.packs_at(step)
        check_counts(plan, size, step, packs, even and packs % size != 0)
    last = plan.step(end - 1)
    check_counts(plan, size, end - 1, len(last.packs), even and len(last.packs) % size != 0)


def check_pairs(plan: PackPlan, size: int, begin: int, end: int) -> None:
    """Raise DistattnError if the packs of a step from `begin` to before `end` are not pairs of packs for each share.

    Checks the same steps as `check_shares`. A document that is kept whole may take the place of several packs, which leaves a
    share with an odd number.
    """
    steps = [begin, *(first for first, _ in plan.rule.context if begin < first < end)]
    counts = {step: plan.rule.packs_at(step) for step in steps} | {end - 1: len(plan.step(end - 1).packs)}
    for step, packs in counts.items():
        if packs % (2 * size):
            raise DistattnError(
                f"parallel.overlap: pairs of micro-batches take turns, and step {step:,} of {plan.path} has {packs:,} packs for "
                f"{size:,} shares; plan a multiple of {2 * size:,} packs a step, or leave parallel.overlap out."
            )


def check_counts(plan: PackPlan, size: int, step: int, packs: int, uneven: bool) -> None:
    """Raise DistattnError if a step has fewer packs than shares, or, if `uneven`, because shares would get unequal numbers."""
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
