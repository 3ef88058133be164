"""The rule by which documents are packed: context length per step, step size, caps on a pack, and treatment of long documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Annotated, Any

from distattn.ir.errors import SettingError
from distattn.ir.limits import Number, OneOf, check_limits

MOST_TOKENS = (1 << 31) - 1
# keep the cost of a document, and that of a window, within int64
_MOST_CELLS = 1 << 30
_MOST_CELLS_OF_WINDOW = 1 << 62


@dataclass(frozen=True)
class PackCost:
    """The cost of computing a document of n tokens, in cells of causal attention.

    The cost is n (n + 1) / 2 + token_cells x n + document_cells. token_cells: the cost of a token's products with weights. The
    default is for Llama 8B: 436 million operations per token and layer, compared with 16 thousand per cell. document_cells: the
    fixed cost of a document. The default is a tile of 128 rows and 1,024 keys, which roughly covers starting and ending a
    kernel's programs (`overhead_keys` and `padded_cells` in `distattn.cluster.cost`) and the half-empty last tile.
    cell_femtoseconds: the time of a cell, or 0 if no device was named. `training_cost.py` computes all three for a model and a
    device. They are integers, so costs are the same on every machine.
    """

    token_cells: Annotated[int, Number(ge=0, le=_MOST_CELLS)] = 26_600
    document_cells: Annotated[int, Number(ge=0, le=_MOST_CELLS)] = 128 * 1024
    cell_femtoseconds: Annotated[int, Number(ge=0, le=math.inf)] = 0

    def __post_init__(self) -> None:
        """Raise DistattnError if a value is negative or too large."""
        check_limits(self)

    def of(self, length: Any) -> Any:
        """Return the cost in cells of a document of `length` tokens, an integer or int64 (N,)."""
        return length * (length + 1) // 2 + self.token_cells * length + self.document_cells

    def seconds(self, length: int) -> float:
        """Return the estimated seconds that a document takes in a training step on one device, or 0 if no device was named."""
        return float(self.of(length)) * self.cell_femtoseconds * 1e-15

    def longest(self, cells: int) -> int:
        """Return the length of the longest document that costs at most `cells`, or 0 or less if every document costs more."""
        spare = cells - self.document_cells
        if spare <= 0:
            return 0
        # the largest n with n^2 + b n <= 2 x spare
        b = 2 * self.token_cells + 1
        return (math.isqrt(b * b + 8 * spare) - b) // 2


@dataclass(frozen=True)
class PackLimits:
    """The caps of one pack at a given context length. max_cells: the maximum cost, see `PackCost`."""

    tokens: int
    cost: PackCost
    max_documents: int | None = None
    max_cells: int | None = None


@dataclass(frozen=True)
class PackRule:
    """The rule by which documents become packs, and packs become steps.

    context: ((first step, tokens per pack), ...), a curriculum of context lengths that begins at step 0.
    tokens_per_step: the capacity of all packs in a step together, at every context length; a multiple of each context length.
    window: the number of packs among which a document's place is chosen, rounded up to whole steps. A larger window fills
      packs better.
    max_documents: the maximum number of documents per pack. A piece of a cut document counts as a document.
    max_cost: the maximum cost of a pack, relative to that of a single document that fills it; `cost` defines how it is computed.
      Below 1.0, packs of long documents are left partly empty. A piece may be alone in a pack regardless of its cost.
    long_documents: "cut" makes pieces of exactly the context length, and a shorter last piece. "keep" leaves longer documents
      whole: the pack is then as large as several packs, and replaces them in its step. Its free space is filled like that of
      other packs, and its caps are higher by the same factor. If all ranks split every pack, each rank has as many tokens as
      before. With several data-parallel shares, one share gets the whole pack and so more tokens than the others. A document
      longer than a step is refused.
    level: give each step packs with nearly equal attention work (sum of squared lengths), for strategies that do not move work
      between ranks. Otherwise the packs of a window are shuffled.
    """

    context: tuple[tuple[int, int], ...]
    tokens_per_step: int
    window: Annotated[int, Number(ge=1, le=math.inf)] = 1024
    max_documents: Annotated[int | None, Number(ge=1, le=math.inf)] = None
    max_cost: Annotated[float | None, Number(gt=0)] = None
    cost: PackCost = field(default_factory=PackCost)
    long_documents: Annotated[str, OneOf(("cut", "keep"))] = "cut"
    level: bool = False

    def __post_init__(self) -> None:
        """Raise DistattnError naming the first invalid field and a value that would work."""
        steps = [step for step, _ in self.context]
        if not steps or steps[0] != 0 or sorted(set(steps)) != steps:
            raise SettingError("context", f"the first steps are {steps}; they must begin with 0 and rise.")
        for _, tokens in self.context:
            if not 0 < tokens <= MOST_TOKENS:
                raise SettingError("context", f"{tokens:,} tokens; a pack must have 1 to {MOST_TOKENS:,}.")
            if self.tokens_per_step <= 0 or self.tokens_per_step % tokens:
                raise SettingError(
                    "tokens_per_step",
                    f"{self.tokens_per_step:,} is not a multiple of the context length {tokens:,}; "
                    f"{max(1, self.tokens_per_step // tokens) * tokens:,} would be.",
                )
        check_limits(self)
        if self.max_cost is not None:
            for step, tokens in self.context:
                packs = self.window + self.packs_at(step)
                if packs * max(self.cost.of(tokens), self.limits_at(step).max_cells or 0) > _MOST_CELLS_OF_WINDOW:
                    raise SettingError(
                        "max_cost",
                        f"the cost of {packs:,} packs of {tokens:,} tokens is more than an integer holds; "
                        "use a smaller window, or no max_cost.",
                    )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PackRule:
        """Build the rule from the output of `as_dict`."""
        context = tuple((int(step), int(tokens)) for step, tokens in fields["context"])
        return cls(**{**fields, "context": context, "cost": PackCost(**fields["cost"])})

    def as_dict(self) -> dict[str, Any]:
        """Return the rule as JSON types."""
        facts = asdict(self)
        # without a device, keep plan files identical to those of earlier versions
        if not self.cost.cell_femtoseconds:
            del facts["cost"]["cell_femtoseconds"]
        return facts

    def context_at(self, step: int) -> int:
        """Return the tokens per pack in a step."""
        return max((first, tokens) for first, tokens in self.context if first <= step)[1]

    def packs_at(self, step: int) -> int:
        """Return the number of packs in a step."""
        return self.tokens_per_step // self.context_at(step)

    def next_change(self, step: int) -> int | None:
        """Return the first step after `step` with a different context length, or None if the length does not change again."""
        return min((first for first, _ in self.context if first > step), default=None)

    def limits_at(self, step: int) -> PackLimits:
        """Return the caps of a pack in a step."""
        tokens = self.context_at(step)
        cells = None if self.max_cost is None else math.floor(Fraction(self.max_cost) * self.cost.of(tokens))
        return PackLimits(tokens, self.cost, self.max_documents, cells)
