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


_TYPE = torch.Tensor.type

if not torch.cuda.is_available():
    warnings.filterwarnings("ignore", module="megatron")
    # `with torch.device(...)` knows the functions that are there when it is first used
    with torch.device("meta"):
        torch.empty(0)
    torch.cuda.current_device = lambda: torch.device("cpu")
    for name in ("synchronize", "set_device", "manual_seed"):
        setattr(torch.cuda, name, lambda *given, **named: None)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *given, **named: self
    torch.Tensor.type = _type
    for name in ("zeros", "ones", "empty", "tensor", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    random.model_parallel_cuda_manual_seed = lambda *given, **named: None
