"""What the doctor looks at before it compares numbers: did ranks run at all, on the same inputs, with finite results?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from distattn.doctor.comparison import Finding, RankResult
from distattn.doctor.rank_run import ReferenceResult

_SAME_ON_ALL_RANKS = (
    ("batch", "batches differ", "give all ranks of the group the same batch; shard takes this rank's part of it"),
    ("weights", "weights differ", "seed before the model is made, or broadcast its weights from one rank"),
)
# what the error of a rank says that ended because another one had
_LOST_PEER = ("stopped answering", "Connection", "gloo", "NCCL", "timed out", "Broken pipe")


def check_run(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    """Find the first thing for which results of ranks cannot be compared with one process, None where they can."""
    for check in _CHECKS:
        if finding := check(reference, ranks):
            return finding
    return None


def check_finite(reference: ReferenceResult, ranks: Sequence[RankResult]) -> tuple[str | None, Finding] | None:
    """Find what is infinite or not a number on a rank and finite in one process: the module's name, if it is one's."""
    remedy = (
        "look at the first module or parameter named; an overflow, a division by zero, or memory that was not filled"
    )
    for module, observed in _not_finite(reference, ranks):
        return module, Finding("not finite", observed, remedy)
    return None


def _not_finite(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Iterator[tuple[str | None, str]]:
    for rank, found in enumerate(ranks):
        tokens = len(found["tokens"])
        for name, output in found["outputs"].items():
            finite_there = torch.isfinite(reference.outputs[name]).all() if name in reference.outputs else True
            if finite_there and not torch.isfinite(output[:tokens]).all():
                yield name, f"{name} is not finite on rank {rank}"
        for what, value in {"logits": found["logits"][:tokens], "loss": found["loss"]}.items():
            if not torch.isfinite(value).all():
                yield None, f"the {what} of rank {rank} is not finite"
        for name, gradient in found["gradients"].items():
            finite_there = torch.isfinite(reference.gradients.get(name, torch.zeros(1))).all()
            if finite_there and not torch.isfinite(gradient).all():
                yield None, f"the gradient of {name} is not finite on rank {rank}"


def _different_inputs(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    for what, cause, remedy in _SAME_ON_ALL_RANKS:
        # a rank that failed early has not got so far
        if any(what not in found for found in ranks):
            continue
        odd = [rank for rank, found in enumerate(ranks) if found[what] != ranks[0][what]]
        if odd:
            return Finding(cause, f"rank {odd[0]} has another {what} than rank 0", remedy)
    return None


def _stopped_rank(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
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
    return any(phrase in message for phrase in _LOST_PEER)


def _kept_padding(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    text, computed = len(reference.rows.ids_N), sum(len(found["tokens"]) for found in ranks)
    if computed == text:
        return None
    observed = f"{computed} tokens are computed, {text} of them are text and the others padding"
    return Finding("padding kept", observed, "give attention_mask to ContextParallel.shard, which leaves padding out")


def _misplaced_tokens_or_randomness(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    for rank, found in enumerate(ranks):
        expected = reference.rows.ids_N[found["tokens"]]
        own = found.get("input_ids", expected[None]).flatten()[: len(expected)]
        if len(own) != len(expected) or not torch.equal(own, expected.cpu()):
            observed = f"rank {rank} has not the tokens that its plan's layout gives it"
            remedy = "shard with ContextParallel.shard, or Layout.shard of the same layout"
            return Finding("tokens misplaced", observed, remedy)
        if found["random"] > 0:
            observed = f"the same batch gives other logits the second time (by {found['random']:.2g} on rank {rank})"
            remedy = "set dropout to 0, or call model.eval(), in the script for the doctor"
            return Finding("random numbers", observed, remedy)
    return None


_Check = Callable[[ReferenceResult, Sequence[RankResult]], Finding | None]
# in this order: a later one takes for granted what an earlier one looks at
_CHECKS: tuple[_Check, ...] = (_different_inputs, _stopped_rank, _kept_padding, _misplaced_tokens_or_randomness)
