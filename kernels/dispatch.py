"""Which kernel computes core attention. Explicit: a kernel that cannot serve a call refuses, nothing falls back."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from distattn.errors import DistattnError
from distattn.kernels.cells import Cells
from distattn.kernels.score import Demand, Score

if TYPE_CHECKING:
    from torch import Tensor

# names are known without importing torch
KERNELS = {"reference": "distattn.kernels.reference", "cpu": "distattn.kernels.cpu"}


class Kernel(Protocol):
    """What a kernel module provides.

    DIFFERENTIABLE_LSE says whether `backward` is right for any delta, so that gradients may flow through the log-sum-exp.
    `prepare` turns cells into the kernel's own form once per plan; `forward` and `backward` take that form.
    """

    DIFFERENTIABLE_LSE: bool

    def refusal(self, demand: Demand) -> str | None: ...

    def prepare(self, cells: Cells) -> Any: ...

    def forward(
        self, q_THD: Tensor, k_SKD: Tensor, v_SKE: Tensor, work: Any, score: Score, /
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        do_THE: Tensor,
        q_THD: Tensor,
        k_SKD: Tensor,
        v_SKE: Tensor,
        lse_TH: Tensor,
        delta_TH: Tensor,
        work: Any,
        score: Score,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def load_kernel(name: str) -> Kernel:
    """The kernel of that name."""
    if name not in KERNELS:
        raise DistattnError(f"kernel {name!r} does not exist; there are {', '.join(KERNELS)}.")
    return cast(Kernel, import_module(KERNELS[name]))


def choose_kernel(name: str | None, demand: Demand) -> str:
    """The kernel's name: `name` if it can serve the call, "cpu" for CPU tensors when None. Raises DistattnError."""
    if name is None:
        if demand.device.type != "cpu":
            raise DistattnError(
                f'there is no default kernel for {demand.device.type} tensors yet; pass kernel="reference".'
            )
        name = "cpu"
    why_not = load_kernel(name).refusal(demand)
    if why_not:
        raise DistattnError(f'kernel "{name}" cannot serve this call: {why_not}. Use kernel="reference".')
    return name
