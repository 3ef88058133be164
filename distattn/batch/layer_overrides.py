"""Layers whose attention is planned differently from the rest of their model, such as sliding windows among full attention."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout, make_layout
from distattn.ir.mask import Mask
from distattn.parallel.attention_config import check_layout
from distattn.parallel.strategy_table import check_names

# layers may be named by index or by kind
KINDS = ("window", "full")


class LayerOverride(NamedTuple):
    """Settings for layers planned differently from the rest. layout: the name of these layers' layout; None for the model's."""

    strategy: str
    backward: str | None = None
    options: tuple[tuple[str, Hashable], ...] = ()
    layout: str | None = None
    layout_options: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(name: object, fields: Mapping[str, Any]) -> LayerOverride:
        """Build an override from a mapping of its fields. Raise DistattnError for unknown fields.

        name: the key of the override, for errors.
        """
        if not isinstance(fields, Mapping):
            raise DistattnError(f'layers {name!r} need a mapping, {{"strategy": ...}}, not {fields!r}.')
        if unknown := fields.keys() - set(LayerOverride._fields):
            field_names = ", ".join(LayerOverride._fields)
            raise DistattnError(f"layers {name!r} have no {sorted(unknown)[0]!r}; an override has {field_names}.")
        if "strategy" not in fields:
            raise DistattnError(f"layers {name!r} need their own strategy; give one.")
        check_names(fields["strategy"], fields.get("backward"), fields.get("options"))
        if fields.get("layout") is not None:
            check_layout(fields["layout"], fields.get("layout_options"), "causal")
        elif fields.get("layout_options"):
            raise DistattnError(f"layers {name!r} have layout_options without a layout; give both.")
        as_items = {key: tuple(sorted((fields.get(key) or {}).items())) for key in ("options", "layout_options")}
        return LayerOverride(**{**fields, **as_items})

    def working_layout(self, mask: Mask, layout: Layout) -> Layout | None:
        """Return the layout in which the override's layers process a batch; None for the batch's own layout."""
        if self.layout is None:
            return None
        return make_layout(self.layout, layout.lengths, layout.ranks, mask, **dict(self.layout_options))


class LayerOverrides:
    """Overrides keyed by a layer's index (0, 1, ...) or kind: "window", or "full" for layers without a window."""

    def __init__(self, overrides: Mapping[int | str, Mapping[str, Any]] | None = None):
        for name in overrides or {}:
            if not (name in KINDS or (type(name) is int and name >= 0)):
                raise DistattnError(f"layers must be named by number or as {' or '.join(KINDS)}, not {name!r}.")
        self._overrides = {name: LayerOverride.of(name, way) for name, way in (overrides or {}).items()}
        # layer indices with an override that no layer has used yet
        self.unused = {name for name in self._overrides if isinstance(name, int)}

    def of(self, layer: int | None, window: int | None) -> LayerOverride | None:
        """Return the override for a layer, or None if no override applies. layer: its index. window: its window, or None."""
        if not self._overrides:
            return None
        if layer is None and any(isinstance(name, int) for name in self._overrides):
            raise DistattnError("some layers are named by number, but this one does not pass its number (layer=).")
        self.unused.discard(layer)  # type: ignore[arg-type]
        kind = "full" if window is None else "window"
        return self._overrides.get(layer if layer in self._overrides else kind)  # type: ignore[arg-type]


def apply_window(document_mask: str | tuple[int, int], window: int) -> tuple[int, int]:
    """Return the document mask in which each token sees only the last `window` allowed tokens, including itself."""
    if window < 1:
        raise DistattnError(f"a sliding window must have at least 1 token, not {window}.")
    if document_mask == "full":
        raise DistattnError(f"a layer asks for the last {window} tokens in documents that are attended in full.")
    left, right = (window - 1, 0) if isinstance(document_mask, str) else document_mask
    return min(left, window - 1), right
