"""The settings of attention: one record for run files, `ContextParallel`, planners and `make_plan`.

Limits and choices are annotations of the fields. Settings that run files also have are fields of `AttentionKeys`. Settings
available only in Python code are fields of `AttentionConfig`. The fields are listed nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from distattn.cluster.spec import AnyCluster, resolve_cluster
from distattn.ir.arguments import check_fields
from distattn.ir.errors import DistattnError
from distattn.ir.layout import LAYOUTS, make_layout
from distattn.ir.limits import Number, OneOf, check_limits
from distattn.ir.mask import Mask
from distattn.ir.plan import DTYPE_BYTES, POLICIES, dtype_name
from distattn.kernels.registry import AUTO, KERNELS, load_kernel
from distattn.parallel.strategy_table import STRATEGIES, check_names

# upper limit of `verify_every` and `pad_to`
_MOST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AttentionKeys:
    """The settings of attention that run files also have. The fields' docstrings are the help of `distattn train --help`."""

    strategy: Annotated[str, OneOf(STRATEGIES)] = "ring"
    """How attention is split: a name of distattn's strategies."""
    data: Annotated[str, OneOf(("replicated", "per_rank"))] = "replicated"
    """replicated: all ranks split one pack; per_rank: each rank, or block of ranks, has its own, and attention is shared."""
    layout: Annotated[str, OneOf(LAYOUTS)] = "zigzag"
    """Assignment of tokens to ranks: a name of distattn's layouts."""
    kernel: Annotated[str | None, OneOf(KERNELS, (AUTO,))] = None
    """Core attention on one device: cpu or reference; on GPUs auto, flash, triton, triton_tf32 or gluon."""
    backward: Annotated[str | None, OneOf(POLICIES)] = None
    """keep, refetch-home or refetch-follow; by default the strategy's own."""
    comm_dtype: Annotated[str | None, OneOf(DTYPE_BYTES)] = None
    """Dtype of partial outputs and gradients in messages: the model's, or by default the accumulation dtype."""
    max_buffer_bytes: Annotated[int | None, Number(ge=0)] = None
    """Maximum bytes of attention buffers on a rank at once; a batch that needs more is refused. By default there is no limit."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(AttentionKeys):
    """Settings for splitting attention over ranks, planning it and computing it.

    strategy, backward, comm_dtype, cluster, options and max_buffer_bytes: see `make_plan`. kernel: see `attention`. layout: a
    key of LAYOUTS. layout_options: the layout's own options. document_mask: the mask within each document (see
    `Mask.documents`). layers: different settings for some layers, keyed by index (0, 1, ...) or kind ("window", "full"). Each
    value is a mapping with strategy and optionally backward, options, layout and layout_options; the calls of these layers
    move tokens to that layout and back. verify_every: prove the plans of the first step and of every `verify_every`-th step
    before they run. pad_to: pad each rank's tokens to a multiple of this number.

    data: "replicated" if all ranks of the group hold the same batch and split it; "per_rank" if every rank, or every block of
    `context_parallel_size` neighbouring ranks, has its own documents and all ranks share the attention. servers: the number
    of ranks at the end of the group that have no model and call `serve` instead. adaptive: distribute attention according to
    the ranks' speeds, either measured or replayed from a log (see `RankSpeeds`). timeout: seconds after which an error names
    a rank that has not answered; the default is the process group's timeout.

    Raises DistattnError for unknown values and invalid combinations.
    """

    layout_options: Mapping[str, Any] | None = None
    document_mask: str | tuple[int, int] = "causal"
    layers: Mapping[int | str, Mapping[str, Any]] | None = None
    cluster: AnyCluster | str | Path | None = None
    options: Mapping[str, object] | None = None
    verify_every: Annotated[int, Number(ge=1, le=_MOST)] = 1
    pad_to: Annotated[int, Number(ge=1, le=_MOST)] = 1
    context_parallel_size: int | None = None
    servers: int = 0
    adaptive: bool | Sequence[Sequence[int] | None] = False
    timeout: Annotated[float | None, Number(gt=0)] = None

    def __post_init__(self) -> None:
        # normalize, because ranks compare settings by value
        object.__setattr__(self, "cluster", resolve_cluster(self.cluster))
        object.__setattr__(self, "comm_dtype", dtype_name(self.comm_dtype) or None)
        check_fields(self)
        check_names(self.strategy, self.backward, self.options)
        check_layout(self.layout, self.layout_options, self.document_mask)
        check_limits(self)
        if self.data == "replicated" and self.context_parallel_size is not None:
            raise DistattnError(
                'context_parallel_size belongs to data="per_rank"; with data="replicated" all ranks of the group split the '
                "same batch."
            )
        if self.servers and self.backward_policy == "keep":
            raise DistattnError('servers keep nothing from pass to pass; use backward "refetch-home".')
        if self.adaptive and not STRATEGIES[self.strategy].takes("speeds"):
            raise DistattnError(f'strategy {self.strategy} does not distribute work by speed; adaptive needs "cad".')

    @classmethod
    def of(cls, base: AttentionKeys | None, /, **settings: Any) -> AttentionConfig:
        """Return a config with the given settings and, for all other settings, the values of `base`.

        Raise DistattnError for an unknown setting, or if no strategy is given.
        """
        if not isinstance(base, AttentionKeys | None):
            raise DistattnError(f"config must be an AttentionConfig, not a {type(base).__name__}.")
        names = [field.name for field in fields(cls)]
        if unknown := settings.keys() - names:
            raise DistattnError(f"there is no setting {sorted(unknown)[0]!r}; there are {', '.join(names)}.")
        if isinstance(base, AttentionConfig):
            return replace(base, **settings)
        if base is None and "strategy" not in settings:
            raise DistattnError('a strategy is needed, such as strategy="ring".')
        keys = {} if base is None else {field.name: getattr(base, field.name) for field in fields(AttentionKeys)}
        return cls(**{**keys, **settings})

    @property
    def backward_policy(self) -> str | None:
        """The backward policy for `make_plan`: the one that was set, or None if the strategy chooses it for each call.

        Servers keep nothing, so with servers a strategy with a choice does not choose "keep".
        """
        return self.backward or (STRATEGIES[self.strategy].backward if self.servers else None)

    @property
    def strategy_options(self) -> dict[str, object]:
        """The strategy's options, including max_buffer_bytes if the strategy has that option."""
        is_limited = self.max_buffer_bytes is not None and STRATEGIES[self.strategy].takes("max_buffer_bytes")
        return {**({"max_buffer_bytes": self.max_buffer_bytes} if is_limited else {}), **(self.options or {})}

    def check_kernel(self) -> None:
        """Import the kernel. Raise DistattnError if a package that it needs is not installed."""
        if self.kernel not in (None, AUTO):
            load_kernel(self.kernel)

    def block_ranks(self, ranks: int) -> int:
        """Return the number of neighbouring ranks that hold the same batch, in a group of `ranks` ranks.

        Raise DistattnError if servers or context_parallel_size do not fit the group.
        """
        if type(self.servers) is not int or not 0 <= self.servers < ranks:
            raise DistattnError(f"servers must be 0 to {ranks - 1} of the group's {ranks} ranks, not {self.servers!r}.")
        models = ranks - self.servers
        if self.data == "replicated":
            return models
        size = self.context_parallel_size or 1
        if type(size) is not int or size < 1 or models % size:
            raise DistattnError(f"context_parallel_size {size!r} does not divide the {models} ranks with a model.")
        return size


def check_layout(layout: str, options: Mapping[str, Any] | None, document_mask: str | tuple[int, int]) -> None:
    """Raise DistattnError if the layout, one of its options or the document mask does not exist."""
    if layout not in LAYOUTS:
        raise DistattnError(f"layout {layout!r} does not exist; there are {', '.join(LAYOUTS)}.")
    for name in (options or {}).keys() - inspect.signature(LAYOUTS[layout]).parameters.keys():
        raise DistattnError(f"layout {layout} has no option {name!r}.")
    # create a small layout, so that errors are raised now rather than at the first batch
    make_layout(layout, [64], 2, Mask.documents([64], document_mask), **(options or {}))
