"""The page a run leaves behind: one self-contained HTML file with its curves, the reference check and the first plan."""

from __future__ import annotations

import base64
import math
from typing import Any

from distattn.ir.plan import Plan
from distattn.pages.render import render_page
from distattn.parallel.analysis.explain import draw_score_matrix
from distattn.training.config import Config
from distattn.training.run_folder import RunFolder, StepMetrics

# what is drawn, the first at once
_CURVES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "seconds": "seconds a step",
}


def write_report(run: RunFolder, config: Config, checked: dict | None) -> None:
    """Write report.html into the run folder. checked: what `run_reference_check` found, None where it was left out."""
    steps = run.metrics()
    page = render_page(
        "report.html.j2",
        _curves(steps, checked),
        title=run.folder.name,
        summary=(
            f"A run of distattn train on {config.parallel.ranks} ranks: strategy {config.parallel.strategy}, "
            f"{config.parallel.layout} layout, {config.model.dtype}."
        ),
        tiles=_tiles(steps),
        curves=list(_CURVES.items()),
        checked=checked,
        verdict=_verdict(checked) if checked else "",
        check_rows=[_check_row(row) for row in checked["steps"]] if checked else [],
        picture=base64.b64encode(draw_score_matrix(Plan.load(run.plan_file))).decode(),
        explanation=run.explanation_file.read_text("utf-8"),
        configuration=run.config_file.read_text("utf-8"),
    )
    run.report_file.write_text(page, "utf-8")


def _tiles(steps: list[StepMetrics]) -> list[tuple[str, str, str]]:
    """The run in five numbers: what, how much, and a word more."""
    first, last = steps[0], steps[-1]
    seconds, tokens = sum(step.seconds for step in steps), sum(step.tokens for step in steps)
    # the first step makes plans, and buffers that later ones use again
    later = steps[1:] or steps
    rate = sum(step.tokens for step in later) / sum(step.seconds for step in later)
    return [
        ("loss", f"{last.loss:.3f}", f"from {first.loss:.3f}"),
        ("steps", f"{len(steps):,}", f"of {tokens / len(steps):,.0f} tokens"),
        ("tokens", f"{tokens:,}", "on all ranks"),
        ("tokens per second", f"{rate:,.0f}", "after the first step"),
        ("time", f"{seconds:,.1f} s", "in steps"),
    ]


def _curves(steps: list[StepMetrics], checked: dict | None) -> dict[str, Any]:
    """What the page draws: columns by step, and those of plain transformers where it has them."""
    columns: dict[str, list[Any]] = {
        name: [getattr(step, name) for step in steps] for name in ("step", "loss", "grad_norm", "seconds")
    }
    columns["tokens_per_second"] = [step.tokens / step.seconds for step in steps]
    rows = {row["step"]: row for row in checked["steps"]} if checked else {}
    reference = {
        name: [rows.get(step.step, {}).get(f"reference_{name}") for step in steps] for name in ("loss", "grad_norm")
    }
    # JSON knows no NaN
    columns = {name: [value if math.isfinite(value) else None for value in values] for name, values in columns.items()}
    return {"steps": columns, "reference": reference, "labels": _CURVES}


def _verdict(checked: dict) -> str:
    agree = "agree with" if checked["passed"] else "differ from"
    return (
        f"{len(checked['steps'])} steps {agree} plain transformers: the largest relative difference of the loss is "
        f"{checked['loss']:.1e}, of the gradient norm {checked['grad_norm']:.1e} (must be under {checked['tolerance']:.0e})."
    )


def _check_row(row: dict) -> list[str]:
    cells = [str(row["step"])]
    for name, digits in (("loss", 6), ("grad_norm", 6)):
        here, there = row[name], row[f"reference_{name}"]
        cells += [f"{here:.{digits}f}", f"{there:.{digits}f}", f"{abs(here - there) / max(abs(there), 1e-30):.1e}"]
    return cells
