"""Stand-ins that let Megatron-core 0.16 train on gloo without CUDA. Only for tests and examples.

Import this module before any Megatron module. It does nothing if CUDA is available.
"""

import contextlib
import warnings
from typing import Any

import torch


def _on_cpu(make: Any) -> Any:
    def made(*args: Any, **named: Any) -> Any:
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        named.pop("pin_memory", None)
        return make(*args, **named)

    return made


def _type(self: torch.Tensor, *args: Any, **named: Any) -> Any:
    type_name = _TYPE(self, *args, **named)
    # optimizers check for the type name torch.cuda.FloatTensor
    return (
        type_name.replace("torch.", "torch.cuda.", 1)
        if isinstance(type_name, str) and not args and not named
        else type_name
    )


def _lists(make: Any) -> Any:
    """Convert split sizes to lists. Megatron does so only when it copies them from a device."""

    def made(*args: Any, **named: Any) -> Any:
        return make(
            *args, **{name: x.tolist() if "split" in name and x is not None else x for name, x in named.items()}
        )

    return made


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Return at once: on a CPU everything runs in order."""

    def record_event(self, *args: Any) -> "_Stream":
        return self

    synchronize = wait_event = lambda self, *args: None


_TYPE = torch.Tensor.type

if not torch.cuda.is_available():
    warnings.filterwarnings("ignore", module="megatron")
    # `with torch.device(...)` patches the functions that exist when it is first used
    with torch.device("meta"):
        torch.empty(0)
    torch.cuda.current_device = lambda: torch.device("cpu")
    # the experts' token dispatcher copies counts to the host on a side stream
    torch.cuda.Stream = torch.cuda.current_stream = lambda *args, **named: _Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.distributed.all_to_all_single = _lists(torch.distributed.all_to_all_single)
    for name in ("synchronize", "set_device", "manual_seed"):
        setattr(torch.cuda, name, lambda *args, **named: None)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **named: self
    torch.Tensor.type = _type
    for name in ("zeros", "ones", "empty", "tensor", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    random.model_parallel_cuda_manual_seed = lambda *args, **named: None
