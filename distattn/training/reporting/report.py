"""The report of a finished run: one self-contained HTML file with curves, the reference check and the first plan."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import tomli_w
from markupsafe import Markup

from distattn.ir.errors import RunStopped
from distattn.ir.plan import Plan
from distattn.ir.text_format import plural
from distattn.pages.render import render_page
from distattn.parallel.analysis.score_matrix import score_matrix_html
from distattn.training.config.run_file import Config
from distattn.training.reporting.json_lines import write_whole
from distattn.training.reporting.report_losses import corpus_rows, loss_charts
from distattn.training.run_folder import EVALUATION, RESUMED, RunFolder, StepMetrics

# curves and their labels, in display order; curves without values are left out
_CURVES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "seconds": "seconds per step",
    "evaluation": "evaluation loss",
    "learning_rate": "learning rate",
    "context_length": "context length",
    "mfu": "MFU",
    "data_seconds": "waiting for data",
    "wait_seconds": "waiting for ranks",
    "memory_allocated": "memory allocated",
    "memory_reserved": "memory reserved",
    "memory_resident": "memory of the process",
}
# runs with more steps are cut into segments; of each, the last step and the step with the highest loss are drawn
_MOST_DRAWN = 4000


def write_report(
    run: RunFolder, config: Config, checked: dict | None, attempts: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write report.html into the run folder. Raises OSError.

    checked: the result of `run_reference_check`, or None if it was not run. attempts: `Attempts.rows`, if recorded.
    """
    steps, evaluations = run.metrics(config.train.steps), run.losses(EVALUATION, config.train.steps)
    curves = _curves(steps, evaluations, checked)
    page = render_page(
        "report.html.j2",
        curves,
        title=run.folder.name,
        summary=(
            f"A run of distattn train on {_rank_counts(run, config)}: strategy {config.parallel.strategy}, "
            f"{config.parallel.layout} layout, {config.model.dtype}."
        ),
        tiles=[*_tiles(steps, evaluations), *_start_tiles(attempts)],
        curves=list(curves["labels"].items()),
        charts=loss_charts(run),
        corpora=corpus_rows(run),
        events=[(f"{step:,}", kind, text) for step, kind, text in _events(run, steps)],
        attempts=_attempt_rows(attempts),
        checked=checked,
        verdict=_verdict(checked) if checked else _unchecked(config),
        check_rows=[_check_row(row) for row in checked["steps"]] if checked else [],
        picture=Markup(score_matrix_html(Plan.load(run.plan_file))),
        explanation=run.explanation_file.read_text("utf-8"),
        configuration=run.config_file.read_text("utf-8"),
        configuration_file=run.config_file.name,
        changed_keys=tomli_w.dumps(_changed_keys(config)),
    )
    write_whole(run.report_file, page)


def _rank_counts(run: RunFolder, config: Config) -> str:
    """Return text such as "4 ranks" or, if the run was resumed with another number, "4 ranks, from step 35 on 2"."""
    resumed = [event for event in run.events() if event["kind"] == RESUMED and "saved_on" in event]
    # (last step before the segment, number of ranks)
    segments = [(-1, resumed[0]["saved_on"] if resumed else config.parallel.ranks)]
    for event in resumed:
        # the resumed run repeats the steps after its checkpoint
        segments = [segment for segment in segments if segment[0] < event["step"]]
        if segments[-1][1] != event["ranks"]:
            segments.append((event["step"], event["ranks"]))
    (_, first), *later = segments
    return plural(first, "rank") + "".join(f", from step {done + 1:,} on {ranks}" for done, ranks in later)


def _attempt_rows(attempts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row for each attempt: its number, start time, duration and how it ended.

    Returns no rows if the only attempt succeeded.
    """
    if len(attempts) == 1 and attempts[0].get("exit_code") == 0:
        return []
    rows = []
    for attempt in attempts:
        began, ended = attempt.get("began"), attempt.get("ended")
        moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)) if began is not None else "-"
        lasted = f"{ended - began:,.0f} s" if began is not None and ended is not None else "-"
        rows.append([str(attempt["attempt"]), moment, lasted, attempt.get("why", "goes on")])
    return rows


def _tiles(steps: list[StepMetrics], evaluations: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the run's key figures, each as (name, value, remark)."""
    first, last = steps[0], steps[-1]
    seconds, tokens = sum(step.seconds for step in steps), sum(step.tokens for step in steps)
    # the first step is slower: it makes plans and allocates buffers that later steps reuse
    later = steps[1:] or steps
    rate = sum(step.tokens for step in later) / sum(step.seconds for step in later)
    tiles = [
        ("loss", f"{last.loss:.3f}", f"from {first.loss:.3f}"),
        ("steps", f"{len(steps):,}", f"of {tokens / len(steps):,.0f} tokens"),
        ("tokens", f"{tokens:,}", "on all ranks"),
        ("tokens per second", f"{rate:,.0f}", "after the first step"),
        ("time", f"{seconds:,.1f} s", "in steps"),
    ]
    if evaluations:
        ends = [
            f"{row['loss']:.3f}" if row["loss"] is not None else "not a number"
            for row in (evaluations[0], evaluations[-1])
        ]
        tiles.append(("evaluation loss", ends[1], f"from {ends[0]}"))
    if mfus := [step.mfu for step in later if step.mfu is not None]:
        tiles.append(("MFU", f"{statistics.median(mfus):.1%}", "median after the first step"))
    for name, owner in (("data_seconds", "data"), ("wait_seconds", "other ranks")):
        waits = [(value, step.seconds) for step in later if (value := getattr(step, name)) is not None]
        if waits:
            share = sum(value for value, _ in waits) / sum(seconds for _, seconds in waits)
            tiles.append((f"waiting for {owner}", f"{share:.1%}", "of the time of rank 0"))
    for name, scope in (("memory_allocated", "allocated on the device"), ("memory_resident", "of the process")):
        if known_bytes := [value for step in steps if (value := getattr(step, name)) is not None]:
            tiles.append(("memory", f"{max(known_bytes) / 2**30:.2f} GiB", f"{scope}, rank 0"))
    if skipped := sum(bool(step.skipped) for step in steps):
        tiles.append(("steps not applied", f"{skipped:,}", "see what happened"))
    return tiles


def _start_tiles(attempts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return tiles with the number of restarts (after a failed attempt) and of resumes (after any other attempt)."""
    restarts = sum(_has_failed(attempt) for attempt in attempts[:-1])
    resumes = len(attempts[:-1]) - restarts
    tiles = []
    if restarts:
        tiles.append(("restarts", f"{restarts:,}", "after a failure, see starts and ends"))
    if resumes:
        tiles.append(("resumes", f"{resumes:,}", "after a normal end or a stop"))
    return tiles


def _has_failed(attempt: Mapping[str, Any]) -> bool:
    """Return whether an attempt failed without a request to stop. A missing exit code (a killed launcher) is a failure."""
    return attempt.get("exit_code") not in (0, RunStopped.exit_code) and not attempt.get("stopped", False)


def _curves(steps: list[StepMetrics], evaluations: list[dict[str, Any]], checked: dict | None) -> dict[str, Any]:
    """Return the page's curves: the run's columns by step, the reference check's columns, and the labels."""
    evaluated = {row["step"]: row["loss"] for row in evaluations}
    drawn = _thinned(steps, set(evaluated))
    columns: dict[str, list[Any]] = {
        name: [getattr(step, name, None) for step in drawn] for name in ("step", *_CURVES) if name != "evaluation"
    }
    columns["evaluation"] = [evaluated.get(step.step) for step in drawn]
    columns = {name: _drawable(values) for name, values in columns.items()}
    labels = {
        name: label
        for name, label in _CURVES.items()
        if name in ("loss", "grad_norm") or any(value is not None for value in columns[name])
    }
    if len(set(columns["context_length"])) == 1:
        # a constant context length needs no curve
        labels.pop("context_length", None)
    columns = {name: columns[name] for name in ("step", *labels)}
    rows = {row["step"]: row for row in checked["steps"]} if checked else {}
    reference = {
        name: _drawable([rows.get(step.step, {}).get(f"reference_{name}") for step in drawn])
        for name in ("loss", "grad_norm")
    }
    return {"steps": columns, "reference": reference, "labels": labels}


def _drawable(values: list[Any]) -> list[Any]:
    """Replace NaN and infinity with None: JSON cannot hold them, and an axis cannot show them."""
    return [value if value is not None and math.isfinite(value) else None for value in values]


def _thinned(steps: list[StepMetrics], kept: set[int]) -> list[StepMetrics]:
    """Return a subset of steps small enough to draw. It includes the steps not applied and those in `kept`."""
    if len(steps) <= _MOST_DRAWN:
        return steps
    length = -(-2 * len(steps) // _MOST_DRAWN)
    numbers = set(kept) | {step.step for step in steps if step.skipped} | {steps[0].step}
    for begin in range(0, len(steps), length):
        segment = steps[begin : begin + length]
        highest = max(segment, key=lambda step: step.loss if math.isfinite(step.loss) else math.inf)
        numbers |= {segment[-1].step, highest.step}
    return [step for step in steps if step.step in numbers]


def _events(run: RunFolder, steps: list[StepMetrics]) -> list[tuple[int, str, str]]:
    """Return (step, kind, sentence) for each event. Every step that was not applied has at least one event."""
    events = [(row["step"], row["kind"], row["text"]) for row in run.events()]
    reported = {step for step, _, _ in events}
    events += [(step.step, "not applied", step.skipped) for step in steps if step.skipped and step.step not in reported]
    return sorted(events, key=lambda event: event[0])


def _changed_keys(config: Config) -> dict[str, dict[str, Any]]:
    """Return the run's keys whose values differ from the defaults, by section."""
    defaults = asdict(Config())
    sections = {
        name: {key: value for key, value in keys.items() if value != defaults[name][key]}
        for name, keys in asdict(config).items()
    }
    return {name: keys for name, keys in sections.items() if keys}


def _verdict(checked: dict) -> str:
    agree = "agree with" if checked["passed"] else "differ from"
    return (
        f"{len(checked['steps'])} steps {agree} plain transformers: the largest relative difference of the loss is "
        f"{checked['loss']:.1e}, of the gradient norm {checked['grad_norm']:.1e} (must be under {checked['tolerance']:.0e})."
    )


def _unchecked(config: Config) -> str:
    if config.reference_check.steps:
        return "The steps were to be repeated in plain transformers, but that did not finish."
    return "The steps were not repeated in plain transformers (reference_check.steps = 0)."


def _check_row(row: dict) -> list[str]:
    cells = [str(row["step"])]
    for name, digits in (("loss", 6), ("grad_norm", 6)):
        here, there = row[name], row[f"reference_{name}"]
        cells += [f"{here:.{digits}f}", f"{there:.{digits}f}", f"{abs(here - there) / max(abs(there), 1e-30):.1e}"]
    return cells
