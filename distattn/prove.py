"""The demo's proof: run the replay in plain transformers, compare, and say by how much they differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distattn.config import Config
from distattn.errors import DistattnError
from distattn.run import Run, read_lines

_REPLAY = Path(__file__).with_name("replay.py")


def prove(run: Run, config: Config) -> dict[str, Any]:
    """Replay the first steps and compare; the verdict is also written to proof.json.

    Raises DistattnError when the replay itself cannot run.
    """
    # -P: the script's own folder must not shadow anybody's packages
    command = [sys.executable, "-P", str(_REPLAY), str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DistattnError(f"the replay in plain transformers failed ({last}); run it by hand: {' '.join(command)}")
    verdict = compare(run, config)
    run.proof_file.write_text(json.dumps(verdict, indent=1))
    return verdict


def compare(run: Run, config: Config) -> dict[str, Any]:
    """The largest relative differences of loss and gradient norm between metrics.jsonl and replay.jsonl."""
    steps = [
        {
            "step": ours.step,
            "loss": ours.loss,
            "plain_loss": plain["loss"],
            "grad_norm": ours.grad_norm,
            "plain_grad_norm": plain["grad_norm"],
        }
        # the replay covers the first steps only
        for ours, plain in zip(run.metrics(), read_lines(run.replay_file), strict=False)
    ]
    verdict: dict[str, Any] = {
        name: max(abs(row[name] - row[f"plain_{name}"]) / abs(row[f"plain_{name}"] or 1.0) for row in steps)
        for name in ("loss", "grad_norm")
    }
    passed = all(verdict[name] < config.proof.tolerance for name in ("loss", "grad_norm"))
    return verdict | {"tolerance": config.proof.tolerance, "passed": passed, "steps": steps}
