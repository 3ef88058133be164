"""Trials of convolution kernels: each is compared with `taps` in fp64 on packed documents, and timed."""

# T tokens, H heads of D channels each, W taps

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.ir.mask import Mask
from distattn.kernels.convolution import taps
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.trials import Trial, median_seconds, try_each
from distattn.kernels.triton.launch import schedule_to_device

# document lengths for the comparison and for timing; the number of taps that most models have
_COMPARED, _TIMED, _TAPS = (150, 1, 64, 33), (2048, 1500, 548), 4
_SEED = 1234


class ConvolutionInputs(NamedTuple):
    """Tokens x and output gradients do (T, H, D), weights (H, D, W), and the mask to compute."""

    x: Tensor
    do: Tensor
    weight: Tensor
    mask: LaunchMask

    @staticmethod
    def random(lengths: Sequence[int], heads: int, requirements: KernelRequirements) -> ConvolutionInputs:
        """Return random inputs for packed documents of these lengths."""
        generator = torch.Generator(requirements.device).manual_seed(_SEED)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=requirements.device)
            return values.to(requirements.dtype)

        tokens, dim = sum(lengths), requirements.v_head_dim
        mask = LaunchMask.from_mask(Mask.documents(lengths, (_TAPS - 1, 0)), heads, heads)
        return ConvolutionInputs(
            normal(tokens, heads, dim), normal(tokens, heads, dim), normal(heads, dim, _TAPS), mask
        )


def try_convolution(
    names: Sequence[str],
    requirements: KernelRequirements,
    heads: int,
    key_heads: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Trial]:
    """Try kernels on convolutions with `heads` heads. `key_heads` is ignored."""
    return try_each(
        names,
        requirements,
        lambda kernel: differences(kernel, ConvolutionInputs.random(_COMPARED, heads, requirements), requirements),
        lambda kernel: _seconds(kernel, ConvolutionInputs.random(_TIMED, heads, requirements), requirements),
        report,
    )


def differences(kernel: Any, inputs: ConvolutionInputs, requirements: KernelRequirements) -> list[float]:
    """Return the relative difference (Frobenius norm) between each of the kernel's results and that of `taps` in fp64."""
    exact = ConvolutionInputs(inputs.x.double(), inputs.do.double(), inputs.weight.double(), inputs.mask)
    pairs = zip(_work(kernel, inputs, requirements)(), _work(taps, exact, requirements)(), strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def _seconds(kernel: Any, inputs: ConvolutionInputs, requirements: KernelRequirements) -> float:
    return median_seconds(_work(kernel, inputs, requirements), requirements.device)


def _work(kernel: Any, inputs: ConvolutionInputs, requirements: KernelRequirements) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs the kernel's forward and backward passes, and returns (y, dx, dweight)."""
    x, do, weight, mask = inputs
    schedule = schedule_to_device(kernel.prepare(mask, requirements), requirements.device)

    def run() -> tuple[Tensor, ...]:
        return kernel.forward(x, weight, schedule), *kernel.backward(do, x, weight, schedule)

    return run
