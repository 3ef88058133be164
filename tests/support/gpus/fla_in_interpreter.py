"""Runs fla-core's kernels in Triton's interpreter, in a separate process, and prints the results as JSON.

Once fla-core is installed, transformers calls its kernels for CPU tensors as well, and fails. `make fla` therefore
installs it in a folder next to the environment, which no other process has on its path.
"""

import ctypes
import gc
import json
import os
import sys

# must be set before triton is imported
os.environ["TRITON_INTERPRET"] = "1"

import torch
from recurrences import assert_same, by_definition, recurrence_case, run_recurrence
from triton.runtime.autotuner import Autotuner

import distattn as da
from distattn.ir.op import OPS
from distattn.kernels.convolution.trial import ConvolutionInputs
from distattn.kernels.convolution.trial import differences as convolution_differences
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.recurrence.trial import RecurrenceInputs, differences
from distattn.kernels.registry import load_kernel
from distattn.kernels.spec import KernelRequirements
from distattn.parallel.runtime.lowering.lower import lower

CPU = torch.device("cpu")
# every op is tested with a one-token document, and one op with a document longer than one chunk
LENGTHS = {"gated_delta_rule": (3, 1, 70)}


def make_kernels_run() -> None:
    """Patch Triton's interpreter and autotuner so that they can run fla-core's kernels."""
    # loop counters are plain ints in the interpreter, and kernels call `.to` on them
    gc.get_referents(int.__dict__)[0]["to"] = lambda number, *_: number
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))
    begin = Autotuner.__init__

    def with_one_configuration(self, fn, arg_names, configs, key, *rest, **more):
        # timing several configurations would take hours
        begin(self, fn, arg_names, list(configs)[:1], key, *rest, **more)
        self.early_config_prune = self.perf_model = None

    Autotuner.__init__ = with_one_configuration


def largest_difference(name: str, dtype: torch.dtype) -> float:
    """Return the largest difference between fla-core and the fp64 chunked kernel in outputs, states, gradients and
    transitions.
    """
    needed = KernelRequirements(dtype, 16, 16, CPU, op=OPS[name])
    inputs = RecurrenceInputs.random(LENGTHS.get(name, (18, 1)), 2, 1, needed)
    return max(differences(load_kernel("fla"), inputs))


def over_ranks() -> str:
    """Run a head-sharded plan on two ranks. Return how the result differs from the definition, or an empty string."""
    case = recurrence_case(OPS["gated_delta_rule"], (5, 19), 2, 1, 16, 16)
    shape = dict(heads=2, kv_heads=1, head_dim=16, v_head_dim=16, dtype="float32", op="gated_delta_rule")
    layout = da.Layout.zigzag(case.lengths, ranks=2)
    plan = da.make_plan(da.Mask.documents(case.lengths), layout, strategy="scan", **shape)
    try:
        assert_same(run_recurrence(plan, case, kernel=load_kernel("fla")), by_definition(case), 2e-5)
    except AssertionError as error:
        return str(error)
    return ""


def as_operator() -> dict[str, float]:
    """Return the relative differences, keyed by name, between `da.recurrence` with kernel "fla" and with the chunked
    kernel in fp16.
    """
    shape = dict(heads=2, kv_heads=2, head_dim=16, v_head_dim=32, dtype="float16", op="gated_delta_rule")
    plan = da.make_plan(da.Mask.documents([25]), da.Layout.contiguous([25], 1), strategy="scan", **shape)
    inputs = RecurrenceInputs.random((25,), 2, 2, KernelRequirements(torch.float16, 16, 32, CPU, op=plan.call.op))
    results = []
    for kernel in ("fla", "chunked"):
        ready = da.prepare(plan, kernel=kernel)
        assert ready.key.kernel == kernel
        leaves = [y.clone().requires_grad_() for y in inputs.x]
        q, k, v, g, beta = leaves
        out = da.recurrence(q, k, v, ready, g=g, beta=beta, return_final_state=True)
        results.append([*out, *torch.autograd.grad(out, leaves, [inputs.do, inputs.dstate])])
    names = ("o", "final", "dq", "dk", "dv", "dg", "dbeta")
    pairs = zip(names, *results, strict=True)
    return {name: float((a.double() - b.double()).norm() / b.double().norm()) for name, a, b in pairs}


def convolutions() -> dict[str, float]:
    """Return the largest differences from the reference taps, for packed documents and for the launches of a ring's
    steps.
    """
    needed = KernelRequirements(torch.float32, 1, 6, CPU, op=OPS["convolution"])
    inputs = ConvolutionInputs.random((66, 1, 9), 2, needed)
    largest = {"documents": max(convolution_differences(load_kernel("fla_conv1d"), inputs, needed))}
    layout = da.Layout.zigzag([20, 1, 9], 2)
    shape = dict(heads=1, kv_heads=1, head_dim=1, v_head_dim=6, dtype="float32", op="convolution")
    plan = da.make_plan(da.Mask.documents([20, 1, 9], (3, 0)), layout, strategy="ring", **shape)
    launches: list[LaunchMask] = []
    for rank in range(2):
        lower(plan, rank, launches.append)
    for number, mask in enumerate(launches):
        x, do = torch.randn(mask.keys, 1, 6), torch.randn(mask.rows, 1, 6)
        part = ConvolutionInputs(x, do, torch.randn(1, 6, 4), mask)
        far = convolution_differences(load_kernel("fla_conv1d"), part, needed)
        largest[f"launch {number}"] = max(far)
    return largest


def refusals() -> dict[str, str]:
    """Return, keyed by case, why fla-core's kernels refuse calls that the chunked kernel must serve."""
    usual = KernelRequirements(torch.float16, 16, 16, CPU, op=OPS["ssd"])
    odd = {
        "served": usual,
        "fp32": usual._replace(dtype=torch.float32),
        "dim": usual._replace(head_dim=24),
        "wide": usual._replace(v_head_dim=512),
    }
    filters = KernelRequirements(torch.float32, 1, 6, CPU, op=OPS["convolution"])
    others = {
        "filters": filters,
        "groups": filters._replace(grouped=True),
        "shift": filters._replace(op=OPS["token_shift"]),
    }
    reasons = {name: load_kernel("fla").unsupported_reason(needed) for name, needed in odd.items()}
    reasons |= {name: load_kernel("fla_conv1d").unsupported_reason(needed) for name, needed in others.items()}
    return {name: why or "" for name, why in reasons.items()}


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    torch.set_num_threads(1)
    make_kernels_run()
    # fla-core itself refuses a delta rule without decay in float32
    by_op = {name: largest_difference(name, torch.float32) for name in sys.argv[2:] if name != "delta_rule"}
    by_op |= {name: largest_difference(name, torch.float16) for name in sys.argv[2:] if name == "delta_rule"}
    chosen = {"ranks": over_ranks(), "convolutions": convolutions(), "operator": as_operator(), "refusals": refusals()}
    sys.stdout.write(json.dumps({"differences": by_op, **chosen}) + "\n")
