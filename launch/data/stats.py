"""`distattn data stats`: show a run's data by corpus and by document length, as a table and as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np

from distattn.data.files.corpus import Corpus
from distattn.data.packing.pack_config import load_pack_config, open_configured_plan, open_corpora
from distattn.data.packing.pack_plan import PackPlan
from distattn.ir.errors import DistattnError
from distattn.launch.command_line import CommandParser
from distattn.launch.data.progress import ProgressReporter
from distattn.launch.data.tables import plan_facts, print_plan

USAGE = """usage: distattn data stats PACKS.toml [--picture FILE] [--json]

Prints the data of a run with this plan: documents, tokens and epochs of each corpus, how full the packs are, and how uneven the
attention work of a step's packs is. distattn data pack makes the plan.

  --picture FILE   lengths of documents by corpus, and work of packs by step, drawn (.svg, .png or .pdf)
  --json           the result as JSON
"""

# the maximum number of steps whose packs are examined; in a plan with more steps, evenly spaced steps are examined
_MOST_STEPS = 2000
_BINS = 64


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    parser = CommandParser("data stats")
    parser.add_argument("config")
    parser.add_argument("--picture")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.picture is not None and not options.picture.endswith((".svg", ".png", ".pdf")):
        raise DistattnError(f"data stats: --picture {options.picture}: the name must end in .svg, .png or .pdf.")
    config = load_pack_config(options.config)
    corpora = open_corpora(config)
    plan = open_configured_plan(config, corpora)
    steps = np.unique(np.linspace(0, plan.steps - 1, min(plan.steps, _MOST_STEPS)).astype(np.int64))
    with ProgressReporter("stats", len(steps)) as reporter:
        unevenness = np.empty(len(steps))
        for index, step in enumerate(steps.tolist()):
            unevenness[index] = _unevenness(plan, step)
            reporter.advance(1)
    if options.picture:
        _draw(corpora, steps, unevenness, options.picture)
    mean, worst = float(unevenness.mean()), float(unevenness.max())
    if options.json:
        facts = plan_facts(plan) | {"attention_max_over_mean": mean, "worst_attention_max_over_mean": worst}
        sys.stdout.write(json.dumps(facts) + "\n")
        return 0
    print_plan(plan)
    examined = "all steps" if len(steps) == plan.steps else f"{len(steps):,} steps"
    sys.stdout.write(
        f"attention work of a step's packs, largest over mean: {mean:.2f}, at most {worst:.2f} in step "
        f"{steps[unevenness.argmax()]:,} (of {examined})\n"
    )
    return 0


def _unevenness(plan: PackPlan, step: int) -> float:
    """Return the highest attention work per slot of any pack in a step, divided by the mean over all slots."""
    packs = plan.step(step)
    work = np.array([np.square(pack.rows["length"], dtype=np.float64).sum() for pack in packs.packs])
    slots = np.array(packs.slots)
    return float((work / slots).max() * slots.sum() / work.sum())


def _draw(corpora: Sequence[Corpus], steps: np.ndarray, unevenness: np.ndarray, file: str) -> None:
    """Draw each corpus's tokens by document length, and each step's unevenness. Write the picture to `file`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DistattnError("data stats: --picture needs matplotlib: pip install 'distattn[train]'.") from None
    longest = max(int(corpus.lengths.max()) for corpus in corpora)
    edges = np.geomspace(1, longest + 1, _BINS + 1)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    for corpus in corpora:
        lengths = corpus.lengths
        tokens, _ = np.histogram(lengths, edges, weights=lengths)
        upper.stairs(tokens / 1e6, edges, label=f"{corpus.name} ({corpus.documents:,} documents)", fill=True, alpha=0.5)
    upper.set(
        xscale="log", xlabel="tokens of a document", ylabel="million tokens in them", title="Lengths of documents"
    )
    upper.legend()
    lower.plot(steps, unevenness, linewidth=1)
    lower.set(xlabel="step", ylabel="largest over mean", title="Attention work of a step's packs", ylim=(1, None))
    try:
        figure.savefig(file)
    except OSError as error:
        raise DistattnError(f"data stats: --picture {file}: cannot be written: {error.strerror}.") from None
