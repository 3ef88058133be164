"""Report devices and links that are much slower than the median."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from distattn.preflight.comparison import named_places
from distattn.preflight.device_state import Clock
from distattn.preflight.facts import RankFacts
from distattn.preflight.probes import Link, RankSpeed

# a device or link more than this many times slower than the median is reported; ranks that share CPU cores may lose a time slice
# or two to each other, while GPUs of the same model differ by only a few percent
SLOW_FACTOR = {"cpu": 30.0, "cuda": 1.25}
# advice for slow links
_INSIDE_REMEDY = {
    "cpu": "see what else runs there",
    "cuda": "nvidia-smi topo -m and nvidia-smi nvlink -s show how it is connected",
}
_ACROSS_REMEDY = "look at the network adapter, its cable and its switch"
# the maximum number of slow links to report one by one
_MOST_LINKS = 8
# the two ranks of a link, lower rank first
Pair = tuple[int, int]


def outliers_of(
    facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None], device_type: str
) -> list[str]:
    """Return sentences about slow devices, about ranks whose links are all slow, and about slow links between other ranks.

    facts, speeds, clocks: indexed by rank.
    """
    factor = SLOW_FACTOR[device_type]
    sentences = list(_slow_devices(facts, speeds, clocks, factor))
    inside, across = pair_speeds(speed.inside for speed in speeds), pair_speeds(speed.across for speed in speeds)
    sentences += _slow_links(facts, inside, factor, "inside the host", _INSIDE_REMEDY[device_type])
    sentences += _slow_links(facts, across, factor, "to other hosts", _ACROSS_REMEDY)
    return sentences


def pair_speeds(links: Iterable[Sequence[Link]]) -> dict[Pair, float]:
    """Return the speed between each pair of ranks in its slower direction, in 10^9 bytes per second. links: indexed by rank."""
    slower: dict[Pair, float] = {}
    for rank, measured in enumerate(links):
        for link in measured:
            pair = (min(rank, link.peer), max(rank, link.peer))
            slower[pair] = min(link.gbs, slower.get(pair, link.gbs))
    return slower


def slow_ranks(links: Mapping[Pair, float], factor: float) -> dict[int, float]:
    """Return ranks whose best link is more than `factor` times slower than the median of all best links, with that link's speed.

    Ranks with a single link are left out, because only the link can be judged, not the rank.
    """
    measured: dict[int, list[float]] = {}
    for pair, gbs in links.items():
        for rank in pair:
            measured.setdefault(rank, []).append(gbs)
    best = {rank: max(speeds) for rank, speeds in sorted(measured.items()) if len(speeds) > 1}
    usual = statistics.median(best.values()) if best else 0.0
    return {rank: gbs for rank, gbs in best.items() if gbs * factor < usual}


def slow_pairs(links: Mapping[Pair, float], factor: float) -> dict[Pair, float]:
    """Return the links that are more than `factor` times slower than the median, with their speeds."""
    if not links:
        return {}
    usual = statistics.median(links.values())
    return {pair: gbs for pair, gbs in sorted(links.items()) if gbs * factor < usual}


def _slow_devices(
    facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None], factor: float
) -> Iterator[str]:
    usual = statistics.median(speed.tflops for speed in speeds)
    for rank, speed, clock in zip(facts, speeds, clocks, strict=True):
        if speed.tflops * factor < usual:
            at = f", its clock is {clock.now:,} of {clock.most:,} MHz" if clock is not None else ""
            remedy = (
                "nvidia-smi -q -d PERFORMANCE,TEMPERATURE says why" if clock is not None else "see what else runs there"
            )
            fast = f"{speed.tflops:.3g} TFLOP/s, the median of all ranks is {usual:.3g}"
            yield f"{named_places([rank])}: matrix products at {fast}{at}; {remedy}."


def _slow_links(
    facts: Sequence[RankFacts], links: Mapping[Pair, float], factor: float, where: str, remedy: str
) -> Iterator[str]:
    ranks = slow_ranks(links, factor)
    rest = {pair: gbs for pair, gbs in links.items() if not ranks.keys() & set(pair)}
    usual = statistics.median(rest.values()) if rest else 0.0
    for rank, gbs in ranks.items():
        fast = f"the best has {gbs:.3g} GB/s, the median of other ranks' links is {usual:.3g}"
        yield f"{named_places([facts[rank]])}: all its links {where} are slow, {fast}; {remedy}."
    slow = slow_pairs(rest, factor)
    for (a, b), gbs in list(slow.items())[:_MOST_LINKS]:
        yield (
            f"the link between {named_places([facts[a]])} and {named_places([facts[b]])} has {gbs:.3g} GB/s, the median "
            f"{where} is {usual:.3g}; {remedy}."
        )
    if len(slow) > _MOST_LINKS:
        yield f"{len(slow) - _MOST_LINKS} more links {where} are as slow; preflight.json lists all of them."
