"""Properties of all operators: the device they run on, and that CUDA graphs exclude those that run plans."""

import gc
import importlib
import pkgutil

import pytest
import torch
from imitated_cuda import DEVICE, TENSORS_ON, imitated_cuda

import distattn as da
import distattn.ops
from distattn.kernels import devices, glue, trials
from distattn.kernels.devices import current_device
from distattn.kernels.spec import KernelRequirements
from distattn.ops import convolution, latent, prefix_max, recurrence  # noqa: F401
from distattn.ops.executable import EXECUTABLES

# operators that run a plan, send messages and wait for the upload of its tables
RUN_PLANS = [
    f"{op}{direction}" for op in ("", "latent_", "recurrence_", "convolution_") for direction in ("forward", "backward")
]
# operators that only launch a single kernel on the current stream
LAUNCH_ONE_KERNEL = ["copy_rows", "add_rows", "merge_rows", "copy_rows_with_products", "row_products"]
OPERATORS = RUN_PLANS + LAUNCH_ONE_KERNEL
# a value for each argument type
VALUES = {"Tensor": torch.zeros(2, 2, 2), "SymInt": 2, "int": 0, "float": 1.0}


class Reached(Exception):
    """Raised at the point where an operator would start work on the device."""


def operator(name):
    return getattr(torch.ops.distattn, name).default


def test_all_operators_are_known_here():
    for module in pkgutil.iter_modules(distattn.ops.__path__):
        importlib.import_module(f"distattn.ops.{module.name}")
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("distattn::")]
    assert sorted(names) == sorted(OPERATORS)
    assert {
        name for name in names if "plan" in {argument.name for argument in operator(name)._schema.arguments}
    } == set(RUN_PLANS)


@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_graphs_leave_out_what_runs_a_plan(name):
    # Inductor's scheduler splits a graph at operators with this tag and captures the others
    assert (torch.Tag.cudagraph_unsafe in operator(name).tags) == (name in RUN_PLANS)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_works_on_the_device_of_its_tensors(name, monkeypatch):
    reached_on = []

    def reach(*_):
        reached_on.append(torch.cuda.current_device())
        raise Reached

    monkeypatch.setattr(EXECUTABLES, "by_handle", reach)
    monkeypatch.setattr(glue, "_on_gpu", reach)
    # undo this patch before imitated_cuda ends; otherwise it would restore the imitation's value
    with imitated_cuda(current=0) as cuda, monkeypatch.context() as patch:
        # otherwise PyTorch would only compute shapes for "meta" tensors
        patch.setattr(devices, "_KINDS", {"cpu"})
        with pytest.raises(Reached):
            operator(name)(*(VALUES.get(str(argument.type)) for argument in operator(name)._schema.arguments))
        assert reached_on == [TENSORS_ON] and cuda.devices_set == 1
        assert cuda.current == 0


def test_a_prefix_maximum_works_on_the_device_of_its_tensors(monkeypatch):
    how = dict(strategy="scan", op="prefix_max", heads=2, kv_heads=2, head_dim=1, v_head_dim=4, dtype="float32")
    plan = da.make_plan(da.Mask.causal(64), da.Layout.contiguous((64,), 1), **how)
    reached_on = []
    monkeypatch.setattr(
        prefix_max.execute_prefix_max, "forward", lambda *_: reached_on.append(torch.cuda.current_device()) or iter(())
    )
    monkeypatch.setattr(prefix_max, "run_to_completion", lambda run: (None, None))
    with imitated_cuda(current=0):
        prefix_max.prefix_max(torch.zeros(64, 2, 4, device=DEVICE), da.prepare(plan, device=DEVICE))
    assert reached_on == [TENSORS_ON]


def test_kernels_are_tried_on_the_device_of_the_call():
    tried_on = []

    def differences(kernel):
        tried_on.append(torch.cuda.current_device())
        return [0.0]

    with imitated_cuda(current=0):
        needed = KernelRequirements(torch.float32, 8, 8, DEVICE)
        trials.try_each(["reference"], needed, differences, lambda kernel: 0.0, lambda line: None)
    assert tried_on == [TENSORS_ON]


def test_a_launch_on_a_device_without_tensors_is_found():
    with imitated_cuda(current=0) as cuda:
        torch.cuda.current_stream()
        with current_device(DEVICE):
            torch.cuda.current_stream()
        gc.collect()
        assert cuda.clocks.violations == [
            "the current stream is asked for on device 0, where no tensor is (the main thread)"
        ]
