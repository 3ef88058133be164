"""Devices and links that are much slower than the median, in sentences that name them beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from distattn.preflight.comparison import named_places
from distattn.preflight.device_state import Clock
from distattn.preflight.facts import RankFacts
from distattn.preflight.probes import Link, RankSpeed

# what is so many times slower than the median is named: ranks that share a processor's cores are in each other's way for a time
# slice or two, while GPUs of one kind are within a few per cent of each other
SLOW_FACTOR = {"cpu": 30.0, "cuda": 1.25}
# what to look at where a link is slow
_INSIDE_REMEDY = {
    "cpu": "see what else runs there",
    "cuda": "nvidia-smi topo -m and nvidia-smi nvlink -s say how it is connected",
}
_ACROSS_REMEDY = "look at the network adapter, its cable and its switch"
# slow links that are named one by one
_MOST_LINKS = 8
# of a link, by who measured it: (rank, peer)
Pair = tuple[int, int]


def outliers_of(
    facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None], device_type: str
) -> list[str]:
    """Slow devices, ranks all of whose links are slow, and slow links between others. All by rank."""
    factor = SLOW_FACTOR[device_type]
    found = list(_slow_devices(facts, speeds, clocks, factor))
    inside, across = (pair_speeds(links) for links in ([one.inside for one in speeds], [one.across for one in speeds]))
    found += _slow_links(facts, inside, factor, "inside the host", _INSIDE_REMEDY[device_type])
    found += _slow_links(facts, across, factor, "to other hosts", _ACROSS_REMEDY)
    return found


def pair_speeds(links: Iterable[Sequence[Link]]) -> dict[Pair, float]:
    """10^9 bytes a second of each pair of ranks, the lower number first: what the slower direction has."""
    found: dict[Pair, float] = {}
    for rank, measured in enumerate(links):
        for link in measured:
            pair = (min(rank, link.peer), max(rank, link.peer))
            found[pair] = min(link.gbs, found.get(pair, link.gbs))
    return found


def slow_ranks(links: Mapping[Pair, float], factor: float) -> dict[int, float]:
    """Ranks whose best link is slower than the median of all ranks' best ones by a factor, and that link.

    Of a rank with a single link nothing can be said but of the link.
    """
    measured: dict[int, list[float]] = {}
    for pair, gbs in links.items():
        for rank in pair:
            measured.setdefault(rank, []).append(gbs)
    best = {rank: max(found) for rank, found in sorted(measured.items()) if len(found) > 1}
    usual = statistics.median(best.values()) if best else 0.0
    return {rank: gbs for rank, gbs in best.items() if gbs * factor < usual}


def slow_pairs(links: Mapping[Pair, float], factor: float) -> dict[Pair, float]:
    """Links that are slower than the median by a factor."""
    if not links:
        return {}
    usual = statistics.median(links.values())
    return {pair: gbs for pair, gbs in sorted(links.items()) if gbs * factor < usual}


def _slow_devices(
    facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None], factor: float
) -> Iterator[str]:
    usual = statistics.median(one.tflops for one in speeds)
    for one, speed, clock in zip(facts, speeds, clocks, strict=True):
        if speed.tflops * factor < usual:
            at = f", its clock is {clock.now:,} of {clock.most:,} MHz" if clock is not None else ""
            remedy = (
                "nvidia-smi -q -d PERFORMANCE,TEMPERATURE says why" if clock is not None else "see what else runs there"
            )
            fast = f"{speed.tflops:.3g} TFLOP/s, the median of all ranks is {usual:.3g}"
            yield f"{named_places([one])}: matrix products at {fast}{at}; {remedy}."


def _slow_links(
    facts: Sequence[RankFacts], links: Mapping[Pair, float], factor: float, where: str, remedy: str
) -> Iterator[str]:
    ranks = slow_ranks(links, factor)
    rest = {pair: gbs for pair, gbs in links.items() if not ranks.keys() & set(pair)}
    usual = statistics.median(rest.values()) if rest else 0.0
    for rank, gbs in ranks.items():
        fast = f"the best has {gbs:.3g} GB/s, the median of others is {usual:.3g}"
        yield f"{named_places([facts[rank]])}: all its links {where} are slow, {fast}; {remedy}."
    slow = slow_pairs(rest, factor)
    for (a, b), gbs in list(slow.items())[:_MOST_LINKS]:
        yield (
            f"the link between {named_places([facts[a]])} and {named_places([facts[b]])} has {gbs:.3g} GB/s, the median "
            f"{where} is {usual:.3g}; {remedy}."
        )
    if len(slow) > _MOST_LINKS:
        yield f"{len(slow) - _MOST_LINKS} more links {where} are as slow; preflight.json has them all."
