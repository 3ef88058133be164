"""Before the first step all ranks say what they are and how fast; what is wrong is named, and no GPU hour is spent on it.

Ranks talk over a gloo communicator of their own beside the process group, and measured messages go the way attention's do.
Nothing here knows what engine will train.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distattn.parallel.runtime.attendance import attended
from distattn.parallel.runtime.communicator import (
    all_gather_objects_over_gloo,
    open_communicator,
    open_host_communicator,
)
from distattn.parallel.runtime.communicator_end import end_communicator
from distattn.parallel.runtime.transport import GroupTransport
from distattn.preflight.comparison import code_problems, problems_of, warnings_of
from distattn.preflight.device_state import Clock, gpu_clock
from distattn.preflight.facts import RankFacts, code_digest, collect_facts
from distattn.preflight.outliers import outliers_of
from distattn.preflight.probes import RankSpeed, measure_speed
from distattn.preflight.report import report_facts, report_table
from distattn.supervision.heartbeats import telling
from distattn.training.config import Config
from distattn.training.json_lines import json_text, write_whole
from distattn.training.run_folder import RunFolder

# that a rank may take longer than others to open its data, or to answer
_LIMIT = timedelta(seconds=120)


class PreflightReport(NamedTuple):
    """What was found, the same on all ranks but for `seconds`.

    problems: what makes the run fail; warnings: what is slow or unusual. facts, speeds, clocks: by rank; speeds and clocks are
    empty where there are problems, since nothing is measured then, and facts where ranks run different code.
    """

    problems: list[str]
    warnings: list[str]
    facts: Sequence[RankFacts]
    speeds: Sequence[RankSpeed]
    clocks: Sequence[Clock | None]
    seconds: float


def check_run(run: RunFolder, config: Config, device: torch.device, report_progress: Callable[[str], None]) -> bool:
    """Whether a run may begin, or nothing was found wrong before it ends, as `preflight.action` says. Collective.

    Rank 0 says what was found, problems and warnings on stderr and a short table by `report_progress`, and writes it to the run
    folder. Raises LostRankError naming ranks that do not answer.
    """
    if config.preflight.action == "off":
        return True

    def tell(report: PreflightReport) -> None:
        show_report(report, report_progress, stops=config.preflight.action != "warn")
        write_report(run, report)

    report = preflight(run, config, device, tell)
    return not report.problems or config.preflight.action == "warn"


def preflight(
    run: RunFolder,
    config: Config,
    device: torch.device,
    tell: Callable[[PreflightReport], None] = lambda report: None,
    limit: timedelta = _LIMIT,
) -> PreflightReport:
    """Compare and measure all ranks of the default group, which call it together. device: of this rank.

    tell: what rank 0 does with what was found, before any rank goes on. limit: how long ranks wait for each other. Raises
    LostRankError naming ranks that do not answer within it.
    """
    began, group = time.monotonic(), dist.group.WORLD
    assert group is not None
    host = open_host_communicator(group, limit)

    def gather(value: Any, what: str) -> list[Any]:
        with telling(f"the preflight's {what}", waits=True):
            return attended(group, f"the preflight's {what}", lambda: all_gather_objects_over_gloo(host, value))

    with telling("reading its data and disk for the preflight"):
        mine = collect_facts(run, config, device)
    told = gather((code_digest(), mine.host, mine.as_json()), "comparison of code, configuration, data and memory")
    digests, hosts, texts = zip(*told, strict=True)
    report = PreflightReport(code_problems(hosts, digests), [], [], [], [], 0.0)
    if not report.problems:
        # other code may say other things
        facts = list(map(RankFacts.from_json, texts))
        report = report._replace(problems=problems_of(facts), facts=facts)
    if not report.problems:
        with telling("measuring its device and links for the preflight", waits=True):
            measured = _measured(mine.rank, report.facts, host, device, limit)
        speeds, clocks = zip(*gather(measured, "measurement of devices and links"), strict=True)
        warnings = warnings_of(report.facts) + outliers_of(report.facts, speeds, clocks, device.type)
        report = report._replace(warnings=warnings, speeds=speeds, clocks=clocks)
    report = report._replace(seconds=time.monotonic() - began)
    if mine.rank == 0:
        tell(report)
    # a launcher ends all ranks when the first one ends
    gather(None, "end")
    end_communicator(host)
    return report


def show_report(report: PreflightReport, report_progress: Callable[[str], None], stops: bool) -> None:
    """Say what was found: a table by `report_progress`, problems and warnings on stderr. stops: whether problems end the run."""
    for line in report_table(report.facts, report.speeds, report.clocks, report.seconds) if report.speeds else []:
        report_progress(line)
    for problem in report.problems:
        sys.stderr.write(f"distattn: preflight: {problem}\n")
    if report.problems and not stops:
        sys.stderr.write("distattn: preflight.action is warn: the run goes on.\n")
    for warning in report.warnings:
        sys.stderr.write(f"distattn: preflight: warning: {warning}\n")
    sys.stderr.flush()


def write_report(run: RunFolder, report: PreflightReport) -> None:
    """Write what was found to the run folder; a disk that is full is warned of."""
    try:
        write_whole(run.preflight_file, json_text(report_json(report), indent=1) + "\n")
    except OSError as error:
        sys.stderr.write(f"distattn: {run.preflight_file}: cannot be written: {error.strerror}.\n")


def report_json(report: PreflightReport) -> dict[str, Any]:
    """What was found, in values of JSON: problems, warnings, seconds, and of each rank its facts and speeds."""
    rows = report_facts(report.facts, report.speeds, report.clocks)
    return {
        "problems": report.problems,
        "warnings": report.warnings,
        "seconds": round(report.seconds, 3),
        "ranks": rows,
    }


def _measured(
    rank: int, facts: Sequence[RankFacts], host: Any, device: torch.device, limit: timedelta
) -> tuple[RankSpeed, Clock | None]:
    """What this rank measures, messages of processors over `host`."""
    group, transport = dist.group.WORLD, None
    assert group is not None
    if len(facts) > 1:
        backend = host if device.type == "cpu" else open_communicator(group, device, limit)
        transport = GroupTransport(group, backend)
    speed = measure_speed(rank, _nodes(facts), transport, device, limit)
    # before the device has been idle for long
    clock = gpu_clock(device)
    if device.type == "cuda":
        if transport is not None:
            # open, it would keep buffers for each peer
            transport.close()
        torch.cuda.empty_cache()
    return speed, clock


def _nodes(facts: Sequence[RankFacts]) -> list[list[int]]:
    """The ranks of each machine."""
    found: dict[tuple[str, str], list[int]] = {}
    for one in facts:
        found.setdefault(one.place, []).append(one.rank)
    return list(found.values())
