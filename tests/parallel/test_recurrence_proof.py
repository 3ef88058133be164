"""The verifier of recurrences: plans no strategy would make are accepted and right, changed ones refused or right."""

import random
from dataclasses import replace

import pytest
from oracle import Record, planned_bytes
from random_recurrences import case_of, mutated, random_recurrent_plan
from recurrences import assert_same, run_recurrence

from distattn.ir.errors import PlanError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import OPS
from distattn.ir.plan import Call, Plan
from distattn.parallel.analysis.verify import verify
from distattn.parallel.strategies.scan import in_turn, layout_chains, scan_table

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


def check_mutants(mutants: int, seed: int) -> tuple[int, int]:
    """(refused, accepted and right); fails where one is accepted and wrong."""
    refused = right = number = 0
    while refused + right < mutants:
        number += 1
        rng = random.Random(10_000_000 + seed + number)
        plan, name = random_recurrent_plan(rng)
        case = None
        for _ in range(12):
            other = mutated(plan, rng)
            if other is None:
                continue
            try:
                verify(other)
            except PlanError:
                refused += 1
                continue
            case = case or case_of(plan, number)
            try:
                assert_same(run_recurrence(other, case[0]), case[1], TOLERANCE)
            except Exception as error:
                raise AssertionError(f"a mutant of plan {seed + number} ({name}) is accepted and wrong") from error
            right += 1
    return refused, right


def test_random_plans_are_accepted_and_right():
    check_plans(60, 0)


@pytest.mark.full
def test_more_random_plans_are_accepted_and_right():
    check_plans(600, 1000)


def test_mutants_are_refused_or_right():
    refused, right = check_mutants(300, 0)
    assert refused > 10 * right > 0


@pytest.mark.full
def test_five_thousand_mutants_are_refused_or_right():
    refused, right = check_mutants(5000, 5000)
    assert refused > 10 * right > 0


def test_documents_that_are_joined_or_forgotten_in_the_middle_are_refused():
    lengths = (9, 14)
    layout = Layout.contiguous(lengths, 3)
    call = Call(Mask.documents(lengths), layout, 2, 2, 3, 4, "float64", op=OPS["gla"])
    right = layout_chains(call, call.layout)
    cut = right[1].stretches[1].t0
    first = right[1]._replace(t1=cut, stretches=right[1].stretches[:1])
    second = right[1]._replace(t0=cut, stretches=right[1].stretches[1:])
    joined = right[0]._replace(t1=right[1].t1, stretches=right[0].stretches + right[1].stretches)
    plan = Plan(call, *(scan_table(call, right, in_turn, name) for name in ("forward", "backward")), policy="keep")
    verify(plan)
    for wrong in ([right[0], first, second], [joined]):
        for direction in ("forward", "backward"):
            # consistent within itself, but another recurrence
            with pytest.raises(PlanError):
                verify(replace(plan, **{direction: scan_table(call, wrong, in_turn, direction)}))
