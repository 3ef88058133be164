"""What a preflight found, as a short table with a line for each host, and as rows for JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distattn.ir.errors import named_ranks
from distattn.parallel.analysis.columns import aligned, plural, readable_bytes
from distattn.preflight.device_state import Clock
from distattn.preflight.facts import RankFacts
from distattn.preflight.probes import Link, RankSpeed

_HEAD = ["host", "ranks", "device", "clock", "memory free", "needed", "disk free", "products", "inside", "across"]
_UNKNOWN = "-"


def report_table(
    facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None], seconds: float
) -> list[str]:
    """Lines of a table: of each host the least that is free, the most that is needed, and medians of speeds. All by rank."""
    hosts: dict[tuple[str, str], list[int]] = {}
    for one in facts:
        hosts.setdefault(one.place, []).append(one.rank)
    rows = [
        _row([facts[rank] for rank in ranks], [speeds[rank] for rank in ranks], [clocks[rank] for rank in ranks])
        for ranks in hosts.values()
    ]
    to_all = min(one.all_to_all_gbs for one in speeds)
    slowest = f", all-to-all {to_all:.3g} GB/s a rank" if to_all else ""
    title = f"preflight: {plural(len(facts), 'rank')} on {plural(len(hosts), 'host')} in {seconds:.1f} s{slowest}"
    table = [f"  {line}" for line in aligned([_HEAD, *rows], left=3)]
    return [title, *table, *(f"  {line}" for line in _what_is_needed(facts))]


def report_facts(
    facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None]
) -> list[dict[str, Any]]:
    """A row of each rank. Its configuration is left out: the run folder has it."""
    rows = []
    for number, one in enumerate(facts):
        row = asdict(one)
        del row["config"]
        row["device"] = one.device._asdict()
        row["forecast"] = one.forecast and one.forecast._asdict()
        if speeds:
            speed = speeds[number]
            row |= {"tflops": speed.tflops, "all_to_all_gbs": speed.all_to_all_gbs}
            row |= {
                "inside": [link._asdict() for link in speed.inside],
                "across": [link._asdict() for link in speed.across],
            }
            clock = clocks[number]
            row["clock"] = clock and clock._asdict()
        rows.append(row)
    return rows


def _row(facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None]) -> list[str]:
    first, known = facts[0], [clock for clock in clocks if clock is not None]
    forecasts = [one.forecast for one in facts if one.forecast is not None]
    if first.device.total is None:
        # the host's is shared
        free, need = first.host_free, sum(one.host for one in forecasts)
    else:
        free = min((one.device.free for one in facts if one.device.free is not None), default=None)
        need = max((one.device for one in forecasts), default=0)
    return [
        first.host,
        named_ranks(one.rank for one in facts).partition(" ")[2]
        if len(facts) < 5
        else f"{first.rank}-{facts[-1].rank}",
        first.device.name,
        f"{min(one.now for one in known):,} MHz" if known else _UNKNOWN,
        _UNKNOWN if free is None else readable_bytes(free),
        readable_bytes(need),
        readable_bytes(min(one.disk_free for one in facts)),
        f"{statistics.median(one.tflops for one in speeds):.3g} TFLOP/s",
        _links([link for one in speeds for link in one.inside]),
        _links([link for one in speeds for link in one.across]),
    ]


def _what_is_needed(facts: Sequence[RankFacts]) -> list[str]:
    """Return a line that says what the column of needed memory counts."""
    forecasts = [one.forecast for one in facts if one.forecast is not None]
    if not forecasts:
        return []
    if all(one.whole_step for one in forecasts):
        return ["needed: a step of the rank that needs most, as distattn plan --memory counts it"]
    whose = "all ranks on a host" if facts[0].device.total is None else "a rank"
    return [
        f"needed: weights, gradients and optimizer state of {whose}; distattn plan --memory counts a whole step of one rank"
    ]


def _links(links: Sequence[Link]) -> str:
    if not links:
        return _UNKNOWN
    speed, latency = (statistics.median(getattr(one, name) for one in links) for name in ("gbs", "latency_us"))
    return f"{speed:.3g} GB/s, {latency:.3g} µs"
