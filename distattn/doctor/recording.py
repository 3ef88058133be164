"""Record or perturb the outputs of a model's modules, and read a model's buffers and settings."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

Setting = bool | int | float | str | None
# exactly these types: torch.load refuses subclasses such as NumPy's float64
_SETTINGS = (bool, int, float, str, type(None))


@contextmanager
def recorded_outputs(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the modules' output tensors, in execution order, while the context is open.

    Keys are module names. A module's later calls are named "name (call 2)" and so on. Additional tensors in a tuple are named
    "name (output 2)" and so on.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, values: Tensor) -> None:
        # a copy, since the output may be changed in place later
        seen[name] = values.detach().cpu().clone()

    with hooked_outputs(model, keep):
        yield seen


@contextmanager
def recorded_inputs(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the first argument of modules without children while the context is open. Keys: see `recorded_outputs`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, values: Tensor) -> None:
        seen[name] = values.detach().cpu().clone()

    with hooked_inputs(model, keep):
        yield seen


@contextmanager
def recorded_output_gradients(model: torch.nn.Module) -> Iterator[dict[str, Tensor | None]]:
    """Record the gradients of the outputs that modules compute in the context. The backward pass may run after the context.

    Names are as in `recorded_outputs`. A gradient that never arrives stays None. A tensor that a module passes on unchanged is
    recorded only for the module that created it.
    """
    seen: dict[str, Tensor | None] = {}
    watched: dict[int, Tensor] = {}

    def keep(name: str, gradient: Tensor) -> None:
        seen[name] = gradient.detach().cpu().clone()

    def watch(name: str, values: Tensor) -> None:
        if not values.is_floating_point() or id(values) in watched:
            return
        watched[id(values)] = values
        seen[name] = None
        if values.requires_grad:
            values.register_hook(lambda gradient: keep(name, gradient))

    with hooked_outputs(model, watch):
        yield seen


@contextmanager
def recorded_parameter_gradients(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the gradients that backward passes in the context compute for parameters. Sharded parameters are left out.

    The gradients are recorded before they are added to earlier ones and before they are reduced over ranks.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, gradient: Tensor) -> None:
        kept = gradient.detach().cpu()
        seen[name] = seen[name] + kept if name in seen else kept.clone()

    with ExitStack() as hooks:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and type(parameter) is torch.nn.Parameter:
                handle = parameter.register_hook(lambda gradient, name=name: keep(name, gradient))
                hooks.callback(handle.remove)
        yield seen


@contextmanager
def recorded_weights(model: torch.nn.Module) -> Iterator[dict[str, str]]:
    """Record a digest of each parameter, keyed by name, at its module's first call while the context is open."""
    seen: dict[str, str] = {}

    def look(name: str, module: torch.nn.Module) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            if type(parameter) is torch.nn.Parameter:
                seen.setdefault(f"{name}.{key}", digest(parameter))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and next(module.parameters(recurse=False), None) is not None:
                handle = module.register_forward_pre_hook(lambda module, _, name=name: look(name, module))
                hooks.callback(handle.remove)
        yield seen


@contextmanager
def recorded_returns(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Record what the model itself returns, call by call, while the context is open."""
    kept: list[Any] = []
    hook = model.register_forward_hook(lambda _, __, out: kept.append(out))
    try:
        yield kept
    finally:
        hook.remove()


@contextmanager
def rounded_otherwise(model: torch.nn.Module, rounding: Mapping[str, float], seed: int) -> Iterator[None]:
    """Add random errors of up to one rounding to weights, module outputs and the outputs' gradients, in the context.

    rounding: each module's relative error, keyed by name; the default is that of the output's dtype. Lookups are not perturbed.
    TTrace (arXiv 2506.09280) finds its thresholds in the same way, but perturbs only the model's input.
    """
    looked_up = lookups(model)
    generator = torch.Generator().manual_seed(seed)

    def disturbed(name: str, values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values
        error = 0.0 if module_of_call(name) in looked_up else rounding.get(name, unit_roundoff(values.dtype))
        noise = torch.rand(values.shape, generator=generator) * 2 - 1
        # compute in fp32 at least: in the output's dtype, 1 plus an error smaller than its eps is 1
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return (wide + wide * noise.to(wide) * error).to(values.dtype)

    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            # perturb weights only if they are cast to a lower precision or used outside the module's call: otherwise, the
            # error added to the output accounts for their rounding
            if rounding.get(owner, 1.0) > unit_roundoff(parameter.dtype):
                parameter.copy_(disturbed(owner, parameter))
    try:
        with hooked_outputs(model, disturbed, leaves=True):
            yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])


def lookups(model: torch.nn.Module) -> set[str]:
    """Return the names of modules that look up values by token or position: embeddings and rotary embeddings."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or "Rotary" in type(module).__name__
    }


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


# (name of a call's tensor, the tensor) -> its replacement, or None to keep it
TensorHook = Callable[[str, Tensor], Tensor | None]


@contextmanager
def hooked_outputs(model: torch.nn.Module, use: TensorHook, leaves: bool = False) -> Iterator[None]:
    """Call `use` with every tensor that modules return in the context. If `use` returns a tensor, it replaces the output.

    leaves: watch only modules without children.
    """
    named = _CallNames()

    def hook(name: str, out: Any) -> Any:
        call = named.next_call(name)
        if isinstance(out, Tensor):
            return use(call, out)
        if not isinstance(out, tuple) or hasattr(out, "_fields"):
            return None
        others = [
            use(call if place == 0 else f"{call} (output {place + 1})", item) if isinstance(item, Tensor) else None
            for place, item in enumerate(out)
        ]
        if all(other is None for other in others):
            return None
        return tuple(item if other is None else other for item, other in zip(out, others, strict=True))

    with ExitStack() as hooks:
        for name, module in _named_modules(model, leaves):
            handle = module.register_forward_hook(lambda _, __, out, name=name: hook(name, out))
            hooks.callback(handle.remove)
        yield


@contextmanager
def hooked_inputs(model: torch.nn.Module, use: TensorHook) -> Iterator[None]:
    """Call `use` with the first argument of each call of a childless module in the context. It may return a replacement."""
    named = _CallNames()

    def hook(name: str, arguments: tuple[Any, ...]) -> Any:
        call = named.next_call(name)
        if not arguments or not isinstance(arguments[0], Tensor):
            return None
        other = use(call, arguments[0])
        return None if other is None else (other, *arguments[1:])

    with ExitStack() as hooks:
        for name, module in _named_modules(model, leaves=True):
            handle = module.register_forward_pre_hook(lambda _, arguments, name=name: hook(name, arguments))
            hooks.callback(handle.remove)
        yield


def module_of_call(call: str) -> str:
    """Return the module's name, given the name of one of its calls or of a call's tensor."""
    return call.partition(" (")[0]


def _named_modules(model: torch.nn.Module, leaves: bool) -> list[tuple[str, torch.nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and (not leaves or not any(True for _ in module.children()))
    ]


class _CallNames:
    """A counter of module calls. Each thread counts separately, since emulated ranks are threads."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[int, str]] = Counter()

    def next_call(self, name: str) -> str:
        """Return the name of a module's next call on this thread."""
        self._calls[threading.get_ident(), name] += 1
        call = self._calls[threading.get_ident(), name]
        return name if call == 1 else f"{name} (call {call})"


@contextmanager
def same_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Restore the model's buffers at the end of the context."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                # autograd counts every write as a change, so write only if the values differ
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def buffers_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copy all buffers, including non-persistent ones."""
    return {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}


def settings_of(model: torch.nn.Module) -> dict[str, Setting]:
    """Return numbers, strings and flags by name: modules' attributes, and a transformers model's configuration."""
    settings: dict[str, Setting] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and type(value) in _SETTINGS:
                settings[f"{name}.{key}".lstrip(".")] = value
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        _flatten("config", config.to_dict(), settings)
    return settings


def _flatten(prefix: str, values: Mapping[str, Any], settings: dict[str, Setting]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _flatten(f"{prefix}.{key}", value, settings)
        elif type(value) in _SETTINGS and "attn_implementation" not in str(key):
            settings[f"{prefix}.{key}"] = value


def active_dropout(model: torch.nn.Module) -> str | None:
    """Return the name and rate of the first module with active dropout, as text; None if no dropout is active."""
    for name, module in model.named_modules():
        if "Dropout" in type(module).__name__ and module.training and getattr(module, "p", 0):
            return f"{name} (p = {module.p})"
    return None


def digest(*tensors: Tensor) -> str:
    """Hash the contents of tensors (blake2b, 16 bytes). Returns hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        # hash a copy: FSDP2 resizes parameters' storage, which is impossible while a NumPy array shares it
        hashed.update(tensor.detach().cpu().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
