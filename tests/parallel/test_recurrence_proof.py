"""The verifier of recurrences: plans that no strategy would make are accepted and correct; changed plans are refused or
correct.
"""

import functools
import random
from collections.abc import Callable
from functools import partial

import pytest
from mutants import check_mutants
from oracle import Record, planned_bytes
from random_recurrences import KEY_DIM, VALUE_DIM, attacked, case_of, random_recurrent_plan
from recurrences import assert_same, run_recurrence

from distattn.ir.errors import PlanError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import OPS
from distattn.ir.plan import Call, Plan, Table
from distattn.parallel.analysis.verify import verify

TOLERANCE = 1e-10


def check_plans(plans: int, seed: int) -> None:
    for number in range(seed, seed + plans):
        plan, name = random_recurrent_plan(random.Random(number))
        case, wanted = case_of(plan, number)
        record = Record()
        try:
            assert_same(run_recurrence(plan, case, record), wanted, TOLERANCE)
        except PlanError as error:
            raise AssertionError(f"plan {number} ({name}) is refused: {error}") from error
        assert record.bytes == planned_bytes(plan), (number, name)


def random_case(rng: random.Random, seed: int) -> tuple[Plan, Callable[[Plan], None]]:
    plan, _ = random_recurrent_plan(rng)
    # computed once for all mutants, when the first mutant is accepted
    case = functools.cache(partial(case_of, plan, seed))
    return plan, lambda other: assert_same(run_recurrence(other, case()[0]), case()[1], TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize(("plans", "seed"), [(60, 0), (120, 1000)])
def test_random_plans_are_accepted_and_right(plans, seed):
    check_plans(plans, seed)


def test_a_state_of_which_others_use_a_part_of_its_heads_is_counted_whole():
    layout = Layout.contiguous((10,), 1)
    call = Call(Mask.documents((10,)), layout, 2, 2, KEY_DIM, VALUE_DIM, "float64", op=OPS["linear_attention"])
    # head 1 continues from the state left by the first task, and head 0 from the state left by the second
    forward = [(0, 0, 0, 0, 0, 0, 5, 1, 2), (1, 0, 0, 0, 5, 0, 5, 0, 2), (2, 0, 0, 5, 10, 0, 10, 0, 2)]
    backward = [(0, 0, 0, 5, 10, 0, 10, 0, 2), (1, 0, 0, 0, 10, 0, 5, 0, 2)]
    plan = Plan(call, Table.from_rows(forward), Table.from_rows(backward), "keep")
    case, wanted = case_of(plan, 0)
    # this run also compares the live states with the proof
    assert_same(run_recurrence(plan, case), wanted, TOLERANCE)
    assert verify(plan).forward_peak.tolist() == [3 * KEY_DIM * VALUE_DIM * 8]


@pytest.mark.parametrize(
    ("mutants", "seed"), [(300, 10_000_000), pytest.param(5000, 10_005_000, marks=pytest.mark.full)]
)
def test_mutants_are_refused_or_right(mutants, seed):
    refused, right = check_mutants(mutants, seed, random_case)
    assert refused > 10 * right > 0


def check_attacks(attacks: int, seed: int) -> dict[str, int]:
    """Count the refused plans by kind of attack. Fail if a plan is accepted."""
    refused: dict[str, int] = {}
    number = 0
    while sum(refused.values()) < attacks:
        number += 1
        attack = attacked(random.Random(20_000_000 + seed + number))
        if attack is None:
            continue
        with pytest.raises(PlanError):
            verify(attack[0])
        refused[attack[1]] = refused.get(attack[1], 0) + 1
    return refused


def test_plans_that_are_wrong_throughout_but_consistent_are_refused():
    assert len(check_attacks(100, 0)) == 4


@pytest.mark.full
def test_more_plans_that_are_wrong_throughout_are_refused():
    assert min(check_attacks(400, 1000).values()) > 40
