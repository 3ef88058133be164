"""What modules of a model put out, recorded or disturbed, and what a model holds beside its weights."""

# S tokens of one call

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Setting = bool | int | float | str | None
# exactly these: torch.load takes no subclasses, such as NumPy's float64
_SETTINGS = (bool, int, float, str, type(None))


@contextmanager
def recorded_outputs(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record what modules put out, by name in the order in which they were done, while the context is open.

    Only tensors of numbers with a batch of one, (1, ...). Later calls of a module are "name (call 2)" and so on.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, first: Tensor) -> None:
        if first.dim() < 2 or first.shape[0] != 1:
            return
        calls = 1
        while (known := name if calls == 1 else f"{name} (call {calls})") in seen:
            calls += 1
        # what is changed in place later is not what it put out
        seen[known] = first.detach().cpu().clone()

    with _hooked(model, keep):
        yield seen


@contextmanager
def recorded_returns(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Keep what the model itself returns, call by call, while the context is open."""
    kept: list[Any] = []
    hook = model.register_forward_hook(lambda _, __, out: kept.append(out))
    try:
        yield kept
    finally:
        hook.remove()


@contextmanager
def rounded_otherwise(model: torch.nn.Module, rounding: Mapping[str, float], seed: int) -> Iterator[None]:
    """Meanwhile weights, modules' outputs, and gradients through them are off by up to what rounding them once may cost.

    rounding: the relative error of modules by name; of others the dtype of their output says it. What is looked up is not
    rounded. As TTrace finds thresholds (arXiv 2506.09280), but for every module instead of the input alone.
    """
    looked_up = lookups(model)
    generator = torch.Generator().manual_seed(seed)

    def disturbed(name: str, values: Tensor) -> Tensor:
        error = 0.0 if name in looked_up else rounding.get(name, unit_roundoff(values.dtype))
        noise = torch.rand(values.shape, generator=generator) * 2 - 1
        # in fp32 at least: one plus less than an eps is one
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return (wide + wide * noise.to(wide) * error).to(values.dtype)

    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            # a module's output says how its weights are rounded, unless they are cast, or used by nobody's hook
            if rounding.get(owner, 1.0) > unit_roundoff(parameter.dtype):
                parameter.copy_(disturbed(owner, parameter))
    try:
        with _hooked(model, disturbed, leaves=True):
            yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])


def lookups(model: torch.nn.Module) -> set[str]:
    """The names of modules that look up what belongs to a token or a position: embeddings, and rotary ones."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or "Rotary" in type(module).__name__
    }


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


@contextmanager
def _hooked(
    model: torch.nn.Module, use: Callable[[str, Tensor], Tensor | None], leaves: bool = False
) -> Iterator[None]:
    """Meanwhile `use` is given the first tensor of numbers that each module puts out, and may put another in its place."""

    def hook(name: str, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) and out else out
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return None
        other = use(name, first)
        if other is None:
            return None
        return (other, *out[1:]) if isinstance(out, tuple) else other

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: hook(name, out))
        for name, module in named
        if not leaves or not any(True for _ in module.children())
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def same_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers hold what they held before."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def buffers_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers, those that no checkpoint holds among them."""
    return {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}


def settings_of(model: torch.nn.Module) -> dict[str, Setting]:
    """The numbers, words and switches that modules keep as attributes, and a transformers model's configuration."""
    found: dict[str, Setting] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and type(value) in _SETTINGS:
                found[f"{name}.{key}".lstrip(".")] = value
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        _flatten("config", config.to_dict(), found)
    return found


def _flatten(prefix: str, values: Mapping[str, Any], found: dict[str, Setting]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _flatten(f"{prefix}.{key}", value, found)
        elif type(value) in _SETTINGS and "attn_implementation" not in str(key):
            found[f"{prefix}.{key}"] = value


def active_dropout(model: torch.nn.Module) -> str | None:
    """The name of the first module that drops numbers at random, None where there is none."""
    for name, module in model.named_modules():
        if "Dropout" in type(module).__name__ and module.training and getattr(module, "p", 0):
            return f"{name} (p = {module.p})"
    return None


def digest(*tensors: Tensor) -> str:
    """A hash of what tensors hold."""
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
