"""Any combination of options is planned and proven, or is refused for one of the reasons listed here."""

import functools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distattn.cluster.topology import Cluster
from distattn.ir.errors import DistattnError, PlanError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import OPS, Op, latent_op
from distattn.ir.plan import POLICIES
from distattn.parallel.analysis.verify import verify
from distattn.parallel.make_plan import make_plan, strategies_of
from distattn.parallel.strategies.scan_schedules import SCHEDULES

LENGTHS = ((41,), (13, 7, 20), (1, 30, 2, 24))
LAYOUTS = ("contiguous", "zigzag", "document_zigzag", "block_cyclic", "balanced", "backwards")
ALL_OPS = (*OPS.values(), latent_op(2, 6))
# the values of each option; a missing option fails the test that checks this table
OPTIONS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "scan": {"schedule": ("auto", *SCHEDULES), "state_first": (False, True), "head_groups": (1, 2, 3)},
    "ring": {"rotate": ("fewest bytes", "keys", "queries")},
    "double_ring": {"inner_ring_size": (None, 1, 2)},
    "allgather": {},
    "ulysses": {},
    "usp": {"ulysses": (None, 1, 2), "inner_dim": ("ulysses", "ring")},
    "cad": {
        "tolerance": (0.02, 0.5),
        "speeds": (None, (3, 1, 0, 2)),
        "max_buffer_bytes": (None, 4000),
        "block": (4, 128),
    },
    "cad_greedy": {"tolerance": (0.1, 0.5), "block": (4, 128)},
}
# the message of each refusal, and the condition under which it is justified
REFUSALS = {
    "at most": lambda asked: asked["strategy"] == "ulysses" and asked["layout"].ranks > asked["heads"],
    "keeps what it received": lambda asked: asked["strategy"] == "scan" and asked["backward"] not in (None, "keep"),
    "does not divide": lambda asked: asked["layout"].ranks % (asked["options"].get("inner_ring_size") or 1),
    "usp cannot split": lambda asked: asked["options"].get("ulysses") == 2,
    "needs": lambda asked: asked["max_buffer_bytes"] is not None,
    "cad cannot keep": lambda asked: asked["options"].get("max_buffer_bytes") is not None,
}


@functools.cache
def layout_of(name: str, lengths: tuple[int, ...], ranks: int) -> Layout:
    if name == "block_cyclic":
        return Layout.block_cyclic(lengths, ranks, block=5)
    if name == "backwards":
        # the last rank has no tokens, and the other ranks' tokens are in shuffled order
        n, owners = sum(lengths), max(ranks - 1, 1)
        spans = [(n // 2, n), (n // 7, n // 2), (0, n // 7)]
        return Layout.from_chunks(lengths, [spans[rank::owners] if rank < owners else [] for rank in range(ranks)])
    return getattr(Layout, name)(lengths, ranks)


@functools.cache
def masks_of(op: Op, lengths: tuple[int, ...]) -> list[Mask]:
    if op.name == "token_shift":
        return [Mask.token_shift(lengths, 1), Mask.token_shift(lengths, -2)]
    if op.kind == "convolution":
        return [Mask.documents(lengths, (2, 0))]
    n, documents = sum(lengths), Mask.documents(lengths)
    return [documents] if op.is_recurrent else [documents, Mask.causal(n), Mask.full(n), Mask.sliding_window(n, 9)]


@st.composite
def questions(draw: st.DrawFn) -> dict[str, Any]:
    """Draw arguments of `make_plan` for any strategy that supports the op."""

    def one(values: Any) -> Any:
        return draw(st.sampled_from(values))

    op, lengths, ranks = one(ALL_OPS), one(LENGTHS), one((1, 2, 3, 4))
    strategy, kv_heads = one(list(strategies_of(op))), 1 if op.kind == "latent_attention" else one((1, 2, 3))
    working = one((None, None, None, *LAYOUTS))
    options = {name: one(values) for name, values in OPTIONS[strategy].items()}
    if options.get("speeds"):
        options["speeds"] = options["speeds"][:ranks]
    return {
        "mask": one(masks_of(op, lengths)),
        "layout": layout_of(one(LAYOUTS), lengths, ranks),
        "op": op,
        "strategy": strategy,
        "heads": kv_heads * one((1, 2, 3)),
        "kv_heads": kv_heads,
        "head_dim": 1 if op.is_maximum else one((4, 6)),
        "v_head_dim": one((4, 5)),
        "dtype": one(("float32", "bfloat16", "float64")),
        "backward": one((None, *POLICIES)),
        "cluster": one((None, Cluster(1, ranks), Cluster(2, ranks // 2) if ranks % 2 == 0 else None)),
        "options": options,
        "working_layout": None if working is None else layout_of(working, lengths, ranks),
        "max_buffer_bytes": one((None, None, None, 3000, 30000)),
    }


def of_few_key_heads(backward: str) -> dict[str, Any]:
    lengths = (13, 7, 20)
    return {
        "mask": Mask.documents(lengths),
        "layout": Layout.zigzag(lengths, 2),
        "op": OPS["gated_delta_rule"],
        "strategy": "ulysses",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "dtype": "float32",
        "backward": backward,
        "options": {},
        "max_buffer_bytes": None,
    }


def check(asked: dict[str, Any]) -> None:
    """Make and prove the plan. Fail if it is refused for a reason not in `REFUSALS`."""
    arguments = dict(asked)
    try:
        plan = make_plan(arguments.pop("mask"), arguments.pop("layout"), **arguments)
    except DistattnError as error:
        reasons = [holds for sentence, holds in REFUSALS.items() if sentence in str(error)]
        if not reasons or not any(holds(asked) for holds in reasons):
            raise AssertionError(f"{asked} is refused: {error}") from error
        return
    try:
        verify(plan)
    except PlanError as error:
        raise AssertionError(f"{asked} is planned wrongly: {error}") from error


@settings(max_examples=200)
@given(questions())
@example(of_few_key_heads("refetch-home"))
@example(of_few_key_heads("refetch-follow"))
def test_every_plan_is_proven(asked):
    check(asked)


@pytest.mark.full
@settings(max_examples=3000)
@given(questions())
def test_every_plan_of_many_is_proven(asked):
    check(asked)


def test_every_option_of_every_strategy_is_asked_for():
    option_names = {name: strategy.option_names for op in ALL_OPS for name, strategy in strategies_of(op).items()}
    assert {name: list(options) for name, options in OPTIONS.items()} == option_names
