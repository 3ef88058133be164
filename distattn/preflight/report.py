"""Report the result of a preflight as a short table with one row per host, and as rows for JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distattn.ir.errors import named_ranks
from distattn.ir.text_format import align_columns, plural, readable_bytes
from distattn.preflight.device_state import Clock
from distattn.preflight.facts import RankFacts
from distattn.preflight.probes import Link, RankSpeed

_HEAD = ["host", "ranks", "device", "clock", "memory free", "needed", "disk free", "products", "inside", "across"]
_UNKNOWN = "-"


def report_table(
    facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None], seconds: float
) -> list[str]:
    """Return the lines of a table with each host's least free memory, largest need and median speeds.

    facts, speeds, clocks: indexed by rank. seconds: the duration of the preflight.
    """
    hosts: dict[tuple[str, str], list[int]] = {}
    for rank in facts:
        hosts.setdefault(rank.place, []).append(rank.rank)
    rows = [
        _row([facts[rank] for rank in ranks], [speeds[rank] for rank in ranks], [clocks[rank] for rank in ranks])
        for ranks in hosts.values()
    ]
    to_all = min(speed.all_to_all_gbs for speed in speeds)
    slowest = f", all-to-all {to_all:.3g} GB/s a rank" if to_all else ""
    title = f"preflight: {plural(len(facts), 'rank')} on {plural(len(hosts), 'host')} in {seconds:.1f} s{slowest}"
    table = [f"  {line}" for line in align_columns([_HEAD, *rows], left=3)]
    return [title, *table, *(f"  {line}" for line in _need_legend(facts))]


def report_facts(
    facts: Sequence[RankFacts], speeds: Sequence[RankSpeed], clocks: Sequence[Clock | None]
) -> list[dict[str, Any]]:
    """Return one row per rank. The configuration is left out, because the run folder has it."""
    rows = []
    for number, rank in enumerate(facts):
        row = asdict(rank)
        del row["config"]
        row["device"] = rank.device._asdict()
        row["forecast"] = rank.forecast and rank.forecast._asdict()
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
    first, gpu_clocks = facts[0], [clock for clock in clocks if clock is not None]
    forecasts = [rank.forecast for rank in facts if rank.forecast is not None]
    if first.device.total is None:
        # the host's ranks share its memory
        free, need = first.host_free, sum(forecast.host for forecast in forecasts)
    else:
        free = min((rank.device.free for rank in facts if rank.device.free is not None), default=None)
        need = max((forecast.device for forecast in forecasts), default=0)
    return [
        first.host,
        named_ranks(rank.rank for rank in facts).partition(" ")[2]
        if len(facts) < 5
        else f"{first.rank}-{facts[-1].rank}",
        first.device.name,
        f"{min(clock.now for clock in gpu_clocks):,} MHz" if gpu_clocks else _UNKNOWN,
        _UNKNOWN if free is None else readable_bytes(free),
        readable_bytes(need),
        readable_bytes(min(rank.disk_free for rank in facts)),
        f"{statistics.median(speed.tflops for speed in speeds):.3g} TFLOP/s",
        _links([link for speed in speeds for link in speed.inside]),
        _links([link for speed in speeds for link in speed.across]),
    ]


def _need_legend(facts: Sequence[RankFacts]) -> list[str]:
    """Return a line that explains the column "needed", or no lines if no memory was forecast."""
    forecasts = [rank.forecast for rank in facts if rank.forecast is not None]
    if not forecasts:
        return []
    if all(forecast.whole_step for forecast in forecasts):
        return ["needed: a step of the rank that needs most, as distattn plan --memory counts it"]
    whose = "all ranks on a host" if facts[0].device.total is None else "a rank"
    return [
        f"needed: weights, gradients and optimizer state of {whose}; distattn plan --memory counts a whole step of one rank"
    ]


def _links(links: Sequence[Link]) -> str:
    if not links:
        return _UNKNOWN
    speed, latency = (statistics.median(getattr(link, name) for link in links) for name in ("gbs", "latency_us"))
    return f"{speed:.3g} GB/s, {latency:.3g} µs"
