"""Where fla-core's kernels would compute decays of tokens wrongly, what to install is said."""

import types

import pytest

from distattn.kernels.recurrence import hopper


@pytest.fixture
def versions(monkeypatch):
    """The versions of installed packages, to be changed."""
    installed = {"triton": "3.6.0", "fla-core": "0.6.0"}

    def version(name):
        if name not in installed:
            raise hopper.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(hopper, "version", version)
    monkeypatch.setattr(hopper, "find_spec", lambda name: installed.get(name))
    return installed


@pytest.mark.parametrize(("triton", "is_wrong"), [("3.3.1", False), ("3.4.0", True), ("3.7.0", True), ("3.7.1", False)])
def test_the_tritons_that_are_wrong_are_refused_on_hopper_alone(versions, triton, is_wrong):
    versions["triton"] = triton
    assert (hopper.token_decay_fault(90) is not None) == is_wrong
    assert hopper.token_decay_fault(80) is None and hopper.token_decay_fault(100) is None


def test_the_advice_names_both_ways_out(versions):
    assert hopper.fla_core_advice(90).endswith("install torch 2.13 (Triton 3.7.1) or tilelang")
    versions["tilelang"] = "0.1.15"
    assert hopper.fla_core_advice(90) is None
    del versions["tilelang"], versions["fla-core"]
    assert hopper.fla_core_advice(90) is None


def test_the_doctor_says_it_of_each_gpu(versions, monkeypatch):
    import torch

    from distattn.doctor import environment

    known = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    (check,) = [check for check in environment._devices() if check.name.startswith("kernel fla")]
    assert check.ok is None and "Triton 3.6.0" in check.found and "torch 2.13" in check.advice
