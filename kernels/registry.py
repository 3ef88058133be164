"""The table of kernels, and the choice of a kernel for a call. Choosing a kernel that cannot serve the call raises an error."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from distattn.ir.errors import DistattnError
from distattn.ir.op import ATTENTION, Op
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements, ScoreMod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# attention kernels by name; the values are module names, so that listing the kernels does not import torch
KERNELS = {
    "reference": "distattn.kernels.reference",
    "cpu": "distattn.kernels.cpu",
    "flash": "distattn.kernels.flash.attention",
    "triton": "distattn.kernels.triton.attention",
    "triton_tf32": "distattn.kernels.triton.tf32",
    "gluon": "distattn.kernels.gluon.attention",
    "gluon_split": "distattn.kernels.gluon.split",
}
# kernels for other kinds of ops
OTHER_KERNELS: dict[str, dict[str, str]] = {
    "recurrence": {
        "chunked": "distattn.kernels.recurrence.chunked",
        "triton_chunked": "distattn.kernels.recurrence.triton.kernel",
        "fla": "distattn.kernels.recurrence.fla",
    },
    "prefix_max": {"cummax": "distattn.kernels.recurrence.cummax"},
    "convolution": {"taps": "distattn.kernels.convolution.taps", "fla_conv1d": "distattn.kernels.convolution.fla"},
}
# the names of the extras that kernels need, keyed by kernel
_EXTRAS = {"fla": "fla", "fla_conv1d": "fla"}
# the name that stands for the fastest kernel that trials find correct (see `trials`)
AUTO = "auto"
# the kernels that run on CPUs: with any of them, a run needs no GPU
CPU_KERNELS = ("reference", "cpu")
# kernels and their deterministic replacements under torch.use_deterministic_algorithms
_DETERMINISTIC = {"gluon": "gluon_split"}
_DEFAULTS = {"cpu": "cpu", "cuda": "triton"}
# the kernels that "auto" tries, by device type, in order of preference
CANDIDATES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("gluon", "flash", "triton")}
# the kernels that "auto" tries for other kinds of ops; the last kernel serves every call on every device
_OTHER_CANDIDATES: dict[str, dict[str, tuple[str, ...]]] = {
    "recurrence": {"cuda": ("fla", "triton_chunked", "chunked")},
    "convolution": {"cuda": ("fla_conv1d", "taps")},
}


def candidate_kernels(device: torch.device, op: Op = ATTENTION) -> tuple[str, ...]:
    """Return the kernels that "auto" may choose on a device. In PyTorch's deterministic mode, all of them are deterministic."""
    import torch

    if op.kind in OTHER_KERNELS:
        every = tuple(OTHER_KERNELS[op.kind])[:1]
        return _OTHER_CANDIDATES.get(op.kind, {}).get(device.type, every)
    names = CANDIDATES.get(device.type, ())
    fixed = torch.are_deterministic_algorithms_enabled()
    return tuple(_DETERMINISTIC.get(name, name) if fixed else name for name in names)


class Kernel(Protocol):
    """The functions and flags of a kernel module.

    DIFFERENTIABLE_LSE: `backward` is correct for any delta, so gradients may flow through the log-sum-exp. ACCUMULATES:
    `forward` and `backward` also accept `into`, the tensors to write results to, to merge them into (`merge`) or to add
    them to (`add`). A kernel may have FINISHES, the directions in which it also accepts `final` (see `FinalRows`).
    `prepare` turns a launch mask into the kernel's schedule once per plan; `forward` and `backward` receive this
    schedule. A kernel that can predict its memory also has `workspace_bytes(direction, shape, schedule)`.
    """

    DIFFERENTIABLE_LSE: bool
    ACCUMULATES: bool

    def unsupported_reason(self, requirements: KernelRequirements) -> str | None: ...

    def prepare(self, mask: LaunchMask, requirements: KernelRequirements) -> Any: ...

    def forward(
        self, q_THD: Tensor, k_SKD: Tensor, v_SKE: Tensor, schedule: Any, score: ScoreMod, /, **into: Any
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        do_THE: Tensor,
        q_THD: Tensor,
        k_SKD: Tensor,
        v_SKE: Tensor,
        lse_TH: Tensor,
        delta_TH: Tensor,
        schedule: Any,
        score: ScoreMod,
        /,
        **into: Any,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def load_kernel(name: str) -> Kernel:
    """Import and return a kernel module. Raise DistattnError for an unknown kernel, or if a package that it needs is missing."""
    modules = dict(KERNELS)
    for some in OTHER_KERNELS.values():
        modules |= some
    if name not in modules:
        raise DistattnError(f"kernel {name!r} does not exist; there are {AUTO}, {', '.join(KERNELS)}.")
    try:
        return cast(Kernel, import_module(modules[name]))
    except ModuleNotFoundError as error:
        way_out = f': pip install "distattn[{_EXTRAS[name]}]"' if name in _EXTRAS else ""
        raise DistattnError(f'kernel "{name}" needs {error.name}, which is not installed here{way_out}.') from None


def kernel_preparer(name: str, requirements: KernelRequirements) -> Callable[[Any], Any]:
    """Return a function that turns a launch mask, or the segments of a recurrence, into the kernel's schedule."""
    kernel = load_kernel(name)
    if requirements.op.kind == "latent_attention":
        # describe the kernel's call, in which every query head has its own expanded keys and values
        return lambda mask: kernel.prepare(mask._replace(kv_heads=mask.heads, group_size=1, first_head=0), requirements)
    return lambda mask: kernel.prepare(mask, requirements)


def _way_out(requirements: KernelRequirements) -> str:
    """Return advice for a rejected call: the device's default kernel if it can serve the call, otherwise the reference."""
    if requirements.op.kind in OTHER_KERNELS:
        return f'Use kernel="{next(iter(OTHER_KERNELS[requirements.op.kind]))}".'
    name = _DEFAULTS.get(requirements.device.type, "reference")
    if load_kernel(name).unsupported_reason(requirements):
        name = "reference"
    return f'Use kernel="{name}".'


def choose_kernel(name: str | None, requirements: KernelRequirements) -> str:
    """Return the kernel for a call: `name` itself, or if it is None or "auto" the device's default ("cpu", "triton").

    `ops.kernel_choice` chooses by trial. Under torch.use_deterministic_algorithms, "gluon" becomes "gluon_split". Raise
    DistattnError if the kernel cannot serve the call.
    """
    op = requirements.op
    of_op = OTHER_KERNELS.get(op.kind, KERNELS)
    if name not in (None, AUTO, *of_op) and (
        of_op is not KERNELS or any(name in some for some in OTHER_KERNELS.values())
    ):
        raise DistattnError(f'kernel "{name}" does not compute {op.name}; there are {AUTO}, {", ".join(of_op)}.')
    if of_op is not KERNELS:
        name = next(iter(of_op)) if name in (None, AUTO) else name
    elif name in (None, AUTO):
        if requirements.device.type not in _DEFAULTS:
            raise DistattnError(
                f'there is no default kernel for {requirements.device.type} tensors; pass kernel="reference".'
            )
        name = _DEFAULTS[requirements.device.type]
        if op.kind == "latent_attention" and load_kernel(name or "").unsupported_reason(requirements):
            # expanded keys are wider than values, which the default kernel may not support
            name = "reference"
    import torch

    if name in _DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
        name = _DETERMINISTIC[name]
    why_not = load_kernel(name).unsupported_reason(requirements)
    if why_not:
        raise DistattnError(f'kernel "{name}" cannot serve this call: {why_not}. {_way_out(requirements)}')
    return name
