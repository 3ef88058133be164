"""How documents are packed: context lengths by step, the size of a step, caps of a pack, and what happens to long documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from distattn.ir.errors import DistattnError

MOST_TOKENS = (1 << 31) - 1
LONG_DOCUMENTS = ("cut", "keep")
# so that the cost of one document, and that of a window, are int64
_MOST_CELLS = 1 << 30
_MOST_CELLS_OF_WINDOW = 1 << 62


@dataclass(frozen=True)
class PackCost:
    """What computing a document costs, in cells of causal attention: n (n + 1) / 2 + token_cells x n + document_cells.

    token_cells: cells that take as long as everything else of a token (products with weights), by default in an 8B Llama: 436
    million operations of a layer for a token, beside 16 thousand for a cell. document_cells: what a document costs besides: by
    default a tile of 128 rows and 1,024 keys, which is about what a kernel's programs take to begin and end (`overhead_keys` and
    `padded_cells` in `distattn.cluster.cost`) and the half-empty tile at its end. cell_femtoseconds: what a cell takes, or 0
    where no device was named. `distattn.data.training_cost` has all three of a model and a device. Whole numbers: costs are the
    same everywhere.
    """

    token_cells: int = 26_600
    document_cells: int = 128 * 1024
    cell_femtoseconds: int = 0

    def __post_init__(self) -> None:
        """Raises DistattnError where a number is negative or absurdly large."""
        for name in ("token_cells", "document_cells"):
            cells = getattr(self, name)
            if not 0 <= cells <= _MOST_CELLS:
                raise DistattnError(f"cost.{name} is {cells:,}; it must be 0 to {_MOST_CELLS:,} cells of attention.")
        if self.cell_femtoseconds < 0:
            raise DistattnError(f"cost.cell_femtoseconds is {self.cell_femtoseconds:,}; it must be 0 or more.")

    def of(self, length: Any) -> Any:
        """Cells of a document with so many tokens (a number, or int64 (N,))."""
        return length * (length + 1) // 2 + self.token_cells * length + self.document_cells

    def seconds(self, length: int) -> float:
        """Estimated seconds of a training step that a document takes on one device; 0 where no device was named."""
        return float(self.of(length)) * self.cell_femtoseconds * 1e-15

    def longest(self, cells: int) -> int:
        """The longest document that costs at most so many cells; below 1 if none does."""
        spare = cells - self.document_cells
        if spare <= 0:
            return 0
        # n^2 + b n <= 2 x spare
        b = 2 * self.token_cells + 1
        return (math.isqrt(b * b + 8 * spare) - b) // 2


@dataclass(frozen=True)
class PackLimits:
    """Caps of one pack, for a certain context length: tokens, documents and cells (`PackCost`)."""

    tokens: int
    cost: PackCost
    max_documents: int | None = None
    max_cells: int | None = None


@dataclass(frozen=True)
class PackRule:
    """How documents become packs, and packs become steps.

    context: ((first step, tokens of a pack), ...), a curriculum of context lengths; it begins at step 0.
    tokens_per_step: packs of a step together have so much room, whatever their context length; a multiple of each.
    window: packs among which a document's place is chosen, rounded up to whole steps. A larger one fills packs better.
    max_documents: documents (pieces, where they are cut) of a pack.
    max_cost: cost of a pack, where 1.0 is that of a single document that fills it; `cost` says how it is counted. Below 1.0,
      packs of long documents are left partly empty. A single piece may always be alone in a pack, whatever it costs.
    long_documents: "cut" makes pieces of exactly the context length, and a rest. "keep" leaves a longer document whole: its pack
      is as large as several, and takes their place in its step. Where all ranks split every pack, they have as many tokens as
      before; of several data-parallel shares one has it alone, and so many more tokens. What it has free is filled as in other
      packs, and its caps are as many times higher. A document that is longer than a step is refused.
    level: each step gets packs with nearly equal attention work (sum of squared lengths), for strategies that do not move work
      between ranks. Without it packs of a window are shuffled.
    """

    context: tuple[tuple[int, int], ...]
    tokens_per_step: int
    window: int = 1024
    max_documents: int | None = None
    max_cost: float | None = None
    cost: PackCost = field(default_factory=PackCost)
    long_documents: str = "cut"
    level: bool = False

    def __post_init__(self) -> None:
        """Raises DistattnError naming the field that cannot be, and what could."""
        steps = [step for step, _ in self.context]
        if not steps or steps[0] != 0 or sorted(set(steps)) != steps:
            raise DistattnError(f"context: the first steps are {steps}; they must begin with 0 and rise.")
        for _, tokens in self.context:
            if not 0 < tokens <= MOST_TOKENS:
                raise DistattnError(f"context: {tokens:,} tokens; a pack must have 1 to {MOST_TOKENS:,}.")
            if self.tokens_per_step <= 0 or self.tokens_per_step % tokens:
                raise DistattnError(
                    f"tokens_per_step: {self.tokens_per_step:,} is no multiple of the context length {tokens:,}; "
                    f"{max(1, self.tokens_per_step // tokens) * tokens:,} would be."
                )
        for name in ("window", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DistattnError(f"{name}: {value} is too small; it must be at least 1.")
        if self.max_cost is not None:
            if not (math.isfinite(self.max_cost) and self.max_cost > 0):
                raise DistattnError(f"max_cost: {self.max_cost} is no cost; name a number above 0, such as 1.0.")
            for step, tokens in self.context:
                packs = self.window + self.packs_at(step)
                if packs * max(self.cost.of(tokens), self.limits_at(step).max_cells or 0) > _MOST_CELLS_OF_WINDOW:
                    raise DistattnError(
                        f"max_cost: the cost of {packs:,} packs of {tokens:,} tokens is more than an integer holds; "
                        "use a smaller window, or no max_cost."
                    )
        if self.long_documents not in LONG_DOCUMENTS:
            raise DistattnError(f'long_documents: {self.long_documents!r} is unknown; "cut" and "keep" are not.')

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PackRule:
        """The rule that `as_dict` wrote."""
        context = tuple((int(step), int(tokens)) for step, tokens in fields["context"])
        return cls(**{**fields, "context": context, "cost": PackCost(**fields["cost"])})

    def as_dict(self) -> dict[str, Any]:
        """The rule in terms of JSON."""
        facts = asdict(self)
        # a plan whose cost is not that of a device is the same file as those of earlier versions
        if not self.cost.cell_femtoseconds:
            del facts["cost"]["cell_femtoseconds"]
        return facts

    def context_at(self, step: int) -> int:
        """Tokens of a pack of this step."""
        return max((first, tokens) for first, tokens in self.context if first <= step)[1]

    def packs_at(self, step: int) -> int:
        """Packs of this step."""
        return self.tokens_per_step // self.context_at(step)

    def next_change(self, step: int) -> int | None:
        """The first step after this one that has another context length; None if there is none."""
        return min((first for first, _ in self.context if first > step), default=None)

    def limits_at(self, step: int) -> PackLimits:
        """Caps of a pack of this step."""
        tokens = self.context_at(step)
        cells = None if self.max_cost is None else math.floor(Fraction(self.max_cost) * self.cost.of(tokens))
        return PackLimits(tokens, self.cost, self.max_documents, cells)
