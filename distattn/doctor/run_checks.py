"""Check, before the doctor compares numbers, that all ranks ran on the same inputs and have finite results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from distattn.doctor.comparison import Finding, RankResult, parts_of
from distattn.doctor.reference import ReferenceResult

_SAME_START = "seed before the model is made, or broadcast its weights and buffers from one rank"


def check_inputs(ranks: Sequence[RankResult]) -> Finding | None:
    """Find inputs that differ between ranks, or the reason why a rank stopped. Return None if all ranks ran on equal inputs."""
    # a rank that failed early has not recorded its inputs
    if all("batch" in result for result in ranks):
        for finding in _different_inputs(ranks):
            return finding
    return _stopped_rank(ranks)


def check_run(reference: ReferenceResult, ranks: Sequence[RankResult]) -> tuple[str | None, list[Finding]] | None:
    """Find the first reason why the ranks' results cannot be compared with the reference. Return None if they can be compared."""
    finding = _other_tokens(reference, ranks) or _misplaced_tokens(reference, ranks) or _random_numbers(ranks)
    return (None, [finding]) if finding else None


def check_finite(reference: ReferenceResult, ranks: Sequence[RankResult]) -> tuple[str | None, list[Finding]] | None:
    """Find a value that is finite in one process but not on a rank. Return the module (None for other values) and the finding."""
    remedy = (
        "look at the first module or parameter named; an overflow, a division by zero, or memory that was not filled"
    )
    for module, observed in _not_finite(reference, ranks):
        return module, [Finding("not finite", observed, remedy)]
    return None


def check_state(ranks: Sequence[RankResult]) -> Finding | None:
    """Find a buffer that differs between ranks after the step. Return None if no buffer differs."""
    for name, first in ranks[0]["buffers_after"].items():
        odd = [rank for rank, result in enumerate(ranks) if result["buffers_after"].get(name) != first]
        if odd:
            observed = f"after the step the buffer {name} differs between rank {odd[0]} and rank 0"
            remedy = "sum counts of tokens, such as statistics or a router's bias, over ranks"
            return Finding("buffer not synchronised", observed, remedy)
    return None


def _not_finite(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Iterator[tuple[str | None, str]]:
    for rank, part in parts_of(ranks):
        tokens = len(part["tokens"])
        for name, output in part["outputs"].items():
            # values such as masks may also be infinite in one process
            if name not in reference.outputs or not torch.isfinite(reference.outputs[name]).all():
                continue
            if not torch.isfinite(output.movedim(reference.token_dims[name], 0)[:tokens]).all():
                yield name, f"{name} is not finite on rank {rank}"
        for name, value in {"logits": part["logits"][:tokens], "loss": part["loss"]}.items():
            if not torch.isfinite(value).all():
                yield None, f"the {name} of rank {rank} is not finite"
    for rank, result in enumerate(ranks):
        for name, gradient in result["gradients"].items():
            finite_there = torch.isfinite(reference.gradients.get(name, torch.zeros(1))).all()
            if finite_there and not torch.isfinite(gradient).all():
                yield None, f"the gradient of {name} is not finite on rank {rank}"


def _different_inputs(ranks: Sequence[RankResult]) -> Iterator[Finding]:
    first = ranks[0]
    for rank, result in enumerate(ranks):
        if result["batch"] != first["batch"]:
            remedy = "pass the same batch to all ranks of the group; shard takes this rank's part of it"
            yield Finding("batches differ", f"rank {rank} has another batch than rank 0", remedy)
        odd = [name for name in result["weights"] if result["weights"][name] != first["weights"].get(name)]
        if odd and odd[0] not in result["buffers"]:
            others = f" and {len(odd) - 1} others" if len(odd) > 1 else ""
            yield Finding("weights differ", f"rank {rank} has another {odd[0]}{others} than rank 0", _SAME_START)
        for name, buffer in result["buffers"].items():
            if name not in first["buffers"] or not torch.equal(buffer, first["buffers"][name]):
                yield Finding("buffers differ", f"rank {rank} has another {name} than rank 0", _SAME_START)


def _stopped_rank(ranks: Sequence[RankResult]) -> Finding | None:
    stopped = [rank for rank, result in enumerate(ranks) if {"refusal", "failure"} & result.keys()]
    if not stopped:
        return None
    # blame the rank that stopped first: the others may have lost their connection to it
    rank = min(stopped, key=lambda rank: (ranks[rank]["lost_peer"], ranks[rank]["at"]))
    if "refusal" in ranks[rank]:
        return Finding("refused", f"rank {rank}: {ranks[rank]['refusal'].rstrip('.')}", "do what this error says")
    return Finding(
        "failed", f"rank {rank}: {ranks[rank]['failure'].rstrip('.')}", "fix the error at the line that it names"
    )


def _other_tokens(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    text, computed = len(reference.ids_N), sum(len(part["tokens"]) for _, part in parts_of(ranks))
    if computed == text:
        return None
    if computed < text:
        observed = f"the batch has {text} tokens, the ranks compute {computed}"
        return Finding("tokens dropped", observed, "pass the unchanged batch to shard; every token is on some rank")
    observed = f"{computed} tokens are computed, {text} of them are text and the others padding"
    return Finding("padding kept", observed, "pass attention_mask to ContextParallel.shard, which leaves padding out")


def _misplaced_tokens(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    for rank, part in parts_of(ranks):
        expected = reference.ids_N[part["tokens"]].cpu()
        rank_ids = part.get("input_ids", expected[None]).flatten()[: len(expected)]
        if len(rank_ids) != len(expected) or not torch.equal(rank_ids, expected):
            observed = f"rank {rank} does not have the tokens of its plan's layout"
            remedy = "shard with ContextParallel.shard, or Layout.shard of the same layout"
            return Finding("tokens misplaced", observed, remedy)
    return None


def _random_numbers(ranks: Sequence[RankResult]) -> Finding | None:
    remedy = "set dropout to 0, or call model.eval(), in the script for the doctor"
    for rank, part in parts_of(ranks):
        dropout = ranks[rank]["dropout"]
        if part["random"] > 0:
            observed = f"the same batch gives other logits the second time (by {part['random']:.2g} on rank {rank})"
            if dropout is not None:
                return Finding("dropout on", f"{observed}: {dropout} is on", remedy)
            return Finding("random numbers", observed, remedy)
        if dropout is not None:
            observed = f"{dropout} is on on rank {rank}: with any seed, ranks drop other numbers than one process does"
            return Finding("dropout on", observed, remedy)
    return None
