"""The target of `distattn doctor`: a script's functions, or a transformers model with default functions."""

# T tokens on this rank, S tokens in a document, V vocabulary, E experts

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.adapters import huggingface, pytorch
from distattn.adapters.router_loss import router_loss_of_tokens
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError

# the default batch: uneven documents, one of them a single token, with uneven labels
_LENGTHS = (41, 1, 23, 32)
_MOST_PARAMETERS = 300_000_000

# the arguments of a script's functions
_ARGUMENTS = {
    "model": (),
    "batch": (),
    "context_parallel": (),
    "setup": ("cp", "model"),
    "shard": ("cp", "batch"),
    "forward": ("model", "part"),
    "loss": ("logits", "part"),
    "backward": ("model", "loss"),
    "reduce": ("model",),
    "gradients": ("model",),
    "reference": ("model", "ids"),
    "router_loss": ("model", "router_logits"),
}


class Target:
    """A model, a batch, and the training step that a user's script runs with them on several ranks."""

    def __init__(self, target: str):
        self._path = path = Path(target)
        self._script = _load(path) if path.suffix == ".py" else None
        if self._script is not None and not hasattr(self._script, "model"):
            raise DistattnError(f"{target} has no function model(); see distattn doctor --help.")
        self._config = None if self._script is not None else _config(path)

    def model(self) -> torch.nn.Module:
        """Build the model with its initial weights. Raises DistattnError if it is too large to run several times."""
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

    def model_here(self) -> torch.nn.Module:
        """Build the model in one process, without torch.distributed. Raises DistattnError if that fails."""
        try:
            return self.model()
        except DistattnError:
            raise
        except (Exception, SystemExit) as error:
            raise DistattnError(
                f"doctor: model() fails in one process, without torch.distributed: {self.describe_error(error)}. There it must "
                "return a plain module."
            ) from None

    def batches(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Return the micro-batches of a step, equal on all ranks, in the form that `ContextParallel.shard` accepts."""
        if hasattr(self._script, "batch"):
            batches = self._script.batch()  # type: ignore[union-attr]
            return list(batches) if isinstance(batches, (list, tuple)) else [batches]
        vocabulary = pytorch.output_layer_of(pytorch.unwrapped(model)).weight.shape[0]  # type: ignore[union-attr,index]
        ids = torch.randint(0, int(vocabulary), (1, sum(_LENGTHS)), generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload]
        labels = ids.clone()
        labels[:, :20] = IGNORE_INDEX
        return [{"input_ids": ids, "labels": labels, "document_lengths": list(_LENGTHS)}]

    def context_parallel(self) -> ContextParallel:
        """Create this rank's ContextParallel over the default process group."""
        return self._function("context_parallel", lambda: ContextParallel(strategy="ring", kernel=default_kernel()))()

    def setup(self, cp: ContextParallel, model: torch.nn.Module) -> None:
        """Run the script's setup before the first batch."""
        self._function("setup", lambda cp, model: None)(cp, model)

    def shard(self, cp: ContextParallel, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return this rank's part of each micro-batch. Raises DistattnError if the script returns more or fewer parts."""
        shard = getattr(self._script, "shard", None)
        if shard is None:
            return cp.shard_step(batches)
        sharded = shard(cp, batches if len(batches) > 1 else batches[0])
        parts = list(sharded) if isinstance(sharded, (list, tuple)) else [sharded]
        if len(parts) != len(batches):
            raise DistattnError(f"shard returns {len(parts)} parts of {len(batches)} micro-batches")
        return parts

    def forward(self, model: torch.nn.Module, part: Mapping[str, Any]) -> Tensor:
        """Compute this rank's logits (1, T, V)."""
        return self._function("forward", pytorch.logits_of)(model, part)

    @staticmethod
    def plain_forward(model: torch.nn.Module, part: Mapping[str, Any]) -> Tensor:
        """Compute logits like `forward`, but without the script, so that hypotheses can be tried."""
        if hasattr(model, "set_attn_implementation"):
            huggingface.register()
            model.set_attn_implementation(huggingface.NAME)  # type: ignore[operator]
        return pytorch.logits_of(model, part)

    def loss(self, logits: Tensor, part: Mapping[str, Any], model: torch.nn.Module, returned: Sequence[Any]) -> Tensor:
        """Compute this rank's share of the loss. Shares add up to the loss. returned: the unwrapped model's outputs."""
        if hasattr(self._script, "loss"):
            return self._script.loss(logits, part)  # type: ignore[union-attr]
        share = pytorch.loss_of(logits, part)
        return pytorch.with_router_loss(share, model, returned[-1], part) if returned else share

    def router_logits(self, returned: Sequence[Any]) -> list[Tensor] | None:
        """Return each layer's router logits (T, E) from the model's last result; None if there is no router loss.

        Raises DistattnError if there is a router loss but no router logits.
        """
        out = returned[-1] if returned else None
        if not hasattr(self._script, "router_loss") and getattr(out, "aux_loss", None) is None:
            return None
        router_logits = getattr(out, "router_logits", None)
        if not router_logits:
            raise DistattnError(
                "there is a router loss, but the model's output has no router_logits to compute it from in one process: let "
                "reference call the model, and let the model return router_logits."
            )
        return list(router_logits)

    def router_loss(self, model: torch.nn.Module, router_logits: Sequence[Tensor]) -> Tensor:
        """Compute a micro-batch's router loss in one process from each layer's router logits (T, E)."""
        return self._function("router_loss", router_loss_of_tokens)(model, router_logits)

    def backward(self, model: torch.nn.Module, loss: Tensor) -> None:
        """Run the backward pass of a micro-batch."""
        self._function("backward", lambda model, loss: loss.backward())(model, loss)

    def reduce(self, model: torch.nn.Module) -> None:
        """Sum gradients over ranks after all backward passes, unless the script's own `backward` does so."""
        self._function("reduce", _keep_gradients if hasattr(self._script, "backward") else _sum_gradients)(model)

    def gradients(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Return the full, unsharded gradient of every parameter that has one, keyed by name."""
        return self._function("gradients", _gradients)(model)

    def reference(self, model: torch.nn.Module, ids: Tensor) -> Tensor:
        """Compute the logits (1, S, V) of one document (1, S) in one process."""
        return self._function("reference", _reference)(model, ids)

    def check_reference(self) -> None:
        """Raise DistattnError if a script's model has no reference to compare with, or cannot be built in this process."""
        if self._script is None or hasattr(self._script, "reference"):
            return
        _check_reference(self.model_here())

    def reference_context(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Return the context in which `reference` and its backward pass run."""
        ours = hasattr(model, "set_attn_implementation") and not hasattr(self._script, "reference")
        return huggingface.single_process_attention(model) if ours else nullcontext()

    def describe_error(self, error: BaseException) -> str:
        """Describe an error in one line: its type and message, and the script's last line in the traceback."""
        return describe_error(error, self._path if self._script is not None else None)

    def _function(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """Return the script's function called `name`, or the default if there is no such function."""
        return getattr(self._script, name, default)


def default_kernel() -> str | None:
    """Return the default kernel: on GPUs None (chosen by device), on CPUs the slow reference, which supports all calls."""
    return None if torch.cuda.is_available() else "reference"


def _keep_gradients(model: torch.nn.Module) -> None:
    """Leave gradients unchanged, since the script has already reduced them."""


def _sum_gradients(model: torch.nn.Module) -> None:
    parameters = list(model.parameters())
    # some ranks may lack a parameter's gradient, for example an expert's if no token of theirs was routed to it
    has_gradient = [float(parameter.grad is not None) for parameter in parameters]
    reached = torch.tensor(has_gradient, device=parameters[0].device)
    dist.all_reduce(reached)
    for parameter, ranks in zip(parameters, reached.tolist(), strict=True):
        if ranks:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    named = pytorch.unwrapped(model).named_parameters()
    return {name: pytorch.full_tensor(p.grad).clone() for name, p in named if p.grad is not None}


def _reference(model: Any, ids: Tensor) -> Tensor:
    _check_reference(model)
    return model(ids, use_cache=False).logits


def _check_reference(model: Any) -> None:
    if not hasattr(model, "set_attn_implementation"):
        raise DistattnError(
            f"{type(model).__name__} is not a model of transformers: the script has to define reference(model, ids), the logits "
            "of one document in one process; docs/doctor.md has an example."
        )


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise DistattnError(f"there is no script {path}.")
    spec = importlib.util.spec_from_file_location("doctor_target", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # the script may import modules next to it
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise DistattnError(f"{path} cannot be imported: {describe_error(error, path)}") from None
    if hasattr(module, "prepare"):
        raise DistattnError(f"{path}: the doctor calls no function prepare(cp, model). Did you mean setup(cp, model)?")
    for name, arguments in _ARGUMENTS.items():
        function = getattr(module, name, None)
        if function is None:
            continue
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:
            how = f"takes {', '.join(arguments) or 'nothing'}"
            raise DistattnError(f"{path}: {name} must be a function that {how}; see distattn doctor --help.") from None
    return module


def describe_error(error: BaseException, script: Path | None = None) -> str:
    """Describe an error in one line, with the file and line where it was raised.

    script: if the traceback contains lines of files in the script's folder, the last such line is named first.
    """
    frames = traceback.extract_tb(error.__traceback__)
    raised = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
    folder = None if script is None else script.resolve().parent
    of_script = [frame for frame in frames if Path(frame.filename).resolve().parent == folder]
    where = f"{Path(of_script[-1].filename).name}, line {of_script[-1].lineno}" if of_script else raised
    if isinstance(error, SyntaxError):
        where = f"{Path(error.filename or '').name}, line {error.lineno}"
    elif where != raised:
        where += f"; raised in {raised}"
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]} ({where})"


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    if not path.exists():
        raise DistattnError(
            f"{path} is neither a script (.py) nor a transformers model (a folder or its config.json). Write distattn doctor "
            "SCRIPT.py or distattn doctor FOLDER; a configuration of a run, such as tiny, is for distattn preflight."
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DistattnError(
            f"{path}: no configuration that transformers can read: {str(error).splitlines()[0]}"
        ) from None
