"""Hugging Face transformers: change the layout around spans of recurrent layers with public forward hooks on decoder layers.

Hooks run outside the checkpointed region, since transformers and `memory.checkpoint_layers` checkpoint the inside of a layer. So
rows move only once, and a layer's saved input has the layout in which the layer is computed.
"""

# T tokens on this rank, C channels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.adapters.huggingface_masks import MaskPattern
from distattn.adapters.huggingface_recurrent import check_mixing_layer
from distattn.adapters.pytorch import unwrapped
from distattn.batch.local_batch import LocalBatch
from distattn.batch.recurrent_span import RecurrentSpan, recurrent_span
from distattn.ir.errors import DistattnError

_RECURRENT = "linear_attention"
# a layer that runs attention and a recurrence side by side
_WITH_ATTENTION = "hybrid"
# kinds of layers that work in any layout, so a span may contain them
_BY_TOKEN = ("mlp", "moe")
# each op, and the configuration's names for its value heads, query/key heads, key dim and value dim
_SHAPES = (
    (
        "gated_delta_rule",
        ("linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ),
    ("kda", ("linear_num_heads", "linear_num_heads", "linear_head_dim", "linear_head_dim")),
    ("ssd", ("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head")),
    ("ssd", ("mamba_num_heads", "n_groups", "ssm_state_size", "mamba_head_dim")),
)
# the op of the recurrent layers in models whose configurations lack these sizes
_OPS_OF_OTHERS = {"mamba2": "ssd", "zamba2": "ssd"}
# arguments that decoders pass to all layers but only attention reads, since recurrent layers use no positions
_POSITIONS = ("position_ids", "position_embeddings")
# options that return every layer's or router's output, whose rows the caller expects in the model's layout
_RETURNED = ("output_hidden_states", "output_router_logits")


def relayout_recurrent_spans(model: Any) -> list[Any]:
    """Move tokens to contiguous slices for spans of recurrent layers where that is faster on the batch's `cluster`.

    Call this once, before the transformers model is sharded or compiled. `distattn.recurrent_span` decides for each batch and
    span. Rows stay in place if there is no cluster description, if hidden states or router logits are to be returned, if layers
    get other per-token tensors, or if the model's configuration does not give the shape of the states. Return handles with
    `remove()`, or an empty list for a model without spans to move. Other hooks on layers inside a span see the moved rows.
    """
    decoder = unwrapped(model).get_decoder()
    shape = recurrence_shape(decoder.config)
    if shape is None:
        return []
    asked = _Returned(decoder.config)
    handles = [decoder.register_forward_pre_hook(asked.note, with_kwargs=True)]
    for numbers in find_spans(decoder.config.layer_types):
        layers = [decoder.layers[number] for number in numbers]
        count = sum(decoder.config.layer_types[number] == _RECURRENT for number in numbers)
        span = _Span(f"layers {numbers[0]} to {numbers[-1]}", shape | dict(layers=count), asked)
        handles.append(layers[0].register_forward_pre_hook(span.enter, with_kwargs=True))
        handles += [layer.register_forward_pre_hook(span.within, with_kwargs=True) for layer in layers[1:]]
        handles.append(layers[-1].register_forward_hook(span.leave))
    return handles


def find_spans(kinds: Sequence[str]) -> list[range]:
    """Return each span's layer numbers, from a recurrent layer to the last recurrent layer without attention in between."""
    spans: list[range] = []
    begin: int | None = None
    for number, kind in enumerate([*kinds, ""]):
        if kind == _RECURRENT:
            begin, last = (number if begin is None else begin), number
        elif kind not in _BY_TOKEN and begin is not None:
            spans.append(range(begin, last + 1))
            begin = None
    return spans


def recurrence_shape(config: Any) -> dict[str, Any] | None:
    """Return op, heads, kv_heads, head_dim and v_head_dim of a configuration's recurrent layers, or None if they are unknown."""
    if _RECURRENT not in (getattr(config, "layer_types", None) or ()):
        return None
    check_mixing_layer(list(config.layer_types).index(_RECURRENT), config)
    op, names = _op_and_sizes(config)
    if op is None:
        return None
    sizes = (getattr(config, name) for name in names)
    return dict(op=op) | dict(zip(("heads", "kv_heads", "head_dim", "v_head_dim"), sizes, strict=True))


def recurrent_op(config: Any) -> str | None:
    """Return the op of a configuration's recurrent layers, or None if it has no recurrent layers or their op is unknown."""
    kinds = getattr(config, "layer_types", None) or ()
    if _RECURRENT not in kinds and _WITH_ATTENTION not in kinds:
        return None
    return _op_and_sizes(config)[0] or _OPS_OF_OTHERS.get(config.model_type)


def _op_and_sizes(config: Any) -> tuple[str | None, tuple[str, ...]]:
    """Return the op whose sizes a configuration gives, and its names for the sizes; (None, ()) if it gives no op's sizes."""
    return next(((op, names) for op, names in _SHAPES if all(hasattr(config, name) for name in names)), (None, ()))


class _Returned:
    """A flag, set in each forward pass, that tells whether the decoder has to return its layers' rows."""

    def __init__(self, config: Any):
        self._config, self.any = config, False

    @torch.compiler.disable
    def note(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.any = any(kwargs.get(name, getattr(self._config, name, False)) for name in _RETURNED)


class _Span:
    """The hooks of one span of layers."""

    def __init__(self, name: str, shape: Mapping[str, Any], asked: _Returned):
        self._name, self._shape, self._asked = name, dict(shape), asked
        # the span of the batch that is currently between the first and the last layer; None if its rows stay in place
        self._span: RecurrentSpan | None = None

    @torch.compiler.disable
    def enter(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Choose a layout before the first layer, and move the rows."""
        self._span = None
        batch = kwargs.get("context_parallel")
        if not isinstance(batch, LocalBatch) or self._asked.any or not _hidden_states_only(args, kwargs):
            return None
        hidden_1TC = args[0]
        kind = hidden_1TC.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_1TC.dtype
        span = recurrent_span(batch, width=hidden_1TC.shape[-1], dtype=dtype, device=hidden_1TC.device, **self._shape)
        if not span.is_relaid:
            return None
        self._span = span
        return (span.enter(hidden_1TC.squeeze(0))[None],), _within(span, kwargs)

    @torch.compiler.disable
    def within(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the batch and remove the positions before each of the remaining layers."""
        if self._span is None:
            return None
        if not _hidden_states_only(args, kwargs):
            raise DistattnError(
                f"the tokens of {self._name} were moved, and one of the layers got other tensors than its hidden states; leave "
                "relayout_recurrent_spans out."
            )
        return args, _within(self._span, kwargs)

    @torch.compiler.disable
    def leave(self, layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Move the rows back after the last layer."""
        span, self._span = self._span, None
        if span is None:
            return None
        hidden_1TC, *others = output if isinstance(output, tuple) else (output,)
        moved = span.leave(hidden_1TC.squeeze(0))[None]
        return (moved, *others) if isinstance(output, tuple) else moved


def _within(span: RecurrentSpan, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer's arguments inside a span, without positions, so that a layer that reads them fails visibly."""
    return {**kwargs, **{name: None for name in _POSITIONS if name in kwargs}, "context_parallel": span.batch}


def _hidden_states_only(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a layer gets only hidden states (1, T, C), the batch, positions, and non-tensor values."""
    others = (value for name, value in kwargs.items() if name not in (*_POSITIONS, "context_parallel"))
    plain = (type(None), bool, int, float, str, MaskPattern)
    return len(args) == 1 and isinstance(args[0], Tensor) and all(isinstance(value, plain) for value in others)
