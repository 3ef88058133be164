"""Split the packs of a step over data-parallel shares. Every rank computes the same result."""

from __future__ import annotations

from distattn.data.packing.pack_plan import PackPlan, StepPacks
from distattn.ir.errors import DistattnError


def deal_packs(record: StepPacks, size: int) -> list[list[int]]:
    """Return the indices of each share's packs, in the plan's order.

    Packs are assigned largest first. Each goes to the share with the fewest slots so far (`StepPacks.slots`), and to the first of
    these shares in a tie. So packs of one slot are dealt out round-robin, and a pack that replaces several packs counts as
    several. Every share gets a pack if there are at least as many packs as shares.
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
    """Raise DistattnError if a step in [begin, end) has fewer packs than shares.

    even: also raise it if the shares would get unequal numbers of packs.

    Only the last step, which may have fewer packs than others, and one full step of each context length are checked. If a
    document kept whole replaces several packs, a step with too few packs may be noticed only when it is split.
    """
    if begin == end:
        return
    for step in [begin, *(first for first, _ in plan.rule.context if begin < first < end)]:
        packs = plan.rule.packs_at(step)
        check_counts(plan, size, step, packs, even and packs % size != 0)
    last = plan.step(end - 1)
    check_counts(plan, size, end - 1, len(last.packs), even and len(last.packs) % size != 0)


def check_pairs(plan: PackPlan, size: int, begin: int, end: int) -> None:
    """Raise DistattnError if a step in [begin, end) does not give each share an even number of packs.

    Checks the same steps as `check_shares`. In other steps, a document kept whole may replace several packs and leave a share
    with an odd number.
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
    """Raise DistattnError if a step has fewer packs than shares, or if `uneven` says that shares would get unequal numbers."""
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
