"""The Triton kernels that layer calls launch, found by running the executor on real plans and recording its launches.

Nothing is computed and no GPU is needed: the executor runs on small CPU tensors with the tile sizes of a given
architecture, no messages are sent, and every launch is recorded instead of run. So the lint compiles a new variant as
soon as the executor uses it, without a change to the lint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import POLICIES, Plan
from distattn.kernels import glue
from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.registry import KERNELS, kernel_preparer, load_kernel
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton import glue as triton_glue
from distattn.kernels.triton.launch import TritonLaunch
from distattn.ops.attention import backward_pass, forward_pass
from distattn.ops.executable import Executable, ExecutionKey, kernel_requirements
from distattn.parallel.make_plan import STRATEGIES, make_plan
from distattn.parallel.runtime.communication.transport import Packet
from distattn.parallel.runtime.execution.execute import run_to_completion
from distattn.parallel.runtime.lowering.lower import lower

CPU = torch.device("cpu")
# documents of a few tiles each, some on several ranks
LENGTHS = (700, 260, 64)
RANKS = 4
_TIERS = ("distattn.kernels.triton", "distattn.kernels.gluon")
_GLUE = ("rows_kernel", "merge_kernel", "products_kernel", "rows_with_products_kernel")


class ShapeOfCall(NamedTuple):
    """The shape of a layer's calls. aligned: True if the caller's tensors start at multiples of 16 bytes."""

    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    heads: int = 8
    kv_heads: int = 2
    aligned: bool = True


# the shapes to record launches for; the lint's own table has more head dims, dtypes and modifiers
SHAPES = (
    ShapeOfCall(torch.bfloat16, 128, 128),
    ShapeOfCall(torch.bfloat16, 128, 128, aligned=False),
    ShapeOfCall(torch.bfloat16, 64, 64),
    ShapeOfCall(torch.float32, 128, 128),
)


def production_launches(
    arch: int, shape: ShapeOfCall, strategies: Iterable[str] = STRATEGIES
) -> list[tuple[str, TritonLaunch]]:
    """Return (registered kernel, launch) for all launches of layer calls with a shape on an architecture (80, 90, ...).

    Every kernel that supports the shape on the architecture is run on plans of `strategies` with every backward policy.
    """
    launches: list[tuple[str, TritonLaunch]] = []
    with _architecture(arch):
        for name in _kernels_of(shape):
            with _recording(name, launches):
                for plan in _plans(tuple(strategies), *shape[:5]):
                    for rank in (0, RANKS - 1):
                        _run_layer(plan, rank, name, shape)
    return [(name, launch) for name, launch in launches if launch.grid[0]]


@contextmanager
def _architecture(arch: int) -> Iterator[None]:
    """Give all devices the compute capability `arch` while in the block."""
    with ExitStack() as patches:
        for tier in (triton_attention, gluon_attention):
            patches.enter_context(mock.patch.object(tier, "compute_capability", lambda device: arch))
        yield


@contextmanager
def _recording(name: str, launches: list[tuple[str, TritonLaunch]]) -> Iterator[None]:
    """Append launches to `launches`, under the kernel's name or "glue", instead of running them while in the block."""
    with ExitStack() as patches:
        for tier in (triton_attention, gluon_attention):
            patches.enter_context(mock.patch.object(tier, "run_launch", lambda launch: launches.append((name, launch))))
        patches.enter_context(mock.patch.object(glue, "_on_gpu", lambda x: True))
        for kernel in _GLUE:
            recorded = _Recorded(getattr(triton_glue, kernel), launches)
            patches.enter_context(mock.patch.object(triton_glue, kernel, recorded))
        yield


def _kernels_of(shape: ShapeOfCall) -> list[str]:
    """Return the registered kernels that launch Triton kernels and can serve calls of the given shape on a GPU."""
    needed = KernelRequirements(shape.dtype, shape.head_dim, shape.v_head_dim, torch.device("cuda"))
    ours = [name for name, module in KERNELS.items() if module.startswith(_TIERS)]
    # TF32 only affects float32; in half precision, "triton_tf32" launches the same kernels as "triton"
    ours = [name for name in ours if name != "triton_tf32" or shape.dtype == torch.float32]
    return [name for name in ours if load_kernel(name).unsupported_reason(needed) is None]


@cache
def _plans(
    strategies: tuple[str, ...], dtype: torch.dtype, head_dim: int, v_head_dim: int, heads: int, kv_heads: int
) -> list[Plan]:
    """Return a plan for each strategy and backward policy that supports calls with the given heads and dims."""
    of_call = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)
    mask, layout = Mask.documents(LENGTHS), Layout.zigzag(LENGTHS, RANKS)
    plans = []
    for strategy in strategies:
        for policy in POLICIES:
            # some strategies cannot split so few heads
            with suppress(DistattnError):
                plans.append(make_plan(mask, layout, strategy=strategy, backward=policy, **of_call))
    return plans


def _run_layer(plan: Plan, rank: int, kernel: str, shape: ShapeOfCall) -> None:
    """Run the forward and backward pass of one rank's layer call."""
    # bypass the cache of executables, whose key does not include the architecture
    finishes = getattr(load_kernel(kernel), "FINISHES", ())
    program = lower(plan, rank, kernel_preparer(kernel, kernel_requirements(plan.call, CPU)), finishes=finishes)
    ready = Executable(program, ExecutionKey(rank, kernel, CPU), _NoTransport())

    def tensor(heads: int, width: int) -> Tensor:
        numbers = torch.zeros(program.tokens * heads * width + 1, dtype=shape.dtype)
        return numbers[0 if shape.aligned else 1 :][: numbers.numel() - 1].view(program.tokens, heads, width)

    q, do = tensor(shape.heads, shape.head_dim), tensor(shape.heads, shape.v_head_dim)
    k, v = tensor(shape.kv_heads, shape.head_dim), tensor(shape.kv_heads, shape.v_head_dim)
    o, lse, kept = run_to_completion(forward_pass(ready, q, k, v, None, None, 0.1, 0.0))
    run_to_completion(backward_pass(ready, do, None, q, k, v, None, None, o, lse, kept, 0.1, 0.0))


class _NoTransport:
    """A transport that delivers nothing."""

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = "") -> Any:
        """Return an object whose `wait` returns immediately."""
        return self

    def wait(self) -> None:
        """Return immediately."""


class _Recorded:
    """A kernel whose launches are recorded instead of run."""

    def __init__(self, kernel: Any, launches: list[tuple[str, TritonLaunch]]):
        self.kernel, self.found = kernel, launches

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, values, strict=False)) | named
            self.found.append(("glue", TritonLaunch(self.kernel, grid, arguments, {})))

        return launch


def named_launches(launches: list[tuple[str, TritonLaunch]]) -> dict[str, TritonLaunch]:
    """Return one launch of each kind, keyed by a name that describes what Triton compiles: types, flags and argument
    specializations.

    The name starts with the first registered kernel that makes the launch. The rest of the name does not depend on the
    other launches.
    """
    by_description: dict[str, tuple[str, TritonLaunch]] = {}
    for kernel, launch in launches:
        by_description.setdefault(_description(launch), (kernel, launch))
    return {f"{kernel} {description}": launch for description, (kernel, launch) in by_description.items()}


def _description(launch: TritonLaunch) -> str:
    arguments = launch.arguments
    tensors = {name: _tensor(value).dtype for name, value in arguments.items() if isinstance(_tensor(value), Tensor)}
    usual, *_ = tensors.values()
    # leave out integer tensors, which are lists of tiles or rows
    types = [f"{name.rstrip('_')}={str(dtype)[6:]}" for name, dtype in tensors.items() if dtype.is_floating_point]
    types = [str(usual)[6:], *(part for part in types if not part.endswith(f"={str(usual)[6:]}"))]
    dims = "/".join(str(arguments[name]) for name in ("D0", "E0", "D", "E", "WIDTH") if name in arguments)
    flags = [name.lower() for name, value in arguments.items() if value is True]
    flags += [value for name, value in arguments.items() if isinstance(value, str)]
    return " ".join([launch.kernel.fn.__name__, dims, *types, *flags, *_specialised(launch)])


def _specialised(launch: TritonLaunch) -> list[str]:
    """Return constants, and arguments that Triton specializes: integers equal to 1, and integers and addresses not
    divisible by 16."""
    constants = []
    unaligned, odd, ones = [], [], []
    for parameter in launch.kernel.params:
        name, value = parameter.name.rstrip("_"), launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants += [f"{name}={value}"] if type(value) is int else []
        elif not parameter.do_not_specialize and value is not None:
            if isinstance(value, Tensor):
                unaligned += [name] if value.data_ptr() % 16 and not parameter.do_not_specialize_on_alignment else []
            elif isinstance(value, int):
                if value == 1:
                    ones.append(name)
                elif value % 16 and not parameter.do_not_specialize_on_alignment:
                    odd.append(name)
    constants += [f"unaligned={','.join(unaligned)}"] * bool(unaligned)
    constants += [f"odd={','.join(odd)}"] * bool(odd)
    return constants + [f"1={','.join(ones)}"] * bool(ones)


def _tensor(value: Any) -> Any:
    """Return a descriptor's tensor, or the value itself if it is not a descriptor."""
    return getattr(value, "base", value)
