"""What the doctor looks at before it compares numbers: did ranks run at all, on the same inputs, with finite results?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from distattn.doctor.comparison import Finding, RankResult, parts_of
from distattn.doctor.reference import ReferenceResult
from distattn.supervision.culprits import tells_of_lost_peer

_SAME_START = "seed before the model is made, or broadcast its weights and buffers from one rank"


def check_inputs(ranks: Sequence[RankResult]) -> Finding | None:
    """Find what ranks do not have in common, or why one of them stopped; None where their results can be compared."""
    # a rank that failed early has not got so far
    if all("batch" in found for found in ranks):
        for finding in _different_inputs(ranks):
            return finding
    return _stopped_rank(ranks)


def check_run(reference: ReferenceResult, ranks: Sequence[RankResult]) -> tuple[str | None, list[Finding]] | None:
    """Find the first thing for which results of ranks cannot be compared with one process, None where they can."""
    finding = _other_tokens(reference, ranks) or _misplaced_tokens(reference, ranks) or _random_numbers(ranks)
    return (None, [finding]) if finding else None


def check_finite(reference: ReferenceResult, ranks: Sequence[RankResult]) -> tuple[str | None, list[Finding]] | None:
    """Find what is infinite or not a number on a rank and finite in one process: the module's name, if it is one's."""
    remedy = (
        "look at the first module or parameter named; an overflow, a division by zero, or memory that was not filled"
    )
    for module, observed in _not_finite(reference, ranks):
        return module, [Finding("not finite", observed, remedy)]
    return None


def check_state(ranks: Sequence[RankResult]) -> Finding | None:
    """Find a buffer that the step left otherwise on one rank than on another."""
    for name, first in ranks[0]["buffers_after"].items():
        odd = [rank for rank, found in enumerate(ranks) if found["buffers_after"].get(name) != first]
        if odd:
            observed = f"the step leaves the buffer {name} otherwise on rank {odd[0]} than on rank 0"
            remedy = "what counts tokens, such as statistics or a router's bias, has to be summed over ranks"
            return Finding("buffer not synchronised", observed, remedy)
    return None


def _not_finite(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Iterator[tuple[str | None, str]]:
    for rank, found in parts_of(ranks):
        tokens = len(found["tokens"])
        for name, output in found["outputs"].items():
            # a mask may be infinite
            if name not in reference.outputs or not torch.isfinite(reference.outputs[name]).all():
                continue
            if not torch.isfinite(output.movedim(reference.token_dims[name], 0)[:tokens]).all():
                yield name, f"{name} is not finite on rank {rank}"
        for what, value in {"logits": found["logits"][:tokens], "loss": found["loss"]}.items():
            if not torch.isfinite(value).all():
                yield None, f"the {what} of rank {rank} is not finite"
    for rank, result in enumerate(ranks):
        for name, gradient in result["gradients"].items():
            finite_there = torch.isfinite(reference.gradients.get(name, torch.zeros(1))).all()
            if finite_there and not torch.isfinite(gradient).all():
                yield None, f"the gradient of {name} is not finite on rank {rank}"


def _different_inputs(ranks: Sequence[RankResult]) -> Iterator[Finding]:
    first = ranks[0]
    for rank, found in enumerate(ranks):
        if found["batch"] != first["batch"]:
            remedy = "give all ranks of the group the same batch; shard takes this rank's part of it"
            yield Finding("batches differ", f"rank {rank} has another batch than rank 0", remedy)
        odd = [name for name in found["weights"] if found["weights"][name] != first["weights"].get(name)]
        if odd and odd[0] not in found["buffers"]:
            others = f" and {len(odd) - 1} others" if len(odd) > 1 else ""
            yield Finding("weights differ", f"rank {rank} has another {odd[0]}{others} than rank 0", _SAME_START)
        for name, buffer in found["buffers"].items():
            if name not in first["buffers"] or not torch.equal(buffer, first["buffers"][name]):
                yield Finding("buffers differ", f"rank {rank} has another {name} than rank 0", _SAME_START)


def _stopped_rank(ranks: Sequence[RankResult]) -> Finding | None:
    stopped = [rank for rank, found in enumerate(ranks) if {"refusal", "failure"} & found.keys()]
    if not stopped:
        return None
    # the others lose their connection to the first one
    rank = min(stopped, key=lambda rank: (_lost_its_peer(ranks[rank]), ranks[rank]["at"]))
    if "refusal" in ranks[rank]:
        return Finding("refused", f"rank {rank}: {ranks[rank]['refusal'].rstrip('.')}", "do what the sentence says")
    return Finding("failed", f"rank {rank}: {ranks[rank]['failure'].rstrip('.')}", "mend the error where it says")


def _lost_its_peer(found: RankResult) -> bool:
    message = found.get("refusal", "") + found.get("failure", "")
    return tells_of_lost_peer(message)


def _other_tokens(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    text, computed = len(reference.ids_N), sum(len(part["tokens"]) for _, part in parts_of(ranks))
    if computed == text:
        return None
    if computed < text:
        observed = f"the batch has {text} tokens, the ranks compute {computed}"
        return Finding("tokens dropped", observed, "give shard the batch as it is; every token is on some rank")
    observed = f"{computed} tokens are computed, {text} of them are text and the others padding"
    return Finding("padding kept", observed, "give attention_mask to ContextParallel.shard, which leaves padding out")


def _misplaced_tokens(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    for rank, part in parts_of(ranks):
        expected = reference.ids_N[part["tokens"]].cpu()
        own = part.get("input_ids", expected[None]).flatten()[: len(expected)]
        if len(own) != len(expected) or not torch.equal(own, expected):
            observed = f"rank {rank} has not the tokens that its plan's layout gives it"
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
            observed = (
                f"{dropout} is on on rank {rank}: whatever its seed, ranks drop other numbers than one process does"
            )
            return Finding("dropout on", observed, remedy)
    return None
