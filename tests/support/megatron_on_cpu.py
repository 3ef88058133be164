"""What megatron-core 0.16 needs to train without CUDA, on gloo. For tests and examples here only.

Import it before anything of megatron; it does nothing where CUDA is.
"""

import contextlib
import warnings
from typing import Any

import torch


def _on_cpu(make: Any) -> Any:
    def made(*given: Any, **named: Any) -> Any:
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        named.pop("pin_memory", None)
        return make(*given, **named)

    return made


def _type(self: torch.Tensor, *given: Any, **named: Any) -> Any:
    found = _TYPE(self, *given, **named)
    # optimizers look for torch.cuda.FloatTensor
    return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) and not given and not named else found


def _lists(make: Any) -> Any:
    """Splits that Megatron copies to the host where they are on a device are not lists on a CPU."""

    def made(*given: Any, **named: Any) -> Any:
        return make(
            *given, **{name: x.tolist() if "split" in name and x is not None else x for name, x in named.items()}
        )

    return made


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Everything is done in turn."""

    def record_event(self, *given: Any) -> "_Stream":
        return self

    synchronize = wait_event = lambda self, *given: None


_TYPE = torch.Tensor.type

if not torch.cuda.is_available():
    warnings.filterwarnings("ignore", module="megatron")
    # `with torch.device(...)` knows the functions that are there when it is first used
    with torch.device("meta"):
        torch.empty(0)
    torch.cuda.current_device = lambda: torch.device("cpu")
    # what sends tokens to experts copies counts to the host beside them
    torch.cuda.Stream = torch.cuda.current_stream = lambda *given, **named: _Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.distributed.all_to_all_single = _lists(torch.distributed.all_to_all_single)
    for name in ("synchronize", "set_device", "manual_seed"):
        setattr(torch.cuda, name, lambda *given, **named: None)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *given, **named: self
    torch.Tensor.type = _type
    for name in ("zeros", "ones", "empty", "tensor", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    random.model_parallel_cuda_manual_seed = lambda *given, **named: None
