"""What `distattn doctor` examines: a script's functions, or a transformers model with the defaults."""

# N tokens on the axis, T tokens on this rank, V vocabulary

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.adapters import huggingface, pytorch
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError

# uneven documents, one of a single token, with uneven labels
_LENGTHS = (41, 1, 23, 32)
_MOST_PARAMETERS = 300_000_000

SCRIPT = """A script for the doctor is a Python file with these functions; all but the first have defaults, written for models of
transformers with attn_implementation="distattn":

  model() -> torch.nn.Module                  with the same weights on every rank; on ranks (where torch.distributed is
                                              initialized) it may be wrapped: fully_shard, DDP, a DeepSpeed engine
  batch() -> dict                             as ContextParallel.shard takes it, the same on every rank
  context_parallel() -> ContextParallel       over the default process group
  prepare(cp, model)                          cp.loss_scale(trainer), say; nothing by default
  shard(cp, batch) -> dict                    this rank's part
  forward(model, part) -> logits (1, T, V)
  loss(logits, part) -> Tensor                this rank's share: shares add up to the loss
  backward(model, loss)                       and reduce gradients over ranks
  gradients(model) -> dict                    of every parameter, whole, after that
  reference(model, ids) -> logits (1, S, V)   of one document (1, S) in one process
"""


class Subject:
    """A model, a batch, and what a user does with them on several ranks."""

    def __init__(self, target: str):
        path = Path(target)
        self._script = _load(path) if path.suffix == ".py" else None
        if self._script is not None and not hasattr(self._script, "model"):
            raise DistattnError(f"{target} has no function model(); see distattn doctor --help.")
        self._config = None if self._script is not None else _config(path)

    def model(self) -> torch.nn.Module:
        """With its own weights."""
        if self._script is not None:
            return self._script.model()
        from transformers import AutoModelForCausalLM

        huggingface.register()
        torch.manual_seed(0)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(self._config).parameters())
        if size > _MOST_PARAMETERS:
            raise DistattnError(
                f"the model has {size / 1e9:.1f} billion parameters; the doctor runs it several times on this machine: give "
                "it a configuration with fewer layers and a smaller width."
            )
        return AutoModelForCausalLM.from_config(self._config, attn_implementation=huggingface.NAME)

    def batch(self, model: torch.nn.Module) -> dict[str, Any]:
        """What every rank holds."""
        if hasattr(self._script, "batch"):
            return self._script.batch()  # type: ignore[union-attr]
        vocabulary = pytorch.output_layer_of(pytorch.unwrapped(model)).weight.shape[0]  # type: ignore[union-attr,index]
        ids = torch.randint(0, int(vocabulary), (1, sum(_LENGTHS)), generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload]
        labels = ids.clone()
        labels[:, :20] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels, "document_lengths": list(_LENGTHS)}

    def context_parallel(self) -> ContextParallel:
        """Of this rank."""
        return self._or("context_parallel", lambda: ContextParallel(strategy="ring", kernel=kernel_here()))()

    def prepare(self, cp: ContextParallel, model: torch.nn.Module) -> None:
        """Before the first batch."""
        self._or("prepare", lambda cp, model: None)(cp, model)

    def shard(self, cp: ContextParallel, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part."""
        return self._or("shard", lambda cp, batch: cp.shard(batch))(cp, batch)

    def forward(self, model: torch.nn.Module, part: Mapping[str, Any]) -> Tensor:
        """Logits (1, T, V)."""
        return self._or("forward", pytorch.forward)(model, part)

    @staticmethod
    def plain_forward(model: torch.nn.Module, part: Mapping[str, Any]) -> Tensor:
        """As `forward` without the script: what mistakes are imagined with."""
        if hasattr(model, "set_attn_implementation"):
            huggingface.register()
            model.set_attn_implementation(huggingface.NAME)  # type: ignore[operator]
        return pytorch.forward(model, part)

    def loss(self, logits: Tensor, part: Mapping[str, Any]) -> Tensor:
        """This rank's share."""
        return self._or("loss", pytorch.loss_of)(logits, part)

    def backward(self, model: torch.nn.Module, loss: Tensor) -> None:
        """And reduce."""
        self._or("backward", _backward)(model, loss)

    def gradients(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Of every parameter that has one."""
        return self._or("gradients", _gradients)(model)

    def reference(self, model: torch.nn.Module, ids: Tensor) -> Tensor:
        """Logits (1, S, V) of one document, in one process."""
        return self._or("reference", _reference)(model, ids)

    def one_process(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Inside which `reference` runs, and its backward pass."""
        ours = hasattr(model, "set_attn_implementation") and not hasattr(self._script, "reference")
        return huggingface.single_process_attention(model) if ours else nullcontext()

    def _or(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return getattr(self._script, name, default)


def kernel_here() -> str | None:
    """The device's own on a GPU; on CPUs the one that computes everything, slowly."""
    return None if torch.cuda.is_available() else "reference"


def _backward(model: torch.nn.Module, loss: Tensor) -> None:
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    named = pytorch.unwrapped(model).named_parameters()
    return {name: pytorch.full_tensor(p.grad).clone() for name, p in named if p.grad is not None}


def _reference(model: Any, ids: Tensor) -> Tensor:
    if not hasattr(model, "set_attn_implementation"):
        raise DistattnError(
            f"{type(model).__name__} is not of transformers: the script has to define reference(model, ids)."
        )
    return model(ids, use_cache=False).logits


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise DistattnError(f"there is no script {path}.")
    spec = importlib.util.spec_from_file_location("doctors_subject", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # what it imports lies beside it
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DistattnError(f"{path} cannot be imported: {said(error)}") from None
    for name, ours in vars(Subject).items():
        theirs = getattr(module, name, None)
        if name.startswith("_") or theirs is None or not inspect.isfunction(ours):
            continue
        wanted = [p for p in inspect.signature(ours).parameters if p != "self"]
        if name in ("model", "batch"):
            wanted = []
        try:
            inspect.signature(theirs).bind(*wanted)
        except TypeError:
            how = f"takes {', '.join(wanted) or 'nothing'}"
            raise DistattnError(f"{path}: {name} is a function that {how}; see distattn doctor --help.") from None
    return module


def said(error: BaseException) -> str:
    """An error in one line: what, and where in whose file."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    if isinstance(error, SyntaxError):
        where = f"{Path(error.filename or '').name}, line {error.lineno}"
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]} ({where})"


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    if not path.exists():
        raise DistattnError(
            f"{path} is neither a script (.py) nor a transformers configuration (a folder or config.json)."
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DistattnError(
            f"{path}: no configuration that transformers can read: {str(error).splitlines()[0]}"
        ) from None
