"""Tables of speeds and a verdict in words on the first hour, made from the findings of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import exp, log
from typing import Any, NamedTuple

# the table's columns, and the contestants of gpu.py of which each column shows the fastest
TIERS = {name: (f"distattn {name}",) for name in ("triton", "gluon", "gluon_split", "flash")}
OTHERS = {
    # PyTorch's own implementations are also FlashAttention 2
    "FA2": ("flash attention 2", "varlen flash", "sdpa flash"),
    "FA3": ("flash attention 3",),
    "Flex": ("flex compiled",),
    "cuDNN": ("sdpa cudnn",),
}
# trials of "auto" time forward and backward only a few times, so choosing a kernel that is slower by less than this
# factor is not a fault
CHOICE = 1.1
SHOWN = 5


class Outcome(NamedTuple):
    """A part's findings, why it failed ("" if it did not), and why it was left out ("" if it was not)."""

    name: str
    findings: list[dict[str, Any]]
    failed: str = ""
    left_out: str = ""


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format TFLOP/s by case, also as a fraction of the fastest. Return an empty string if nothing was timed."""
    cases = by_case(rows)
    columns = {**TIERS, **OTHERS}
    best = {
        case: {
            name: max((cells[c]["tflops"] for c in names if c in cells), default=0.0) for name, names in columns.items()
        }
        for case, cells in cases.items()
    }
    if not best:
        return ""
    there = [name for name in columns if any(figures[name] for figures in best.values())]
    width = max(map(len, best))
    head = "".join(f"{name:>13s}" for name in there)
    lines = ["TFLOP/s, and the share of the fastest in the line", f"{'':{width}s}{head}   auto"]
    for case, figures in best.items():
        fastest = max(figures.values())
        shown = (f"{figures[name]:.0f} {figures[name] / fastest:.2f}" if figures[name] else "-" for name in there)
        lines.append(
            f"{case:{width}s}{''.join(f'{text:>13s}' for text in shown)}   {chosen(cases[case]) or 'none of these'}"
        )
    for name in columns:
        if name not in there:
            reasons = (row["text"] for row in rows if row["kind"] == "speed" and row["contestant"] in columns[name])
            lines.append(f"without {name}: {next(reasons, 'it took no part')}")
    return "\n".join(lines)


def time_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the milliseconds of recurrences, for each task and kernel. Return an empty string if nothing was timed."""
    timed = [row for row in rows if row["kind"] == "time" and row["seconds"]]
    kernels = list(dict.fromkeys(row["contestant"] for row in timed))
    width = max((len(row["what"]) for row in timed), default=0)
    lines = ["ms of recurrences", f"{'':{width}s}" + "".join(f"{name:>12s}" for name in kernels)]
    for case in dict.fromkeys(row["what"] for row in timed):
        numbers = {row["contestant"]: f"{row['seconds'] * 1e3:.2f}" for row in timed if row["what"] == case}
        lines.append(f"{case:{width}s}" + "".join(f"{numbers.get(name, '-'):>12s}" for name in kernels))
    return "\n".join(lines) if timed else ""


def by_case(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the timed rows, keyed by case and contestant."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "speed" and row["seconds"]:
            cases.setdefault(row["what"], {})[row["contestant"]] = row
    return cases


def chosen(cells: dict[str, dict[str, Any]]) -> str:
    """Return the tier that "auto" chose in a case, or an empty string."""
    return next((name.removeprefix("distattn ") for name, cell in cells.items() if cell["auto"]), "")


def verdict(outcomes: Sequence[Outcome], without: str) -> tuple[str, bool]:
    """Return (the verdict in words, whether everything is right). without: a sentence saying what could not be shown on
    this machine."""
    rows = [row for outcome in outcomes for row in outcome.findings]
    planted, checks = ([row for row in rows if row["kind"] == kind] for kind in ("planted", "check"))
    missed, wrong = [row for row in planted if not row["text"]], [row for row in checks if row["text"]]
    failed = [outcome for outcome in outcomes if outcome.failed]
    slow = [] if without else slow_choices(rows)
    bad = bool(missed or wrong or failed)
    lines = [f"Verdict: {'NOT right' if bad else 'right' if checks else 'nothing was looked at'}.", without]
    if missed:
        lines.append(
            f"{len(missed)} of {len(planted)} planted faults were NOT found: a check that does not find them shows nothing."
        )
    elif planted:
        lines.append(f"All {len(planted)} planted faults were found.")
    else:
        lines.append("No fault was planted: that the checks find nothing shows little.")
    lines.append(f"{len(checks) - len(wrong)} of {len(checks)} checks are right.")
    lines += [f"The part {outcome.name} failed: {outcome.failed}." for outcome in failed]
    left = [(row["what"], row["text"]) for row in rows if row["kind"] == "left out"]
    left += [(outcome.name, outcome.left_out) for outcome in outcomes if outcome.left_out]
    # group omissions by reason
    for why in dict.fromkeys(why for _, why in left):
        lines.append(f"Left out ({why}): {', '.join(label for label, reason in left if reason == why)}.")
    lines.append("" if without else speed_sentence(by_case(rows)))
    send = [f"planted, not found: {row['what']}" for row in missed]
    send += [f"{row['what']}: {row['text'][:300]}" for row in wrong]
    send += [f"{outcome.name}: {outcome.failed}" for outcome in failed] + slow
    if send:
        lines.append(f"{len(send)} thing{'s' * (len(send) > 1)} to send back:")
        lines += [f"  {number + 1}. {text}" for number, text in enumerate(send[:SHOWN])]
        lines += [f"  and {len(send) - SHOWN} more"] * (len(send) > SHOWN)
    else:
        lines.append("Nothing has to be sent back.")
    return "\n".join(line for line in lines if line), not bad and bool(checks)


def speed_sentence(cases: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a sentence saying what "auto" chooses, how fast that is, and how it compares with the fastest other kernel."""
    choices = Counter(filter(None, (chosen(cells) for cells in cases.values())))
    if not choices:
        return "Nothing about speed was measured."
    taken = ", ".join(f"{name} in {count} of {len(cases)} cases" for name, count in choices.most_common())
    parts = []
    for direction in ("forward", "backward"):
        figures, ratios = [], []
        for case, cells in cases.items():
            chosen_speed = next((cell["tflops"] for cell in cells.values() if cell["auto"]), None)
            if chosen_speed and case.startswith(direction):
                figures.append(chosen_speed)
                others = [cells[name]["tflops"] for names in OTHERS.values() for name in names if name in cells]
                ratios += [chosen_speed / max(others)] if others else []
        if figures:
            beside = f", {exp(sum(map(log, ratios)) / len(ratios)):.2f}x of the fastest other" if ratios else ""
            parts.append(f"{direction} up to {max(figures):.0f} TFLOP/s{beside}")
    return f"auto chooses {taken}: {'; '.join(parts)} (geometric mean)."


def slow_choices(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a message for each case in which a tier other than the choice of "auto" is faster, forward plus backward."""
    cases, problems = by_case(rows), []
    for case, forward in cases.items():
        direction, _, name = case.partition(" ")
        backward = cases.get(f"backward {name}", {})
        if direction != "forward" or not (auto := chosen(forward)):
            continue
        # "auto" chooses gluon_split only in deterministic mode
        seconds = {
            tier: forward[key]["seconds"] + backward[key]["seconds"]
            for tier, (key,) in TIERS.items()
            if tier != "gluon_split" and key in forward and key in backward
        }
        fastest = min(seconds, key=lambda tier: seconds[tier], default="")
        if auto in seconds and seconds[auto] > CHOICE * seconds[fastest]:
            problems.append(
                f"auto chose {auto} in {name}, where {fastest} is {seconds[auto] / seconds[fastest]:.2f}x as fast"
            )
    return problems
