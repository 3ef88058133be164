"""Show a pack plan as numbers and as a table, for the commands that make or show plans."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from distattn.data.packing.pack_plan import PackPlan, PlannedSource
from distattn.launch.command_line import ResultConsole

_WIDTH = 140


def plan_facts(plan: PackPlan) -> dict[str, Any]:
    """Return the facts of a plan as JSON values."""
    corpora = [
        {
            **asdict(source),
            "epochs": source.epochs,
            "share": _share(plan, source),
            "epochs_of_window": _epochs_of_window(plan, source),
        }
        for source in plan.sources
    ]
    return {
        "plan": plan.path,
        "digest": plan.digest,
        "seed": plan.seed,
        "steps": plan.steps,
        "full_steps": plan.full_steps,
        "packs": plan.packs,
        "pieces": plan.pieces,
        "tokens": plan.tokens,
        "filled": filled(plan),
        "longest_wait": plan.longest_wait,
        "rule": plan.rule.as_dict(),
        # the time of a pack filled by one document, or None if no device was named
        "full_pack_seconds": [plan.rule.cost.seconds(tokens) or None for tokens in _context_lengths(plan)],
        "corpora": corpora,
    }


def print_plan(plan: PackPlan) -> None:
    """Print a table of the corpora, followed by lines about packs."""
    table = Table(box=None, pad_edge=False)
    for name in ("corpus", "documents", "tokens", "weight", "share", "epochs", "planned tokens", "last step"):
        table.add_column(name, justify="left" if name == "corpus" else "right", no_wrap=True)
    total = sum(source.weight for source in plan.sources)
    for source in plan.sources:
        empty = f" ({source.empty_documents:,} empty)" if source.empty_documents else ""
        numbers = (
            f"{source.documents:,}{empty}",
            f"{source.tokens:,}",
            f"{source.weight / total:.1%}",
            f"{_share(plan, source):.1%}",
            f"{source.epochs:.2f}",
            f"{source.planned_tokens:,}",
            "never" if source.last_step < 0 else f"{source.last_step:,}",
        )
        table.add_row(escape(source.name), *numbers)
    console = ResultConsole(highlight=False, width=max(_WIDTH, *(len(source.name) + 100 for source in plan.sources)))
    console.print(table)
    lengths = _context_lengths(plan)
    console.print(
        f"{plan.steps:,} steps of {plan.rule.tokens_per_step:,} tokens, {filled(plan):.2%} filled; {plan.packs:,} packs of "
        f"{', '.join(f'{tokens:,}' for tokens in lengths)} tokens, {plan.pieces / plan.packs:.1f} documents or pieces each; "
        f"digest {plan.digest}",
        soft_wrap=True,
    )
    if plan.rule.cost.cell_femtoseconds:
        seconds = ", ".join(f"{plan.rule.cost.seconds(tokens):.3g}" for tokens in lengths)
        console.print(
            f"a pack that one document fills: {seconds} s of a training step on one device (estimated)", soft_wrap=True
        )
    mixed = [(source.name, epochs) for source in plan.sources if (epochs := _epochs_of_window(plan, source)) > 1]
    if mixed:
        console.print(
            f"a window of {plan.rule.window:,} packs is "
            f"{' and '.join(f'{epochs:.1f} epochs of {name}' for name, epochs in mixed)}, whose documents are mixed in it; "
            "a smaller rule.window keeps epochs apart",
            markup=False,
            soft_wrap=True,
        )
    if plan.full_steps < plan.steps:
        packs = len(plan.step(plan.full_steps).packs)
        console.print(
            f"The last step has only {packs:,} of {plan.rule.packs_at(plan.full_steps):,} packs, the rest of the corpora; "
            f"with more than {packs:,} data-parallel shares it has to be left out (PackLoader(..., drop_last=True)).",
            soft_wrap=True,
        )


def filled(plan: PackPlan) -> float:
    """Return the planned tokens as a fraction of the capacity of all steps."""
    return plan.tokens / (plan.steps * plan.rule.tokens_per_step)


def _context_lengths(plan: PackPlan) -> list[int]:
    """Return the context lengths of the plan, in tokens, ascending. A plan may end before it reaches all lengths of its rule."""
    return sorted({tokens for first, tokens in plan.rule.context if first < plan.steps})


def _share(plan: PackPlan, source: PlannedSource) -> float:
    return source.planned_tokens / plan.tokens


def _epochs_of_window(plan: PackPlan, source: PlannedSource) -> float:
    """Return how many epochs of a corpus the plan's largest window contains. Packs are shuffled within a window."""
    return plan.rule.window * _context_lengths(plan)[-1] * _share(plan, source) / source.tokens
