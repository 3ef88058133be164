"""What `distattn doctor` collects: a subject's run on every rank, and the truth in one process.

`python -m distattn.doctor.rank_run TARGET FOLDER` is one rank.
"""

# N tokens on the axis, T tokens on this rank, V vocabulary

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distattn.adapters.pytorch import full_tensor, unwrapped
from distattn.batch.packed_batch import IGNORE_INDEX, KEYS, PackedBatch
from distattn.batch.planner import LocalBatch
from distattn.doctor.target import Subject, said
from distattn.ir.errors import DistattnError


class Truth(NamedTuple):
    """One process, one document at a time: logits (N, V), outputs of modules (N, ...), loss and gradients.

    labels_N: each token's own, not shifted.
    """

    rows: PackedBatch
    labels_N: Tensor
    positions_N: Tensor
    logits_NV: Tensor
    outputs: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]


def truth_of(subject: Subject, model: torch.nn.Module) -> Truth:
    """Of a model whose weights are those of the ranks."""
    batch = subject.batch(model)
    rows = rows_of(batch)
    labels = batch.get("labels", batch["input_ids"])
    kept = batch.get("attention_mask", torch.ones_like(labels)) != 0
    device = next(model.parameters()).device
    model.zero_grad()
    logits, outputs = [], []
    # its backward pass may repeat the attention
    with subject.one_process(model):
        for ids in rows.ids_N.to(device).split(list(rows.lengths)):
            with recorded(model) as seen:
                logits.append(subject.reference(model, ids[None])[0])
            outputs.append(seen)
        logits_NV = torch.cat(logits)
        loss = cross_entropy(logits_NV, rows.labels_N.to(device)).sum() / max(rows.valid_labels, 1)
        loss.backward()
    gradients = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    common = [name for name in outputs[0] if all(name in one for one in outputs)]
    joined = {name: torch.cat([one[name] for one in outputs]) for name in common}
    positions_N = torch.cat([torch.arange(length) for length in rows.lengths])
    model.zero_grad()
    return Truth(rows, labels[kept], positions_N, logits_NV.detach().cpu(), joined, loss.detach().cpu(), gradients)


def rows_of(batch: Mapping[str, Any]) -> PackedBatch:
    """What `ContextParallel.shard` would read of it; a script may have keys of its own."""
    rows = PackedBatch.of({name: value for name, value in batch.items() if name in KEYS})
    if not rows.valid_labels:
        raise DistattnError("the batch has no token with a label: there is no loss to compare.")
    return rows


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """(T,), 0 where there is no target."""
    wide = logits_TV.double()
    return F.cross_entropy(wide, targets_T, ignore_index=IGNORE_INDEX, reduction="none")


def examine(subject: Subject) -> dict[str, Any]:
    """This rank's run, as plain tensors and numbers. A refusal or failure is part of it."""
    found: dict[str, Any] = {}
    try:
        cp = subject.context_parallel()
        model = subject.model()
        batch = subject.batch(model)
        inner = unwrapped(model)
        found["state"] = {name: full_tensor(value.detach()).cpu().clone() for name, value in inner.state_dict().items()}
        found["weights"] = _digest(list(found["state"].values()))
        subject.prepare(cp, model)
        found["batch"] = _digest([batch[name] for name in sorted(batch) if isinstance(batch[name], Tensor)])
        part = subject.shard(cp, batch)
        found |= {name: part[name].cpu() for name in ("input_ids", "labels", "position_ids") if name in part}
        sharded = part.get("context_parallel")
        documents = sharded.key.documents if isinstance(sharded, LocalBatch) else (rows_of(batch).lengths,)
        found["tokens"] = torch.from_numpy(cp.planner.lay_out(documents)[1].tokens(cp.rank).copy())
        with torch.no_grad():
            before = subject.forward(model, part)
        with recorded(inner) as found["outputs"]:
            logits = subject.forward(model, part)
        found["random"] = float((logits - before).detach().abs().max())
        loss = subject.loss(logits, part)
        share = loss.detach().double().cpu() / cp.loss_scale()
        found |= {"logits": logits[0].detach().cpu(), "loss": share}
        subject.backward(model, loss)
        found["gradients"] = {name: gradient.cpu() for name, gradient in subject.gradients(model).items()}
    except DistattnError as refusal:
        found["refusal"] = str(refusal)
    except Exception as error:
        found["failure"] = said(error)
    found["at"] = time.time()
    return found


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs (T, ...) of modules by name, in the order in which they were done."""
    seen: dict[str, Tensor] = {}
    hooks = []

    def keep(name: str, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) and out else out
        if isinstance(first, Tensor) and first.dim() >= 2 and first.shape[0] == 1:
            seen[name] = first[0].detach().cpu()

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(lambda _, __, out, name=name: keep(name, out)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _digest(tensors: list[Tensor]) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def main(target: str, folder: str) -> int:
    """One rank."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # ranks that wait for one another are found out
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    try:
        found = examine(Subject(target))
        torch.save(found, Path(folder, f"rank-{dist.get_rank()}.pt"))
        if not {"refusal", "failure"} & found.keys():
            dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    # not sys.exit: a rank whose peers failed may hold messages that never come
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
