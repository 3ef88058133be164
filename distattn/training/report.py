"""The page a run leaves behind: one self-contained HTML file with loss curve, first plan and reference check."""

from __future__ import annotations

import base64
import html
import io
from string import Template

from matplotlib.figure import Figure

from distattn.ir.plan import Plan
from distattn.parallel.analysis.explain import draw_score_matrix
from distattn.training.config import Config
from distattn.training.run_folder import RunFolder, StepMetrics

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.35; }
img, svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: 0.2rem 1rem 0.2rem 0; text-align: right; }
.good { color: #17692f; } .bad { color: #a11; }
</style></head><body>
<h1>$title</h1>
<p>$summary</p>
<h2>Loss</h2>
$curve
<h2>The same steps in plain transformers</h2>
$reference_check
<h2>Who computes what</h2>
<p>The score matrix of the first step, forward pass: rows are queries, columns are keys, white is not allowed.</p>
<img alt="score matrix, coloured by rank and by step" src="data:image/png;base64,$picture">
<pre>$explanation</pre>
<h2>Configuration</h2>
<pre>$config</pre>
</body></html>
""")


def write_report(run: RunFolder, config: Config, checked: dict | None) -> None:
    """Write report.html into the run folder. checked: what `run_reference_check` found, None where it was left out."""
    steps = run.metrics()
    seconds = sum(step.seconds for step in steps)
    summary = (
        f"{len(steps)} steps of {sum(s.tokens for s in steps) / len(steps):,.0f} tokens on {config.parallel.ranks} ranks "
        f"({config.parallel.strategy}, {config.parallel.layout} layout) in {seconds:.0f} s: "
        f"loss {steps[0].loss:.3f} to {steps[-1].loss:.3f}."
    )
    page = _PAGE.substitute(
        title=html.escape(run.folder.name),
        summary=html.escape(summary),
        curve=_loss_curve(steps),
        reference_check=_reference_check(checked),
        picture=base64.b64encode(draw_score_matrix(Plan.load(run.plan_file))).decode(),
        explanation=html.escape(run.explanation_file.read_text("utf-8")),
        config=html.escape(run.config_file.read_text("utf-8")),
    )
    run.report_file.write_text(page, "utf-8")


def _loss_curve(steps: list[StepMetrics]) -> str:
    """An SVG of the loss over the steps."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([step.step for step in steps], [step.loss for step in steps], marker=".", color="#1f5fa8")
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def _reference_check(checked: dict | None) -> str:
    """HTML that says whether the steps agree, with a row for each step."""
    if checked is None:
        return "<p>Left out (reference_check.steps = 0).</p>"
    rows = "".join(
        f"<tr><td>{row['step']}</td><td>{row['loss']:.6f}</td><td>{row['reference_loss']:.6f}</td>"
        f"<td>{row['grad_norm']:.6f}</td><td>{row['reference_grad_norm']:.6f}</td></tr>"
        for row in checked["steps"]
    )
    verdict = "good" if checked["passed"] else "bad"
    return (
        f'<p class="{verdict}">Largest relative difference: loss {checked["loss"]:.1e}, gradient norm '
        f"{checked['grad_norm']:.1e} (must be under {checked['tolerance']:.0e}).</p>"
        "<table><tr><th>step</th><th>loss</th><th>transformers</th><th>gradient norm</th><th>transformers</th></tr>"
        + rows
        + "</table>"
    )
