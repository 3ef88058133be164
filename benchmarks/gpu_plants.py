"""Planted faults in kernels and streams, which the checks of `gpu_checks`, `gpu_executor` and kernel="auto" must find.

    python benchmarks/gpu_plants.py

A check that finds nothing proves something only if it would have found a fault on this very device. So a real tier is
wrapped: it drops keys, scales scores wrongly, moves the edge of a mask, overwrites instead of adding, writes or reads
out of bounds (inside the guards, so that no access is illegal and the device stays intact), or returns different bits
each time. Then two waits are skipped: for a message, and for the upload of run lists to the device. Both are delayed so
that the fault shows every time. Each fault is printed as a line, and the exit code is 1 if any fault is not found.
Without a GPU (TRITON_INTERPRET=1) only kernels' faults run.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import gpu_checks
import torch
from findings import Findings
from gpu_executor import Case, Layer, Mailbox, Streams, at_once, far, poisoned, too_far
from torch import Tensor

import distattn as da
from distattn.ir.bands import HI, K0, K1
from distattn.kernels import registry
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements
from distattn.ops.executable import EXECUTABLES, Executable, ExecutionKey, kernel_requirements, with_device_index
from distattn.ops.kernel_choice import local_kernel_trials
from distattn.parallel.runtime.communication.transport import SingleRankTransport

# the tier to wrap; the faults do not depend on the choice
TIER = "triton"
# sizes of the case for faults in streams
TOKENS, DIM, RANKS = 4096, 128, 4
# GPU clock cycles, about 0.1 s: far longer than the host takes to continue
LONG = 170_000_000


class Plant(NamedTuple):
    """A tier with a fault. computes: True if the fault changes the computed values, in which case trials must also
    reject the tier."""

    fault: str
    tier: ModuleType
    computes: bool


def main() -> int:
    """Plant all faults and print one line for each. Return exit code 1 if any fault is not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--findings", type=Path, help="where they are kept, as JSON lines")
    findings = Findings(parser.parse_args().findings)
    device = with_device_index("cuda" if torch.cuda.is_available() else "cpu")
    dims = (128, 128) if device.type == "cuda" else (32, 32)
    call = gpu_checks.call_of(TIER, dims, False, device)
    if why_not := call.tier.unsupported_reason(KernelRequirements(call.dtype, *dims, device)):
        findings.left_out("planted faults", why_not)
        return findings.ended()
    in_kernels(call, findings)
    if device.type == "cpu":
        findings.left_out("faults of streams", "a CPU has no streams")
    else:
        message_not_waited_for(device, findings)
        lists_not_waited_for(device, findings)
    return findings.ended()


def in_kernels(call: gpu_checks.Call, findings: Findings) -> None:
    """Plant faults in a kernel. The comparison with fp64, guards, a second call or the trial of kernel="auto" must find them."""
    masks = dict(list(gpu_checks.masks(call.device).items())[:2])
    # first run the checks without a fault: if they complained, every planted fault would seem to be found
    before = [f"{name}: {text}" for name, mask in masks.items() for text in gpu_checks.check(call, mask)]
    findings.check(f"{TIER} before anything is planted", "; ".join(before))
    planted = plants(call.tier, 128 if call.device.type == "cuda" else 16)
    trials = faults_by_trial([plant for plant in planted if plant.computes], call)
    for plant in planted:
        texts = (
            f"{name}: {text}"
            for name, mask in masks.items()
            for text in gpu_checks.check(call._replace(tier=plant.tier), mask)
        )
        problem = "" if before else next(texts, "")
        if plant.computes:
            problem = (
                problem and trials[plant.fault] and f'{problem}; kernel="auto" does not use it: {trials[plant.fault]}'
            )
        findings.planted(plant.fault, problem)


def plants(tier: ModuleType, tile: int) -> list[Plant]:
    """Return all kernel faults. tile: the number of keys to drop."""

    def fewer_keys(mask: LaunchMask, requirements: KernelRequirements) -> Any:
        bands = mask.bands.copy()
        bands[bands[:, K1] - bands[:, K0] > tile, K1] -= tile
        return tier.prepare(mask._replace(bands=bands), requirements)

    def edge(mask: LaunchMask, requirements: KernelRequirements) -> Any:
        bands = mask.bands.copy()
        bands[:, HI] += 1
        return tier.prepare(mask._replace(bands=bands), requirements)

    def scaled(function: Callable[..., Any], at: int) -> Callable[..., Any]:
        def run(*operands: Any, **into: Any) -> Any:
            score = operands[at]._replace(scale=operands[at].scale * 1.05)
            return function(*operands[:at], score, *operands[at + 1 :], **into)

        return run

    def overwriting(*operands: Any, into: Any = None, add: tuple[bool, bool] = (False, False), **final: Any) -> Any:
        targets = {} if into is None else dict(into=into, add=(add[0], False))
        return tier.backward(*operands, **targets, **final)

    def writing_beyond(*operands: Any, **into: Any) -> Any:
        grads = tier.backward(*operands, **into)
        beyond(grads[1]).fill_(1.0)
        return grads

    def reading_beyond(q: Tensor, k: Tensor, *others: Any, **into: Any) -> Any:
        o, lse = tier.forward(q, k, *others, **into)
        # imitate a kernel that multiplies masked elements by zero
        o[-1] += beyond(k).float() * 0
        return o, lse

    calls = itertools.count()

    def restless(*operands: Any, **into: Any) -> Any:
        o, lse = tier.forward(*operands, **into)
        if next(calls) % 2:
            o[0].copy_(torch.nextafter(o[0], torch.full_like(o[0], torch.inf)))
        return o, lse

    scale = dict(forward=scaled(tier.forward, 4), backward=scaled(tier.backward, 7))
    return [
        Plant("the last tile of keys of every run is dropped", changed(tier, prepare=fewer_keys), True),
        Plant("scores are scaled by 5 % too much", changed(tier, **scale), True),
        Plant("every query sees one key more than the mask allows", changed(tier, prepare=edge), True),
        Plant("gradients of keys and values are written, not added", changed(tier, backward=overwriting), True),
        Plant("one number is written beyond the end of dk", changed(tier, backward=writing_beyond), False),
        Plant("one number is read beyond the end of k", changed(tier, forward=reading_beyond), False),
        Plant("o has other bits the second time", changed(tier, forward=restless), False),
    ]


def changed(tier: ModuleType, **functions: Any) -> ModuleType:
    """Return a copy of a kernel module with some functions replaced."""
    module = ModuleType("planted")
    vars(module).update({name: part for name, part in vars(tier).items() if not name.startswith("__")} | functions)
    return module


def beyond(x: Tensor) -> Tensor:
    """Return the element just past the end of `x`, which must be part of a larger block of memory."""
    return torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel())


def faults_by_trial(planted: list[Plant], call: gpu_checks.Call) -> dict[str, str]:
    """Return, keyed by fault, why kernel="auto" rejects the faulty tier in favor of the real tier, or "" if it does not
    reject it."""
    mask = next(iter(gpu_checks.masks(call.device).values()))
    shape = dict(heads=gpu_checks.HEADS, kv_heads=gpu_checks.KV_HEADS, head_dim=call.dims[0], dtype=str(call.dtype)[6:])
    plan = da.make_plan(mask, da.Layout.contiguous([mask.n], 1), strategy="ring", **shape)
    modules = {f"planted {number}": plant.tier for number, plant in enumerate(planted)}
    with candidates(modules, call.device):
        chosen = da.prepare(plan, device=call.device).key.kernel
        trials = local_kernel_trials(plan, 0, kernel_requirements(plan.call, call.device))
    faults = {name: trials[name].fault for name in modules}
    right = {name: fault if fault.startswith("wrong") and chosen == TIER else "" for name, fault in faults.items()}
    return dict(zip((plant.fault for plant in planted), right.values(), strict=True))


@contextmanager
def candidates(modules: dict[str, ModuleType], device: torch.device) -> Iterator[None]:
    """Let kernel="auto" choose between `modules` and the real tier while in the block, with a separate cache."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=folder),
        mock.patch.dict(sys.modules, modules),
        mock.patch.dict(registry.KERNELS, {name: name for name in modules}),
        mock.patch.dict(registry.CANDIDATES, {device.type: (*modules, TIER)}),
        # silence the log: readers would take messages about planted kernels for real findings
        mock.patch.object(logging.getLogger("distattn"), "disabled", True),
    ):
        yield


def message_not_waited_for(device: torch.device, findings: Findings) -> None:
    """Plant a missing wait: a step's messages start 20 ms late but are used immediately."""
    case = Case.of(TOKENS, DIM, RANKS, device)
    wanted = at_once(case.mask, case.x)
    layer = Layer(case.plan("ring"), case.x, Streams(RANKS, device, 20_000.0), TIER)

    def wrong() -> str:
        with poisoned():
            errors = {name: far(got, wanted[name]) for name, got in layer.run().items()}
        # wait for copies that are still in flight
        torch.cuda.synchronize()
        return too_far(errors)

    before = wrong()
    findings.check("executor before anything is planted", before)
    with mock.patch.object(Mailbox.Flight, "wait", lambda flight: None):
        findings.planted("messages are read before they have come", "" if before else wrong())


def lists_not_waited_for(device: torch.device, findings: Findings) -> None:
    """Plant a missing wait: a program's run lists are uploaded on a different stream 0.1 s late, but a pass starts
    immediately.

    Until they are uploaded, the lists are zeros, which mean no work.
    """
    case = Case.of(TOKENS, DIM, 1, device)
    wanted = at_once(case.mask, case.x)["o"]
    key = ExecutionKey(0, TIER, device)
    program = EXECUTABLES.program(case.plan("ring"), key)
    uploaded = program.uploaded
    torch.cuda.synchronize()
    kept, side = uploaded.packed.clone(), torch.cuda.Stream()

    def wrong(executable: Executable) -> str:
        uploaded.packed.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG)
            uploaded.packed.copy_(kept)
            uploaded.ready.record()
        o = da.attention(case.x["q"], case.x["k"], case.x["v"], executable)
        torch.cuda.synchronize()
        return too_far({"o": far(o, wanted)})

    ready, hasty = (
        Executable(variant, key, SingleRankTransport()) for variant in (program, replace(program, uploaded=None))
    )
    before = wrong(ready)
    findings.check("a late upload before anything is planted", before)
    findings.planted("lists of runs are read before they have come", "" if before else wrong(hasty))


if __name__ == "__main__":
    sys.exit(main())
