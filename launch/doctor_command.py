"""`distattn doctor`: is this machine ready, and does a model compute on several ranks what it computes on one?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distattn.doctor.environment import Check, checks
from distattn.ir.errors import DistattnError
from distattn.launch.machine_limits import DOCTOR_RANK_MB, check_memory

if TYPE_CHECKING:
    from distattn.doctor.diagnosis import Diagnosis
    from distattn.doctor.hypotheses import Imagined
    from distattn.doctor.target import Subject

_USAGE = """usage: distattn doctor [SCRIPT.py | MODEL] [--ranks N] [--json]

Looks at versions, devices, NCCL, Triton and ports; then runs a model and a batch in one process and on N ranks (default 2)
of this machine, and compares logits, loss and every gradient. Where they differ it says where first, and which mistake
explains it. MODEL is a folder or config.json of transformers; SCRIPT says what you do yourself:

"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise DistattnError(f"doctor: {message}. See distattn doctor --help.")


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns 0 where all is well, 1 where something is not."""
    parser = _Parser(add_help=False, allow_abbrev=False)
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
    found = checks()
    if not given.json:
        _show_checks(found)
    broken = [check for check in found if check.fine is False]
    report: dict[str, Any] = {"checks": [check._asdict() for check in found]}
    if given.target is not None and not broken:
        diagnosis = examine(given.target, given.ranks, quiet=given.json)
        report |= {"ranks": given.ranks, "measured": diagnosis.measured, "first_difference": diagnosis.first_difference}
        report["findings"] = [finding._asdict() for finding in diagnosis.findings]
        if not given.json:
            _show(diagnosis, given.ranks)
    if given.json:
        sys.stdout.write(json.dumps(report) + "\n")
    return 1 if broken or report.get("findings") else 0


def examine(target: str, ranks: int, quiet: bool = True) -> Diagnosis:
    """Run the subject in one process and on ranks, and compare. Raises DistattnError where it cannot be run at all."""
    import torch

    from distattn.doctor.target import Subject
    from distattn.launch.local import run_ranks

    def say(line: str) -> None:
        if not quiet:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    subject = Subject(target)
    with tempfile.TemporaryDirectory() as folder:
        say(f"{target} on {ranks} ranks ...")
        code = run_ranks(ranks, "distattn.doctor.rank_run", target, folder)
        files = [Path(folder, f"rank-{rank}.pt") for rank in range(ranks)]
        if code or not all(file.exists() for file in files):
            raise DistattnError(f"doctor: the ranks did not end well (exit code {code}); what they said is above.")
        # our own files, of plain tensors and words
        found = [torch.load(file) for file in files]
    say("the same in one process ...")
    return compare(subject, found)


def compare(subject: Subject, found: Sequence[dict[str, Any]]) -> Diagnosis:
    """What ranks found (see `evidence.examine`) with the same in this process."""
    import torch

    from distattn.doctor.diagnosis import diagnose
    from distattn.doctor.rank_run import truth_of
    from distattn.doctor.target import said

    try:
        model = subject.model()
    except DistattnError:
        raise
    except Exception as error:
        raise DistattnError(
            f"doctor: model() fails in one process, without torch.distributed: {said(error)}. There it returns a plain module."
        ) from None
    if "state" in found[0]:
        try:
            model.load_state_dict(found[0]["state"])
        except RuntimeError as error:
            raise DistattnError(
                f"doctor: the ranks' weights do not fit model() in one process ({str(error).splitlines()[0]}); there it has to "
                "return the plain module, and parameters that are partitioned (ZeRO stage 3) cannot be compared."
            ) from None

    def imagine(positions_N: torch.Tensor, imagined: Imagined) -> torch.Tensor:
        ids = truth.rows.ids_N[None]
        given = {"input_ids": ids, "position_ids": positions_N[None], "context_parallel": imagined}
        with torch.no_grad():
            return subject.plain_forward(model, given)[0].cpu()

    try:
        truth = truth_of(subject, model)
    except DistattnError:
        raise
    except Exception as error:
        raise DistattnError(f"doctor: the model cannot be run in one process: {said(error)}.") from None
    return diagnose(truth, found, imagine if hasattr(model, "set_attn_implementation") else None)


def _show_checks(found: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    marks = {True: "[green]ok[/]", False: "[red]wrong[/]", None: "note"}
    for check in found:
        table.add_row(marks[check.fine], check.name, check.found, check.advice)
    Console().print(table)


def _show(diagnosis: Diagnosis, ranks: int) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    said = {
        "logits": "largest relative difference of logits {:.1e}",
        "loss": "loss {:.6f} times that of one process",
        "gradient": "gradient norm {:.6f} times that of one process",
    }
    for name, value in diagnosis.measured.items():
        console.print("  " + said[name].format(value))
    if not diagnosis.findings:
        console.print(f"[green]ok[/] {ranks} ranks compute what one process does: logits, loss and every gradient.")
    for finding in diagnosis.findings:
        console.print(f"[red]wrong[/] {finding.cause}: {escape(finding.seen)}.")
        if diagnosis.first_difference is not None:
            console.print(f"  first to differ: {diagnosis.first_difference}")
        console.print(f"  what to do: {escape(finding.remedy)}.")
