"""Collect the evidence for `distattn doctor` on one rank: `python -m distattn.doctor.rank_run TARGET FOLDER`."""

# T tokens on this rank, V vocabulary

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distattn.adapters.pytorch import full_tensor, unwrapped
from distattn.batch.local_batch import LocalBatch
from distattn.doctor.comparison import PartResult, RankResult
from distattn.doctor.recording import (
    active_dropout,
    buffers_of,
    digest,
    recorded_inputs,
    recorded_output_gradients,
    recorded_outputs,
    recorded_parameter_gradients,
    recorded_returns,
    recorded_weights,
    same_buffers,
    settings_of,
)
from distattn.doctor.reference import digests_of, packs_of
from distattn.doctor.target import Target
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError, shows_lost_peer


def run_on_this_rank(target: Target) -> RankResult:
    """Run the target on this rank. Return the results, or the error that ended the run, as plain tensors, numbers and strings."""
    result: RankResult = {}
    try:
        cp = target.context_parallel()
        if cp.config.data == "per_rank":
            raise DistattnError(
                'the doctor compares ranks that split the same batches: use data="replicated" in the script for it'
            )
        model = target.model()
        batches = target.batches(model)
        _record_inputs(result, cp, unwrapped(model), batches)
        # record the inputs before the setup, which may fail if weights differ between ranks
        _set_up(result, target, cp, model)
        parts = target.shard(cp, batches)
        result["dropout"] = active_dropout(unwrapped(model))
        result["old_gradients"] = [name for name, p in unwrapped(model).named_parameters() if _holds_gradient(p)]
        result["settings"] = settings_of(unwrapped(model))
        result["loss_scale"], result["parts"], first = cp.loss_scale(), [], 0
        for batch, part in zip(batches, parts, strict=True):
            result["parts"].append(_run_part(target, cp, model, batch, part, first))
            first += sum(packs_of([batch])[0].lengths)
        target.reduce(model)
        result["gradients"] = {name: gradient.cpu() for name, gradient in target.gradients(model).items()}
        result["buffers_after"] = {name: digest(buffer) for name, buffer in buffers_of(unwrapped(model)).items()}
    except DistattnError as refusal:
        result["refusal"], result["lost_peer"] = str(refusal), shows_lost_peer(refusal)
    # report SystemExit as a failure, too, since a script that calls sys.exit has not been examined
    except (Exception, SystemExit) as error:
        result["failure"], result["lost_peer"] = target.describe_error(error), shows_lost_peer(error)
    result["at"] = time.time()
    return result


def _set_up(result: RankResult, target: Target, cp: ContextParallel, model: torch.nn.Module) -> None:
    """Run the script's setup. Continue after a refusal, which may share its cause with wrong gradients found later."""
    try:
        target.setup(cp, model)
    except DistattnError as refusal:
        result["setup_refusal"] = str(refusal)


def _holds_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(full_tensor(parameter.grad).any())


def _record_inputs(
    result: RankResult, cp: ContextParallel, model: torch.nn.Module, batches: Sequence[Mapping[str, Any]]
) -> None:
    """Record the full weights, and digests of weights and batches for comparison between ranks."""
    result["state"] = {name: full_tensor(value.detach()).cpu().clone() for name, value in model.state_dict().items()}
    result["weights"] = {name: digest(value) for name, value in result["state"].items()}
    result["buffers"] = buffers_of(model)
    result["batch"] = digests_of(batches)
    result["document_mask"] = cp.config.document_mask


def _run_part(
    target: Target,
    cp: ContextParallel,
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    part: Mapping[str, Any],
    first: int,
) -> PartResult:
    """Run one micro-batch: forward twice, to detect randomness, then backward. first: its first token's index in the batch."""
    result: PartResult = {name: part[name].cpu() for name in ("input_ids", "position_ids") if name in part}
    sharded = part.get("context_parallel")
    documents = sharded.key.documents if isinstance(sharded, LocalBatch) else (packs_of([batch])[0].lengths,)
    _, layout = cp.planner.lay_out(documents)
    result["tokens"] = torch.from_numpy(layout.tokens(cp.rank).copy()) + first
    result["documents"] = list(map(int, layout.lengths))
    with torch.no_grad(), same_buffers(unwrapped(model)):
        before = target.forward(model, part)
    plain = unwrapped(model)
    with (
        recorded_outputs(plain) as result["outputs"],
        recorded_inputs(plain) as result["inputs"],
        recorded_output_gradients(plain) as result["output_gradients"],
        recorded_weights(plain) as result["used_weights"],
        recorded_returns(plain) as returned,
    ):
        logits = target.forward(model, part)
    result["random"] = float((logits - before).detach().abs().max())
    # copy the logits, since the script's loss may change them in place
    result["logits"] = logits[0].detach().cpu().clone()
    if logits.requires_grad:
        logits.register_hook(lambda gradient: result.update(logits_gradient=gradient[0].detach().cpu().clone()))
    loss = target.loss(logits, part, plain, returned)
    if loss.requires_grad:
        # record the factor by which backward multiplies the loss, such as an fp16 loss scale: token weights leave it out
        loss.register_hook(lambda gradient: result.update(loss_gradient=float(gradient)))
    result["loss"] = loss.detach().double().cpu() / cp.loss_scale()
    with recorded_parameter_gradients(plain) as result["parameter_gradients"]:
        target.backward(model, loss)
    return result


def main(path: str, folder: str) -> int:
    """Run the target on one rank and write the result into the folder. Return the exit code."""
    torch.set_num_threads(1)
    # silence distattn's warnings, since they are about the mistakes that the doctor finds itself
    logging.getLogger("distattn").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # use a short timeout, to detect deadlocked ranks
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    try:
        result = run_on_this_rank(Target(path))
        torch.save(result, Path(folder, f"rank-{dist.get_rank()}.pt"))
        if not {"refusal", "failure"} & result.keys():
            dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    # not sys.exit, which may wait forever for messages from ranks that failed
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
