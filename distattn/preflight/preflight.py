"""Compare and measure all ranks before the first step, to find problems before they cost GPU hours.

Ranks exchange facts over a separate gloo communicator, while links are measured with the transport of attention. Nothing here
depends on the training engine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distattn.parallel.runtime.communication.collective_calls import run_collective
from distattn.parallel.runtime.communication.communicator import (
    all_gather_objects_over_gloo,
    open_communicator,
    open_host_communicator,
)
from distattn.parallel.runtime.communication.communicator_end import end_communicator
from distattn.parallel.runtime.communication.transport import GroupTransport
from distattn.preflight.comparison import code_problems, problems_of, warnings_of
from distattn.preflight.device_state import Clock, gpu_clock
from distattn.preflight.facts import RankFacts, code_digest, collect_facts
from distattn.preflight.outliers import outliers_of
from distattn.preflight.probes import RankSpeed, measure_speed
from distattn.preflight.report import report_facts, report_table
from distattn.supervision.heartbeats import activity
from distattn.training.config.run_file import Config
from distattn.training.reporting.json_lines import json_text, write_whole
from distattn.training.run_folder import RunFolder

# how much longer than other ranks a rank may take to open its data or to answer
_LIMIT = timedelta(seconds=120)


class PreflightReport(NamedTuple):
    """The result of a preflight. It is the same on all ranks except for `seconds`.

    problems: sentences about faults that would make the run fail. warnings: sentences about slow or unusual parts. facts, speeds,
    clocks: indexed by rank. If there are problems, nothing is measured, and speeds and clocks are empty. If ranks run different
    code, facts are also empty.
    """

    problems: list[str]
    warnings: list[str]
    facts: Sequence[RankFacts]
    speeds: Sequence[RankSpeed]
    clocks: Sequence[Clock | None]
    seconds: float


def check_run(run: RunFolder, config: Config, device: torch.device, report_progress: Callable[[str], None]) -> bool:
    """Check all ranks according to `preflight.action`. Return True if the run may begin or, for "only", has no problems.

    This is a collective call. Rank 0 prints problems and warnings to stderr and a short table with `report_progress`, and writes
    the report to the run folder. Raises LostRankError naming the ranks that do not answer.
    """
    if config.preflight.action == "off":
        return True

    def publish(report: PreflightReport) -> None:
        show_report(report, report_progress, stops=config.preflight.action != "warn")
        write_report(run, report)

    report = preflight(run, config, device, publish)
    return not report.problems or config.preflight.action == "warn"


def preflight(
    run: RunFolder,
    config: Config,
    device: torch.device,
    publish: Callable[[PreflightReport], None] = lambda report: None,
    limit: timedelta = _LIMIT,
) -> PreflightReport:
    """Compare and measure all ranks of the default group, all of which must call this function. device: this rank's device.

    publish: called on rank 0 with the report before any rank continues. limit: how long ranks wait for each other. Raises
    LostRankError naming the ranks that do not answer in time.
    """
    began, group = time.monotonic(), dist.group.WORLD
    assert group is not None
    host = open_host_communicator(group, limit)

    def gather(value: Any, label: str) -> list[Any]:
        with activity(f"the preflight's {label}", waits=True, key=label):
            return run_collective(group, f"the preflight's {label}", lambda: all_gather_objects_over_gloo(host, value))

    with activity("reading its data and disk for the preflight"):
        mine = collect_facts(run, config, device)
    gathered = gather((code_digest(), mine.host, mine.as_json()), "comparison of code, configuration, data and memory")
    digests, hosts, texts = zip(*gathered, strict=True)
    report = PreflightReport(code_problems(hosts, digests), [], [], [], [], 0.0)
    if not report.problems:
        # the format of facts is the same only on ranks with the same code
        facts = list(map(RankFacts.from_json, texts))
        report = report._replace(problems=problems_of(facts), facts=facts)
    if not report.problems:
        with activity("measuring its device and links for the preflight", waits=True, key="preflight probes"):
            measured = _measure(mine.rank, report.facts, host, device, limit)
        speeds, clocks = zip(*gather(measured, "measurement of devices and links"), strict=True)
        warnings = warnings_of(report.facts) + outliers_of(report.facts, speeds, clocks, device.type)
        report = report._replace(warnings=warnings, speeds=speeds, clocks=clocks)
    report = report._replace(seconds=time.monotonic() - began)
    if mine.rank == 0:
        publish(report)
    # wait for rank 0 to publish: a launcher ends all ranks as soon as a rank ends
    gather(None, "end")
    end_communicator(host)
    return report


def show_report(report: PreflightReport, report_progress: Callable[[str], None], stops: bool) -> None:
    """Print a table with `report_progress`, and problems and warnings to stderr. stops: True if problems end the run."""
    for line in report_table(report.facts, report.speeds, report.clocks, report.seconds) if report.speeds else []:
        report_progress(line)
    for problem in report.problems:
        sys.stderr.write(f"distattn: preflight: {problem}\n")
    if report.problems and not stops:
        sys.stderr.write('distattn: preflight.action is "warn": the run continues.\n')
    for warning in report.warnings:
        sys.stderr.write(f"distattn: preflight: warning: {warning}\n")
    sys.stderr.flush()


def write_report(run: RunFolder, report: PreflightReport) -> None:
    """Write the report to the run folder. If it cannot be written, print a warning."""
    try:
        write_whole(run.preflight_file, json_text(report_json(report), indent=1) + "\n")
    except OSError as error:
        sys.stderr.write(f"distattn: {run.preflight_file}: cannot be written: {error.strerror}.\n")


def report_json(report: PreflightReport) -> dict[str, Any]:
    """Return the report as a dict for JSON: problems, warnings, seconds, and the facts and speeds of each rank."""
    rows = report_facts(report.facts, report.speeds, report.clocks)
    return {
        "problems": report.problems,
        "warnings": report.warnings,
        "seconds": round(report.seconds, 3),
        "ranks": rows,
    }


def _measure(
    rank: int, facts: Sequence[RankFacts], host: Any, device: torch.device, limit: timedelta
) -> tuple[RankSpeed, Clock | None]:
    """Measure this rank's speed and clock. On CPUs, messages are sent over the communicator `host`."""
    group, transport = dist.group.WORLD, None
    assert group is not None
    if len(facts) > 1:
        backend = host if device.type == "cpu" else open_communicator(group, device, limit)
        transport = GroupTransport(group, backend)
    speed = measure_speed(rank, _nodes(facts), transport, device, limit)
    # read the clock immediately, before the idle device lowers it
    clock = gpu_clock(device)
    if device.type == "cuda":
        if transport is not None:
            # close the communicator, which would keep buffers for each peer
            transport.close()
        torch.cuda.empty_cache()
    return speed, clock


def _nodes(facts: Sequence[RankFacts]) -> list[list[int]]:
    """Return the ranks of each machine."""
    nodes: dict[tuple[str, str], list[int]] = {}
    for rank in facts:
        nodes.setdefault(rank.place, []).append(rank.rank)
    return list(nodes.values())
