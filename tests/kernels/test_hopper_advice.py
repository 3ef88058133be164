"""If fla-core's kernels would compute per-token decays incorrectly, a message says what to install."""

import types

import pytest
import torch
from transformers import AutoConfig

from distattn.doctor import environment
from distattn.kernels.recurrence import hopper
from distattn.preflight.facts import kernel_advice


@pytest.fixture
def versions(monkeypatch):
    """Replace the versions of installed packages by a dictionary that tests can change."""
    installed = {"triton": "3.6.0", "fla-core": "0.6.0"}

    def version(name):
        if name not in installed:
            raise hopper.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(hopper, "version", version)
    monkeypatch.setattr(hopper, "find_spec", lambda name: installed.get(name))
    monkeypatch.setattr(hopper, "_has_nvcc", lambda: "nvcc" in installed)
    return installed


@pytest.mark.parametrize(("triton", "is_wrong"), [("3.3.1", False), ("3.4.0", True), ("3.7.0", True), ("3.7.1", False)])
def test_the_tritons_that_are_wrong_are_refused_on_hopper_alone(versions, triton, is_wrong):
    versions["triton"] = triton
    for has_delta_rule in (False, True):
        assert (hopper.token_decay_fault(90, has_delta_rule) is not None) == is_wrong
        assert hopper.token_decay_fault(80, has_delta_rule) is None
        assert hopper.token_decay_fault(100, has_delta_rule) is None


def test_the_triton_of_nightly_builds_counts(versions):
    versions["pytorch-triton"] = versions.pop("triton")
    assert "Triton 3.6.0" in str(hopper.token_decay_fault(90, True))


def test_the_advice_names_both_ways_out(versions):
    assert str(hopper.fla_core_advice(90)).endswith(
        "install torch 2.13 (Triton 3.7.1) or tilelang with the CUDA compiler nvcc"
    )
    del versions["fla-core"]
    assert hopper.fla_core_advice(90) is None


def test_tilelang_helps_the_delta_rule_alone_and_only_with_the_cuda_compiler(versions, monkeypatch):
    versions["tilelang"] = "0.1.15"
    assert hopper.token_decay_fault(90, True) is not None
    versions["nvcc"] = "13.0"
    assert hopper.token_decay_fault(90, True) is None
    assert str(hopper.fla_core_advice(90)).endswith(
        "(Mamba-2) wrongly on Hopper GPUs: install torch 2.13 (Triton 3.7.1)"
    )
    monkeypatch.setenv("FLA_TILELANG", "0")
    assert hopper.token_decay_fault(90, True) is not None


@pytest.mark.parametrize(
    ("model", "op"),
    [
        ("llama", None),
        ("kimi_linear", None),
        ("qwen3_next", "Gated DeltaNet"),
        ("mamba2", "Mamba-2"),
        ("zamba2", "Mamba-2"),
    ],
)
def test_the_preflight_says_it_only_of_models_with_such_layers(model, op, versions, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    advice = kernel_advice(torch.device("cuda", 0), AutoConfig.for_model(model))
    assert f"({op})" in advice if op else not advice


def test_the_doctor_says_it_of_each_gpu(versions, monkeypatch):
    properties = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    (check,) = [check for check in environment._devices() if check.name.startswith("kernel fla")]
    assert check.ok is None and "Triton 3.6.0" in check.state and "torch 2.13" in check.advice
