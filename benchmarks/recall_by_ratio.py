"""Recall of hybrid models by the number of recurrent layers per attention layer: a table and a figure for several seeds.

    python benchmarks/recall_by_ratio.py [--seeds 3] [--steps 400] [--out FILE.jsonl] [--figure FILE.png]

Every run is `examples/recall.py` on one core, with the same settings except for the ratio and the number of layers. A
hybrid has one attention layer, and is compared with models that have as many layers, all attention or all recurrent.
Each run is a line of the file (by default in benchmarks/results) with its complete curve, and existing runs are not
repeated. Recall is the share of correct values in the last 20 steps. By default the figure is the one in docs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from harness import environment
from process_guard import guard_processes

ROOT = Path(__file__).parents[1]
# the recall of a model that only knows which 32 symbols are values
CHANCE = 1 / 32


class Setting(NamedTuple):
    """A model of `examples/hybrid_model.py`: recurrent layers per attention layer, and number of layers.

    ratio: 0 for attention layers only, -1 for recurrent layers only.
    """

    ratio: int
    layers: int

    @property
    def name(self) -> str:
        return {0: "attention alone", -1: "recurrent alone"}.get(self.ratio, f"{self.ratio} recurrent : 1 attention")


# the settings, and the color of their lines
SETTINGS = {
    Setting(0, 4): "tab:gray",
    Setting(3, 4): "tab:blue",
    Setting(-1, 4): "tab:red",
    Setting(0, 7): "black",
    Setting(6, 7): "tab:cyan",
    Setting(-1, 7): "tab:orange",
}


def main() -> None:
    """Run the settings that the file lacks, seed by seed. Then print the table and draw the figure of all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "recall.jsonl")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "recall.png")
    arguments = parser.parse_args()
    wanted = [(setting, seed) for seed in range(arguments.seeds) for setting in SETTINGS]
    there = {(setting_of(row), row["seed"]) for row in kept(arguments.out, arguments.steps)}
    for setting, seed in wanted:
        if (setting, seed) not in there:
            sys.stderr.write(f"{setting.name}, {setting.layers} layers, seed {seed}\n")
            row = trained(setting, seed, arguments.steps)
            with arguments.out.open("a") as file:
                file.write(json.dumps(environment() | row) + "\n")
    rows = [row for row in kept(arguments.out, arguments.steps) if (setting_of(row), row["seed"]) in wanted]
    sys.stdout.write(table(rows) + "\n")
    draw(rows, arguments.figure)


def kept(path: Path, steps: int) -> list[dict[str, Any]]:
    """Return the runs with `steps` steps from a file, or [] if the file does not exist."""
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [row for row in rows if row["steps"] == steps]


def setting_of(row: dict[str, Any]) -> Setting:
    return Setting(row["ratio"], row["layers"])


def trained(setting: Setting, seed: int, steps: int) -> dict[str, Any]:
    """Run the example once. Return its arguments, recall at every step and CPU seconds.

    Raise CalledProcessError if the example fails.
    """
    arguments = dict(setting._asdict(), seed=seed, steps=steps)
    command = ["examples/recall.py", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))]
    extra = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    how = dict(check=True, cwd=ROOT, env=os.environ | extra, stdout=subprocess.PIPE, text=True)
    output = subprocess.run([sys.executable, *command], **how).stdout
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    recall = [float(value) for value in re.findall(r"^step \d+ loss \S+ recall (\S+)$", output, re.M)]
    return {**arguments, "recall": recall, "cpu_seconds": round(seconds, 1), "command": " ".join(["python", *command])}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the final recall of each run as a Markdown table with a row per setting."""
    seeds = sorted({row["seed"] for row in rows})
    head = ["model", "layers", *(f"seed {seed}" for seed in seeds), "0.9 at step", "CPU seconds"]
    lines = [head, ["---"] * len(head)]
    for setting in SETTINGS:
        here = {row["seed"]: row for row in rows if setting_of(row) == setting}
        ends = [f"{here[seed]['recall'][-1]:.3f}" if seed in here else "" for seed in seeds]
        learned = [first_step(row["recall"], 0.9) for row in here.values()]
        seconds = f"{mean(row['cpu_seconds'] for row in here.values()):.0f}" if here else ""
        lines.append([setting.name, str(setting.layers), *ends, ", ".join(learned), seconds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def first_step(recall: Sequence[float], level: float) -> str:
    """Return the first step at which recall reaches a level, or "-"."""
    return next((str(step + 1) for step, value in enumerate(recall) if value >= level), "-")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every run's curve on the left, and final recall by setting on the right. Save the figure to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for at, (setting, colour) in enumerate(SETTINGS.items()):
        here = [row["recall"] for row in rows if setting_of(row) == setting]
        for number, recall in enumerate(here):
            label = f"{setting.name}, {setting.layers} layers" if not number else None
            curves.plot(range(1, len(recall) + 1), recall, color=colour, linewidth=1, label=label)
        ends.plot([at] * len(here), [recall[-1] for recall in here], "o", color=colour, alpha=0.6)
    for axis in (curves, ends):
        axis.axhline(CHANCE, color="black", linewidth=0.6, linestyle=":")
        axis.set(ylim=(-0.02, 1.02), ylabel="recall (mean of 20 steps)")
    curves.set(xlabel="step of 1,024 tokens", title="Training; one line for each seed")
    curves.legend(fontsize="x-small", loc="center right")
    ends.set_title("At the end; dotted: a guess")
    short = {0: "attention\nalone", -1: "recurrent\nalone"}
    names = [f"{short.get(setting.ratio, f'{setting.ratio} : 1')}\n{setting.layers} layers" for setting in SETTINGS]
    ends.set_xticks(range(len(SETTINGS)), names, fontsize="x-small")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    guard_processes()
    main()
