"""The object that transformers models get instead of a mask, and the refusal of models that call no attention function."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from distattn.ir.errors import DistattnError

# the name of the attention implementation
NAME = "distattn"
# the suffix of the dicts in modeling modules that map implementation names to attention classes
_CLASSES = "_CLASSES"


def _works_on_masks() -> DistattnError:
    return DistattnError(
        "the model's layers compute with their mask, but the plan has the mask. Models that only pass it to their attention "
        "function can be split."
    )


def _refuse_operator(self: Any, *operands: Any) -> Any:
    raise _works_on_masks()


class MaskPattern:
    """A stand-in for the mask that a model passes to its layers. window: how many tokens each query sees; None for all.

    Using it as a tensor raises DistattnError.
    """

    def __init__(self, window: int | None):
        self.window = window

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _works_on_masks()

    def __getattr__(self, name: str) -> Any:
        if hasattr(torch.Tensor, name) and not name.startswith("__"):
            raise _works_on_masks()
        raise AttributeError(name)

    __hash__ = object.__hash__


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_OTHER = ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "len", "iter", "contains", "bool", "int")
for _name in (
    *_BINARY,
    *(f"r{_each}" for _each in _BINARY),
    *(f"i{_each}" for _each in _BINARY),
    *_OTHER,
    *("float", "getitem", "setitem", "array"),
):
    setattr(MaskPattern, f"__{_name}__", _refuse_operator)


def refuse_attention_classes(module: ModuleType) -> None:
    """Make models that choose an attention class by the implementation's name (Falcon, GPT-J, GPT-Neo) refuse "distattn".

    module: one of transformers' modeling modules; see `huggingface_modules.patch_model_modules`.
    """
    for name, classes in vars(module).items():
        if name.endswith(_CLASSES) and isinstance(classes, dict) and "eager" in classes:
            classes[NAME] = _refuse_model


def _refuse_model(config: Any, *arguments: Any, **named: Any) -> Any:
    raise DistattnError(
        f"{getattr(config, 'model_type', type(config).__name__)} models have their own attention classes and do not use "
        "transformers' attention interface, so their attention cannot be split. Models that do can be: Llama, Mistral, Qwen, "
        "Gemma, gpt-oss and most others."
    )
