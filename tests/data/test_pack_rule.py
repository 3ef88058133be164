"""A rule defines what a step is, survives JSON, and refuses impossible settings by name."""

import json

import pytest

from distattn.data.packing.pack_rule import PackCost, PackRule
from distattn.ir.errors import DistattnError


def test_steps_of_all_context_lengths_have_equally_many_tokens():
    rule = PackRule(context=((0, 32), (100, 128), (300, 64)), tokens_per_step=512)
    assert [(rule.context_at(step), rule.packs_at(step)) for step in (0, 99, 100, 299, 300, 10**9)] == [
        (32, 16),
        (32, 16),
        (128, 4),
        (128, 4),
        (64, 8),
        (64, 8),
    ]
    assert [rule.next_change(step) for step in (0, 99, 100, 300)] == [100, 100, 300, None]


def test_a_cost_of_one_is_that_of_a_document_that_fills_the_pack():
    rule = PackRule(context=((0, 1000), (5, 4000)), tokens_per_step=4000, max_cost=1.0)
    for step, tokens in ((0, 1000), (5, 4000)):
        assert rule.limits_at(step).max_cells == rule.cost.of(tokens)
    half = PackRule(context=((0, 1000),), tokens_per_step=4000, max_cost=0.5)
    assert half.limits_at(0).max_cells == half.cost.of(1000) // 2


def test_a_rule_survives_json():
    rule = PackRule(
        context=((0, 32), (9, 64)),
        tokens_per_step=128,
        window=7,
        max_documents=5,
        max_cost=0.3,
        cost=PackCost(1, 2),
        long_documents="keep",
        level=True,
    )
    assert PackRule.from_dict(json.loads(json.dumps(rule.as_dict()))) == rule


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"context": ()}, "context: the first steps are"),
        ({"context": ((1, 64),)}, "must begin with 0"),
        ({"context": ((0, 64), (0, 128))}, "must begin with 0 and rise"),
        ({"context": ((0, 0),)}, "context: 0 tokens"),
        ({"context": ((0, 1 << 31),)}, "2,147,483,648 tokens"),
        ({"tokens_per_step": 200}, "tokens_per_step: 200 is not a multiple of the context length 64; 192 would be"),
        ({"tokens_per_step": 0}, "tokens_per_step: 0 is not a multiple"),
        ({"window": 0}, "window: at least 1, not 0"),
        ({"max_documents": 0}, "max_documents: at least 1, not 0"),
        ({"max_cost": 0.0}, "max_cost: above 0, not 0.0"),
        ({"max_cost": float("inf")}, "max_cost: at most .*, not inf"),
        ({"max_cost": 1.0, "context": ((0, 1 << 30),), "tokens_per_step": 1 << 34}, "more than an integer holds"),
        ({"long_documents": "drop"}, "long_documents: there is no 'drop'; there are cut, keep"),
    ],
)
def test_an_impossible_rule_is_refused_by_name(fields, sentence):
    with pytest.raises(DistattnError, match=sentence):
        PackRule(**{"context": ((0, 64),), "tokens_per_step": 128} | fields)


def test_an_impossible_cost_is_refused_by_name():
    with pytest.raises(DistattnError, match="document_cells: at least 0, not -1"):
        PackCost(document_cells=-1)
