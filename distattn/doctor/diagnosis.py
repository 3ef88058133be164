"""What `distattn doctor` makes of its evidence: what differs from one process, where first, and which mistake explains it.

A mistake is named when imagining it reproduces what the ranks computed, not because it is usual.
"""

# N tokens on the axis, T tokens on this rank, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.doctor.hypotheses import ASKED, Imagined, causal, each_rank_alone, one_document, same_document
from distattn.doctor.rank_run import Truth, cross_entropy

# largest relative differences by dtype; transformers computes norms in fp32
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_COARSE = 0.05
# positions (N,), attention in one process -> logits (N, V)
Imagine = Callable[[Tensor, Imagined], Tensor]


class Finding(NamedTuple):
    """A mistake: its short name, what was seen, and what to do."""

    cause: str
    seen: str
    remedy: str


class Diagnosis(NamedTuple):
    """What was measured, by name, the first module whose output differs, and the findings, the likely cause first."""

    measured: dict[str, float]
    first_difference: str | None
    findings: list[Finding]


def diagnose(truth: Truth, ranks: Sequence[dict[str, Any]], imagine: Imagine | None) -> Diagnosis:
    """Compare what ranks found with one process; imagine runs a hypothesis, where the model can be run so."""
    measured: dict[str, float] = {}
    early = list(_before_running(truth, ranks))
    if early:
        return Diagnosis(measured, None, early)
    tokens = [rank["tokens"] for rank in ranks]
    if strange := next(_not_finite(truth, ranks), None):
        return Diagnosis(measured, strange[0], [strange[1]])
    logits_NV = gathered([rank["logits"] for rank in ranks], tokens)
    near = _TOLERANCE.get(logits_NV.dtype, _COARSE)
    measured["logits"] = difference(logits_NV, truth.logits_NV)
    if measured["logits"] > near:
        return Diagnosis(measured, _first(truth, ranks, near), [_of_logits(truth, ranks, logits_NV, near, imagine)])
    losses = torch.stack([rank["loss"] for rank in ranks])
    # shares that add up, or the whole on every rank
    shares = abs(losses.sum() - truth.loss) <= near * abs(truth.loss)
    whole = bool(((losses - truth.loss).abs() <= near * abs(truth.loss)).all())
    measured["loss"] = float((losses.mean() if whole else losses.sum()) / truth.loss)
    if not (shares or whole):
        return Diagnosis(measured, None, [_of_loss(truth, ranks, losses, near)])
    return Diagnosis(measured, None, list(_of_gradients(truth, ranks, near, measured)))


def _not_finite(truth: Truth, ranks: Sequence[dict[str, Any]]) -> Iterator[tuple[str | None, Finding]]:
    """What is infinite or not a number on ranks, and is finite in one process."""
    remedy = (
        "look at the first module or parameter named; an overflow, a division by zero, or memory that was not filled"
    )
    for rank, found in enumerate(ranks):
        for name, output in found["outputs"].items():
            there = torch.isfinite(truth.outputs[name]).all() if name in truth.outputs else True
            if there and not torch.isfinite(output[: len(found["tokens"])]).all():
                yield name, Finding("not finite", f"{name} is not finite on rank {rank}", remedy)
        for what, value in {"logits": found["logits"][: len(found["tokens"])], "loss": found["loss"]}.items():
            if not torch.isfinite(value).all():
                yield None, Finding("not finite", f"the {what} of rank {rank} is not finite", remedy)
        for name, gradient in found["gradients"].items():
            if not torch.isfinite(gradient).all() and torch.isfinite(truth.gradients.get(name, torch.zeros(1))).all():
                yield None, Finding("not finite", f"the gradient of {name} is not finite on rank {rank}", remedy)


def difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def gathered(parts: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """(N, ...) in the axis' order, of what ranks have for their tokens; padding is left out."""
    whole = parts[0].new_zeros((sum(map(len, tokens)), *parts[0].shape[1:]))
    for part, own in zip(parts, tokens, strict=True):
        whole[own] = part[: len(own)]
    return whole


def _before_running(truth: Truth, ranks: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    for what, cause, remedy in (
        ("batch", "batches differ", "give all ranks of the group the same batch; shard takes this rank's part of it"),
        ("weights", "weights differ", "seed before the model is made, or broadcast its weights from one rank"),
    ):
        odd = [rank for rank, found in enumerate(ranks) if found.get(what) != ranks[0].get(what)]
        if any(what not in found for found in ranks):
            continue
        if odd:
            yield Finding(cause, f"rank {odd[0]} has another {what} than rank 0", remedy)
            return
    stopped = [rank for rank, found in enumerate(ranks) if {"refusal", "failure"} & found.keys()]
    if stopped:
        # the others lose their connection to it
        rank = min(stopped, key=lambda rank: (_lost(ranks[rank]), ranks[rank]["at"]))
        if "refusal" in ranks[rank]:
            yield Finding("refused", f"rank {rank}: {ranks[rank]['refusal'].rstrip('.')}", "do what the sentence says")
        else:
            yield Finding(
                "failed", f"rank {rank}: {ranks[rank]['failure'].rstrip('.')}", "mend the error where it says"
            )
        return
    n, given = len(truth.rows.ids_N), sum(len(found["tokens"]) for found in ranks)
    if given != n:
        remedy = "give attention_mask to ContextParallel.shard, which leaves padding out"
        yield Finding(
            "padding kept", f"{given} tokens are computed, {n} of them are text and the others padding", remedy
        )
        return
    for rank, found in enumerate(ranks):
        wanted = truth.rows.ids_N[found["tokens"]]
        own = found.get("input_ids", wanted[None]).flatten()[: len(wanted)]
        if len(own) != len(wanted) or not torch.equal(own, wanted.cpu()):
            seen = f"rank {rank} has not the tokens that its plan's layout gives it"
            yield Finding(
                "tokens misplaced", seen, "shard with ContextParallel.shard, or Layout.shard of the same layout"
            )
            return
        if found["random"] > 0:
            seen = f"the same batch gives other logits the second time (by {found['random']:.2g} on rank {rank})"
            yield Finding(
                "random numbers", seen, "set dropout to 0, or call model.eval(), in the script for the doctor"
            )
            return


def _lost(found: dict[str, Any]) -> bool:
    """Whether a rank ended because another one did."""
    words = found.get("refusal", "") + found.get("failure", "")
    return any(
        word in words for word in ("stopped answering", "Connection", "gloo", "NCCL", "timed out", "Broken pipe")
    )


def _first(truth: Truth, ranks: Sequence[dict[str, Any]], near: float) -> str | None:
    """The first module, in the order of execution, whose output is not that of one process."""
    tokens = [rank["tokens"] for rank in ranks]
    for name, wanted in truth.outputs.items():
        parts = [rank["outputs"][name] for rank in ranks if name in rank["outputs"]]
        if len(parts) < len(ranks) or any(part.shape[1:] != wanted.shape[1:] for part in parts):
            continue
        if any(len(part) < len(own) for part, own in zip(parts, tokens, strict=True)):
            continue
        if difference(gathered(parts, tokens), wanted) > near:
            return name
    return None


def _of_logits(
    truth: Truth, ranks: Sequence[dict[str, Any]], logits_NV: Tensor, near: float, imagine: Imagine | None
) -> Finding:
    tokens = [rank["tokens"] for rank in ranks]
    if imagine is not None:
        for finding, positions_N, imagined in _hypotheses(truth, ranks, tokens):
            if difference(logits_NV, imagine(positions_N, imagined)) <= near:
                return finding
    seen = "logits differ, and no mistake that the doctor knows explains them"
    return Finding("unknown", seen, "look at the first module that differs; leave out what the script does there")


def _hypotheses(
    truth: Truth, ranks: Sequence[dict[str, Any]], tokens: list[Tensor]
) -> Iterator[tuple[Finding, Tensor, Imagined]]:
    rows, right_N = truth.rows, truth.positions_N
    anew_N = gathered([torch.arange(len(own)) for own in tokens], tokens)
    given = [found.get("position_ids") for found in ranks]
    given_N = right_N
    if all(one is not None and one.dim() == 2 for one in given):
        given_N = gathered([one.flatten() for one in given if one is not None], tokens)
    mistaken = (
        "each rank counts positions from 0" if torch.equal(given_N, anew_N) else "positions are not the documents'"
    )
    remedy = "pass the part's position_ids on to the model: they are sharded with the tokens"
    yield (
        Finding("positions not sharded", f"{mistaken}: rotary embeddings are wrong", remedy),
        given_N,
        Imagined(causal(rows)),
    )
    seen = "each rank counts positions from 0: rotary embeddings are wrong"
    yield Finding("positions not sharded", seen, remedy), anew_N, Imagined(causal(rows))
    for positions_N in (right_N, given_N, anew_N, torch.arange(len(right_N))):
        seen = "documents attend to one another: the pack is taken for one document"
        what = "give document_lengths (or position_ids that begin anew) to ContextParallel.shard"
        yield Finding("documents not separated", seen, what), positions_N, Imagined(one_document(rows))
        seen = "tokens see what comes after them"
        yield Finding("mask not causal", seen, 'use inner="causal"'), positions_N, Imagined(same_document(rows))
        seen = "each rank attends to its own tokens only: context parallelism does nothing"
        what = 'select attn_implementation="distattn", and pass context_parallel on to the model'
        for positions in (None, positions_N):
            alone = each_rank_alone(tokens, rows, positions)
            yield Finding("context parallelism off", seen, what), positions_N, Imagined(alone)
    for forgotten in ASKED:
        seen = f"the layers' {forgotten} is not computed"
        what = f"pass {forgotten} on to the attention call"
        yield Finding(f"{forgotten} dropped", seen, what), right_N, Imagined(causal(rows), [forgotten])


def _of_loss(truth: Truth, ranks: Sequence[dict[str, Any]], losses: Tensor, near: float) -> Finding:
    """Which labels, summed up in which way, give what the ranks call their loss."""
    unfit = "no labels and no way to sum that the doctor knows gives this loss"
    for labels, cause, seen, remedy in _LABELS:
        sums, counts = [], []
        for found in ranks:
            own = found["tokens"]
            per_token = cross_entropy(found["logits"][: len(own)], targets := labels(truth, own))
            sums.append(per_token.sum())
            counts.append((targets != IGNORE_INDEX).sum())
        total, count = torch.stack(sums), torch.stack(counts)
        means = total / count.clamp(min=1)
        right = total.sum() / count.sum()
        # what ranks' losses add up to, if each has a share of it
        ways = {
            "": [total / count.sum(), right.expand_as(total), total / max(truth.rows.valid_labels, 1)],
            "each rank divides by its own tokens": [means, means / len(ranks), means.mean().expand_as(means)],
            "sums are not divided by the number of tokens": [total],
        }
        for way, candidates in ways.items():
            for candidate in candidates:
                if bool(((losses - candidate).abs() <= near * candidate.abs().max()).all()) and (cause or way):
                    if cause:
                        return Finding(cause, seen + (f"; {way}" if way else ""), remedy)
                    scaled = "multiply the sum of token losses by the part's loss_scale"
                    return Finding("mean of means" if "own" in way else "loss not divided", way, scaled)
    return Finding("loss differs", unfit, "sum the token losses of part['labels'] and multiply by part['loss_scale']")


def _right(truth: Truth, own: Tensor) -> Tensor:
    return truth.rows.labels_N[own]


def _shifted_late(truth: Truth, own: Tensor) -> Tensor:
    labels = truth.labels_N[own]
    return torch.cat([labels[1:], labels.new_full((min(len(own), 1),), IGNORE_INDEX)])


def _unshifted(truth: Truth, own: Tensor) -> Tensor:
    return truth.labels_N[own]


def _over_ends(truth: Truth, own: Tensor) -> Tensor:
    shifted = torch.cat([truth.labels_N[1:], truth.labels_N.new_full((1,), IGNORE_INDEX)])
    return shifted[own]


def _unmasked(truth: Truth, own: Tensor) -> Tensor:
    ids, targets = truth.rows.ids_N, truth.rows.labels_N
    ends = torch.tensor(truth.rows.lengths).cumsum(0) - 1
    shifted = torch.cat([ids[1:], ids[:1]])
    shifted[ends] = IGNORE_INDEX
    return torch.where(targets == IGNORE_INDEX, shifted, targets)[own]


_LABELS = (
    (_right, "", "", ""),
    (
        _shifted_late,
        "labels shifted after sharding",
        "the last token of every shard has lost its label, or has a stranger's",
        "use the part's labels, which are shifted already; a loss that shifts labels itself shall not",
    ),
    (_unshifted, "labels not shifted", "tokens predict themselves", "use the part's labels: each token's successor"),
    (
        _over_ends,
        "labels over document ends",
        "last tokens of documents predict the next document's first",
        "use the part's labels: last tokens have none",
    ),
    (
        _unmasked,
        "label mask dropped",
        "tokens whose label is -100 have a loss",
        "give labels to ContextParallel.shard, and ignore -100",
    ),
)


def _of_gradients(
    truth: Truth, ranks: Sequence[dict[str, Any]], near: float, measured: dict[str, float]
) -> Iterator[Finding]:
    wanted = truth.gradients
    for name in wanted:
        lacking = [rank for rank, found in enumerate(ranks) if name not in found["gradients"]]
        if lacking:
            yield Finding("gradient missing", f"{name} has no gradient on rank {lacking[0]}", "let its loss reach it")
            return
    flat = [torch.cat([found["gradients"][name].double().flatten() for name in wanted]) for found in ranks]
    truth_flat = torch.cat([gradient.double().flatten() for gradient in wanted.values()])
    scale = truth_flat.norm()
    apart = max(float((one - flat[0]).norm()) for one in flat) / max(float(flat[0].norm()), 1e-30)
    ratio = float(flat[0] @ truth_flat / (truth_flat @ truth_flat))
    measured["gradient"] = float(flat[0].norm() / scale)
    if apart > near:
        together = torch.stack(flat).sum(0)
        factor = float(together @ truth_flat / (truth_flat @ truth_flat))
        seen = "ranks have different gradients"
        if float((together - factor * truth_flat).norm()) < near * abs(factor) * float(scale):
            seen += f"; their sum is {factor:.4g} times the right one"
        yield Finding("gradients not reduced", seen, "sum gradients over all data- and context-parallel ranks")
        return
    if float((flat[0] - ratio * truth_flat).norm()) <= near * abs(ratio) * scale:
        if abs(ratio - 1) > near:
            seen = f"all gradients are {ratio:.4g} times the right ones on {len(ranks)} ranks"
            remedy = (
                "multiply the loss by cp.loss_scale(trainer), which measures how gradients are reduced"
                if ratio < 1
                else "a sum over ranks is differentiated twice: let each rank's loss be its share, without a differentiable "
                "all_reduce or all_gather"
            )
            yield Finding("gradient factor", seen, remedy)
        return
    for name, gradient in wanted.items():
        got = ranks[0]["gradients"][name].double()
        if float((got - gradient.double()).norm()) > near * float(gradient.double().norm()) + 1e-9 * float(scale):
            share = float((got.flatten() @ gradient.double().flatten()) / gradient.double().norm() ** 2)
            seen = f"{name} is the first parameter whose gradient differs ({share:.4g} times the right one along it)"
            yield Finding("gradient differs", seen, "see that its gradient is reduced like the others'")
            return
