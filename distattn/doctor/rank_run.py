"""What `distattn doctor` collects: a target's run on every rank, and the same in one process.

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
from distattn.doctor.target import Target, describe_error
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError


class ReferenceResult(NamedTuple):
    """What one process computes, one document at a time: logits (N, V), outputs of modules (N, ...), loss and gradients.

    labels_N: each token's own label, not shifted; positions_N: each token's position in its document.
    """

    rows: PackedBatch
    labels_N: Tensor
    positions_N: Tensor
    logits_NV: Tensor
    outputs: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]


def reference_result(target: Target, model: torch.nn.Module) -> ReferenceResult:
    """Run the target in one process, one document at a time, with a model that has the ranks' weights."""
    batch = target.batch(model)
    rows = rows_of(batch)
    labels = batch.get("labels", batch["input_ids"])
    kept = batch.get("attention_mask", torch.ones_like(labels)) != 0
    device = next(model.parameters()).device
    model.zero_grad()
    logits, outputs = [], []
    # its backward pass may repeat the attention
    with target.reference_context(model):
        for ids in rows.ids_N.to(device).split(list(rows.lengths)):
            with recorded_outputs(model) as seen:
                logits.append(target.reference(model, ids[None])[0])
            outputs.append(seen)
        logits_NV = torch.cat(logits)
        loss = cross_entropy(logits_NV, rows.labels_N.to(device)).sum() / max(rows.valid_labels, 1)
        loss.backward()
    gradients = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    common = [name for name in outputs[0] if all(name in one for one in outputs)]
    joined = {name: torch.cat([one[name] for one in outputs]) for name in common}
    positions_N = torch.cat([torch.arange(length) for length in rows.lengths])
    model.zero_grad()
    return ReferenceResult(
        rows, labels[kept], positions_N, logits_NV.detach().cpu(), joined, loss.detach().cpu(), gradients
    )


def rows_of(batch: Mapping[str, Any]) -> PackedBatch:
    """Read a batch as `ContextParallel.shard` would; keys that a script has for itself are left out.

    Raises DistattnError where no token has a label.
    """
    rows = PackedBatch.of({name: value for name, value in batch.items() if name in KEYS})
    if not rows.valid_labels:
        raise DistattnError("the batch has no token with a label: there is no loss to compare.")
    return rows


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Compute the fp64 loss of each token (T,), 0 where the target is IGNORE_INDEX."""
    wide = logits_TV.double()
    return F.cross_entropy(wide, targets_T, ignore_index=IGNORE_INDEX, reduction="none")


def run_on_this_rank(target: Target) -> dict[str, Any]:
    """Run the target on this rank. Returns plain tensors, numbers and words; a refusal or a failure is one of them."""
    found: dict[str, Any] = {}
    try:
        cp = target.context_parallel()
        model = target.model()
        batch = target.batch(model)
        _record_inputs(found, model, batch)
        # only now: what it does may depend on the same weights on all ranks
        target.setup(cp, model)
        part = target.shard(cp, batch)
        _record_part(found, cp, batch, part)
        logits = _record_forward(found, target, model, part)
        loss = target.loss(logits, part)
        found["loss"] = loss.detach().double().cpu() / cp.loss_scale()
        target.backward(model, loss)
        found["gradients"] = {name: gradient.cpu() for name, gradient in target.gradients(model).items()}
    except DistattnError as refusal:
        found["refusal"] = str(refusal)
    except Exception as error:
        found["failure"] = describe_error(error)
    found["at"] = time.time()
    return found


def _record_inputs(found: dict[str, Any], model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
    """Keep the whole weights, and digests of weights and batch, by which ranks are compared."""
    found["state"] = {
        name: full_tensor(value.detach()).cpu().clone() for name, value in unwrapped(model).state_dict().items()
    }
    found["weights"] = _digest(list(found["state"].values()))
    found["batch"] = _digest([batch[name] for name in sorted(batch) if isinstance(batch[name], Tensor)])


def _record_part(found: dict[str, Any], cp: ContextParallel, batch: Mapping[str, Any], part: Mapping[str, Any]) -> None:
    """Keep what this rank got of the batch, and which tokens the layout gives it, as global coordinates (T,)."""
    found |= {name: part[name].cpu() for name in ("input_ids", "labels", "position_ids") if name in part}
    sharded = part.get("context_parallel")
    documents = sharded.key.documents if isinstance(sharded, LocalBatch) else (rows_of(batch).lengths,)
    found["tokens"] = torch.from_numpy(cp.planner.lay_out(documents)[1].tokens(cp.rank).copy())


def _record_forward(found: dict[str, Any], target: Target, model: torch.nn.Module, part: Mapping[str, Any]) -> Tensor:
    """Run forward twice, which shows random numbers, and keep the second run. Returns its logits (1, T, V)."""
    with torch.no_grad():
        before = target.forward(model, part)
    with recorded_outputs(unwrapped(model)) as found["outputs"]:
        logits = target.forward(model, part)
    found["random"] = float((logits - before).detach().abs().max())
    found["logits"] = logits[0].detach().cpu()
    return logits


@contextmanager
def recorded_outputs(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the outputs (T, ...) of modules by name, in the order in which they were done, while the context is open."""
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


def main(path: str, folder: str) -> int:
    """Run the target on one rank and leave the result in the folder. Returns the exit code."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # ranks that wait for one another are found out
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    try:
        found = run_on_this_rank(Target(path))
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
