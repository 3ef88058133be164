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
  setup(cp, model)                            cp.loss_scale(trainer), say; nothing by default
  shard(cp, batch) -> dict                    this rank's part
  forward(model, part) -> logits (1, T, V)
  loss(logits, part) -> Tensor                this rank's share: shares add up to the loss
  backward(model, loss)                       and reduce gradients over ranks
  gradients(model) -> dict                    of every parameter, whole, after that
  reference(model, ids) -> logits (1, S, V)   of one document (1, S) in one process
"""


class Target:
    """A model, a batch, and what a user does with them on several ranks."""

    def __init__(self, target: str):
        path = Path(target)
        self._script = _load(path) if path.suffix == ".py" else None
        if self._script is not None and not hasattr(self._script, "model"):
            raise DistattnError(f"{target} has no function model(); see distattn doctor --help.")
        self._config = None if self._script is not None else _config(path)

    def model(self) -> torch.nn.Module:
        """Make the model, with the weights it begins with. Raises DistattnError where it is too large to be run several times."""
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
        """Make the batch that every rank holds whole, as `ContextParallel.shard` takes it."""
        if hasattr(self._script, "batch"):
            return self._script.batch()  # type: ignore[union-attr]
        vocabulary = pytorch.output_layer_of(pytorch.unwrapped(model)).weight.shape[0]  # type: ignore[union-attr,index]
        ids = torch.randint(0, int(vocabulary), (1, sum(_LENGTHS)), generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload]
        labels = ids.clone()
        labels[:, :20] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels, "document_lengths": list(_LENGTHS)}

    def context_parallel(self) -> ContextParallel:
        """Make this rank's ContextParallel, over the default process group."""
        return self._function("context_parallel", lambda: ContextParallel(strategy="ring", kernel=default_kernel()))()

    def setup(self, cp: ContextParallel, model: torch.nn.Module) -> None:
        """Do what the script wants done before the first batch."""
        self._function("setup", lambda cp, model: None)(cp, model)

    def shard(self, cp: ContextParallel, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Take this rank's part of the batch."""
        return self._function("shard", lambda cp, batch: cp.shard(batch))(cp, batch)

    def forward(self, model: torch.nn.Module, part: Mapping[str, Any]) -> Tensor:
        """Compute this rank's logits (1, T, V)."""
        return self._function("forward", pytorch.forward)(model, part)

    @staticmethod
    def plain_forward(model: torch.nn.Module, part: Mapping[str, Any]) -> Tensor:
        """Compute logits as `forward` does without the script: with it hypotheses are run."""
        if hasattr(model, "set_attn_implementation"):
            huggingface.register()
            model.set_attn_implementation(huggingface.NAME)  # type: ignore[operator]
        return pytorch.forward(model, part)

    def loss(self, logits: Tensor, part: Mapping[str, Any]) -> Tensor:
        """Compute this rank's share of the loss; shares add up to it."""
        return self._function("loss", pytorch.loss_of)(logits, part)

    def backward(self, model: torch.nn.Module, loss: Tensor) -> None:
        """Run the backward pass, and sum gradients over ranks."""
        self._function("backward", _backward)(model, loss)

    def gradients(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Return the whole gradient of every parameter that has one, by name."""
        return self._function("gradients", _gradients)(model)

    def reference(self, model: torch.nn.Module, ids: Tensor) -> Tensor:
        """Compute the logits (1, S, V) of one document (1, S) in one process."""
        return self._function("reference", _reference)(model, ids)

    def reference_context(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Make the context in which `reference` is to be run, and its backward pass."""
        ours = hasattr(model, "set_attn_implementation") and not hasattr(self._script, "reference")
        return huggingface.single_process_attention(model) if ours else nullcontext()

    def _function(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The script's function of this name, or the default."""
        return getattr(self._script, name, default)


def default_kernel() -> str | None:
    """Name the kernel where a script names none: the device's own on GPUs; on CPUs the slow one that computes everything."""
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
    spec = importlib.util.spec_from_file_location("doctor_target", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # what it imports lies beside it
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DistattnError(f"{path} cannot be imported: {describe_error(error)}") from None
    if hasattr(module, "prepare"):
        raise DistattnError(f"{path}: the doctor calls no function prepare(cp, model). Did you mean setup(cp, model)?")
    for name, ours in vars(Target).items():
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


def describe_error(error: BaseException) -> str:
    """Describe an error in one line: what it is, and in which file and line it was raised."""
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
