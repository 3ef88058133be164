"""`distattn doctor`: is this machine ready, and does a model compute on several ranks what it computes on one?"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distattn.doctor.environment import Check, check_machine
from distattn.ir.errors import DistattnError
from distattn.launch.command_line import CommandParser, ResultConsole, no_progress, print_line
from distattn.launch.ranks.machine_limits import DOCTOR_RANK_MB, check_memory

if TYPE_CHECKING:
    from distattn.doctor.comparison import Diagnosis

_USAGE = """usage: distattn doctor [SCRIPT.py | MODEL] [--ranks N] [--json]

Looks at versions, devices, NCCL, Triton and ports; then runs a model and a batch in one process and on N ranks (default 2)
of this machine, and compares logits, loss and every gradient. Where they differ it says where first, and which mistake
explains it. MODEL is a folder or config.json of transformers; SCRIPT says what you do yourself:

"""


# of a norm: what rounding explains beyond it hides mistakes
_COARSE = 0.3


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns 0 where all is well, 1 where something is not."""
    parser = CommandParser("doctor")
    parser.add_argument("target", nargs="?")
    parser.add_argument("--ranks", type=int, default=2)
    for flag in ("--json", "--help", "-h"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args(arguments)
    if given.help or given.h:
        from distattn.doctor.target import SCRIPT

        sys.stdout.write(_USAGE + SCRIPT)
        return 0
    if given.ranks < 1:
        raise DistattnError(f"doctor: --ranks: at least 1, not {given.ranks}.")
    if given.target is not None:
        check_memory(
            "doctor: --ranks", given.ranks, DOCTOR_RANK_MB, "Python, torch and transformers, without the model"
        )
        if Path(given.target).suffix == ".py" and not Path(given.target).is_file():
            raise DistattnError(f"there is no script {given.target}.")
    found = check_machine()
    if not given.json:
        _show_checks(found)
    broken = [check for check in found if check.ok is False]
    report: dict[str, Any] = {"checks": [check._asdict() for check in found]}
    if given.target is not None and not broken:
        diagnosis = examine_target(given.target, given.ranks, no_progress if given.json else print_line)
        report |= {"ranks": given.ranks, "measured": diagnosis.measured, "first_difference": diagnosis.first_difference}
        report["findings"] = [finding._asdict() for finding in diagnosis.findings]
        if not given.json:
            _show_diagnosis(diagnosis, given.ranks)
    if given.json:
        sys.stdout.write(json.dumps(report) + "\n")
    return 1 if broken or report.get("findings") else 0


def examine_target(path: str, ranks: int, report_progress: Callable[[str], None] = no_progress) -> Diagnosis:
    """Run the target in one process and on ranks, and compare. Raises DistattnError where it cannot be run at all."""
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
            raise DistattnError(f"doctor: the ranks did not end well (exit code {code}); what they said is above.")
        # our own files, of plain tensors and words
        found = [torch.load(file, weights_only=True) for file in files]
    report_progress("the same in one process ...")
    return diagnose(target, found)


def _show_checks(found: list[Check]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    marks = {True: "[green]ok[/]", False: "[red]wrong[/]", None: "note"}
    for check in found:
        table.add_row(marks[check.ok], check.name, check.found, check.advice)
    ResultConsole().print(table)


def _show_diagnosis(diagnosis: Diagnosis, ranks: int) -> None:
    from rich.markup import escape

    console = ResultConsole(highlight=False)
    sentences = {
        "logits": "relative difference of logits {:.1e}",
        "rounding": "rounding explains differences of {:.1e}",
        "loss": "loss {:.6f} times that of one process",
        "gradient": "gradient norm {:.6f} times that of one process",
    }
    for name, value in diagnosis.measured.items():
        console.print("  " + sentences[name].format(value))
    if diagnosis.measured.get("rounding", 0.0) > _COARSE:
        console.print(
            "[yellow]note[/] rounding alone moves this model's results as far as a mistake would: give the doctor the model in "
            "float32, or fewer layers of it."
        )
    if not diagnosis.findings:
        console.print(f"[green]ok[/] {ranks} ranks compute what one process does: logits, loss and every gradient.")
    for finding in diagnosis.findings:
        console.print(f"[red]wrong[/] {finding.cause}: {escape(finding.observed)}.")
        if diagnosis.first_difference is not None:
            console.print(f"  first to differ: {diagnosis.first_difference}")
        console.print(f"  what to do: {escape(finding.remedy)}.")
