"""How the packs of a step are dealt out to data-parallel shares: arithmetic that every rank does alike."""

from __future__ import annotations

from distattn.data.pack_plan import StepPacks


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
