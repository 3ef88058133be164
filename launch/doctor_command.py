"""`distattn doctor`: check this machine, and check that a model computes the same on several ranks as on one."""

from __future__ import annotations

import json
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distattn.doctor.environment import Check, check_machine
from distattn.ir.errors import DistattnError
from distattn.launch.command_line import CommandParser, ResultConsole, no_progress, print_to_stderr

if TYPE_CHECKING:
    from rich.console import Console

    from distattn.doctor.comparison import Diagnosis

_USAGE = """usage: distattn doctor [SCRIPT.py | MODEL] [--ranks N] [--json]

Looks at versions, devices, NCCL, Triton and ports; then runs a model and a batch in one process and on N ranks (default 2)
of this machine, and compares logits, loss and every gradient. If they differ, it names the first difference and the mistake
that explains it. MODEL is a folder or config.json of transformers; SCRIPT defines the steps of your own trainer.

SCRIPT is a Python file with these functions; all but the first have defaults, written for models of
transformers with attn_implementation="distattn":

  model() -> torch.nn.Module                  with the same weights on every rank; on ranks (where torch.distributed is
                                              initialized) it may be wrapped: fully_shard, DDP, a DeepSpeed engine
  batch() -> dict, or a list of them          as ContextParallel.shard takes it, the same on every rank; a list is the
                                              micro-batches of one step
  context_parallel() -> ContextParallel       over the default process group
  setup(cp, model)                            such as cp.loss_scale(trainer); nothing by default
  shard(cp, batch) -> dict, or a list         this rank's part, or its parts
  forward(model, part) -> logits (1, T, V)
  loss(logits, part) -> Tensor                this rank's share: shares add up to the loss
  backward(model, loss)                       of one micro-batch; may reduce gradients over ranks
  reduce(model)                               after the last backward: sums gradients over ranks, unless backward does it
  gradients(model) -> dict                    of every parameter, unsharded, after that
  reference(model, ids) -> logits (1, S, V)   of one document (1, S) in one process
  router_loss(model, router_logits) -> Tensor what one process adds to the mean token loss of a micro-batch, from its tokens'
                                              router_logits, (N, experts) of each layer, in the model's output; by default
                                              transformers' load balancing if output_router_logits asks for it
"""


# if rounding may hide a mistake larger than this fraction of a norm, report how large
_COARSE = 1e-3
# maximum width of text, in columns
_WIDEST = 120


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return 0 if everything is right, otherwise 1."""
    parser = CommandParser("doctor")
    parser.add_argument("target", nargs="?")
    parser.add_argument("--ranks", type=int, default=2)
    for flag in ("--json", "--help", "-h"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args(arguments)
    if options.help or options.h:
        sys.stdout.write(_USAGE)
        return 0
    if options.ranks < 1:
        raise DistattnError(f"doctor: --ranks: must be at least 1, not {options.ranks}.")
    if options.target is not None:
        # import this here: importing torch takes seconds
        from distattn.launch.ranks.machine_limits import DOCTOR_RANK_MB, check_memory

        check_memory(
            "doctor: --ranks", options.ranks, DOCTOR_RANK_MB, "Python, torch and transformers, without the model"
        )
        if Path(options.target).suffix == ".py" and not Path(options.target).is_file():
            raise DistattnError(f"there is no script {options.target}.")
    checks = check_machine()
    broken = [check for check in checks if check.ok is False]
    report: dict[str, Any] = {"checks": [_check_facts(check) for check in checks]}
    if options.target is not None and not broken:
        diagnosis = examine_target(options.target, options.ranks, no_progress if options.json else print_to_stderr)
        report |= {
            "ranks": options.ranks,
            "measured": diagnosis.measured,
            "first_difference": diagnosis.first_difference,
        }
        report |= {"where": diagnosis.where, "not_repeated": diagnosis.not_repeated}
        report |= {"findings": [finding._asdict() for finding in diagnosis.findings]}
        if not options.json:
            _show_diagnosis(diagnosis, options.ranks)
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")
    elif options.target is not None and not broken:
        _summarise_checks(checks)
    else:
        _show_checks(checks)
    return 1 if broken or report.get("findings") else 0


def examine_target(path: str, ranks: int, report_progress: Callable[[str], None] = no_progress) -> Diagnosis:
    """Run a target in one process and on several ranks, and compare the results. Raises DistattnError if it cannot run.

    path: a script or a model. ranks: number of ranks.
    """
    import torch

    from distattn.doctor.diagnosis import diagnose
    from distattn.doctor.target import Target
    from distattn.launch.ranks.local import run_ranks

    target = Target(path)
    target.check_reference()
    with tempfile.TemporaryDirectory() as folder:
        report_progress(f"{path} on {ranks} ranks ...")
        code = run_ranks(ranks, "distattn.doctor.rank_run", path, folder)
        files = [Path(folder, f"rank-{rank}.pt") for rank in range(ranks)]
        if code or not all(file.exists() for file in files):
            raise DistattnError(f"doctor: the ranks failed (exit code {code}); their output is above.")
        # weights_only suffices: distattn wrote these files, with tensors and strings only
        results = [torch.load(file, weights_only=True) for file in files]
    report_progress("the same in one process ...")
    return diagnose(target, results)


def _show_checks(checks: Sequence[Check]) -> None:
    """Print the machine's faults and notes, one per line, and all other checks on one line."""
    console = ResultConsole(highlight=False)
    for check in sorted(checks, key=lambda check: check.ok is not False):
        if check.ok and not check.advice:
            continue
        mark = "[red]wrong[/]" if check.ok is False else "[yellow]note[/]"
        advice = f"; {check.advice}" if check.advice else ""
        _print_prose(console, f"{mark} ", f"{check.name}: {check.state}{advice}.")
    fine = ", ".join(f"{check.name} {check.state}" for check in checks if check.ok and not check.advice)
    _print_prose(console, "machine: ", f"{fine}.")


def _check_facts(check: Check) -> dict[str, Any]:
    return {"name": check.name, "ok": check.ok, "found": check.state, "advice": check.advice}


def _summarise_checks(checks: Sequence[Check]) -> None:
    """Print one sentence about a machine without faults, below the verdict on the target."""
    versions = [f"{check.name} {check.state}" for check in checks if check.name in ("python", "torch")]
    noted = [check.name for check in checks if not check.ok or check.advice]
    others = f" and {len(noted) - 1} more" if len(noted) > 1 else ""
    notes = f"; noteworthy: {noted[0]}{others}" if noted else ""
    sentence = f"{', '.join(versions)}{notes}. distattn doctor without a model, or --json, shows more."
    _print_prose(ResultConsole(highlight=False), "machine: ", sentence)


_MEASURED = {
    "logits": "logits differ by {:.1e} of their norm",
    "rounding": "rounding explains {:.1e}",
    "loss": "the loss is {:.6f} times that of one process",
    "gradient": "the gradient norm {:.6f} times",
}


def _show_diagnosis(diagnosis: Diagnosis, ranks: int) -> None:
    """Print the verdict and the measurements behind it."""
    console = ResultConsole(highlight=False)
    measured = diagnosis.measured
    if not diagnosis.findings:
        sentence = f"{ranks} ranks compute what one process does: logits, loss and every gradient."
        _print_prose(console, "[green]ok[/] ", sentence + _hidden(measured) + _not_repeated(diagnosis.not_repeated))
    for finding in diagnosis.findings:
        _print_prose(console, "[red]wrong[/] ", f"{finding.cause}: {finding.observed}.")
        where = diagnosis.where or diagnosis.first_difference
        if where is not None:
            _print_prose(console, "  first to differ: ", f"{where}.")
        _print_prose(console, "  what to do: ", f"{finding.remedy}.")
    measurements = [sentence.format(measured[name]) for name, sentence in _MEASURED.items() if name in measured]
    if measurements:
        _print_prose(console, "  measured: ", f"{'; '.join(measurements)}.")


def _hidden(measured: Mapping[str, float]) -> str:
    """Return a sentence that says how large a mistake rounding may hide, or "" if that is negligible."""
    forward, backward = measured.get("hidden", 0.0), measured.get("hidden in gradients", 0.0)
    if max(forward, backward) < _COARSE:
        return ""
    return (
        f" In this precision a mistake could hide that changes what a module computes by less than {100 * forward:.2g} %, or a "
        f"gradient by less than {100 * backward:.2g} %: give the doctor the model in float32 to see smaller ones."
    )


def _not_repeated(why: str) -> str:
    """Return a sentence saying that only final results were compared, or "" if the ranks' steps were repeated.

    why: the reason why the steps were not repeated; "" if they were.
    """
    if not why:
        return ""
    reason = why.splitlines()[0].rstrip(".")
    return (
        f" The ranks' steps could not be repeated module by module ({reason}): only logits and gradients were compared."
    )


def _print_prose(console: Console, label: str, sentence: str) -> None:
    """Print a sentence after its label, wrapped to the terminal's width, with later lines indented by the label's width."""
    from rich.markup import escape, render

    indent = " " * len(render(label).plain)
    width = min(console.width, _WIDEST)
    lines = textwrap.wrap(
        indent + sentence, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    text = "\n".join(lines)[len(indent) :]
    console.print(label + escape(text), soft_wrap=True)
