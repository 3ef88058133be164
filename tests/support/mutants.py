"""Mutants of plans. A mutant that the verifier accepts must compute the right result."""

import random
from collections.abc import Callable

from random_recurrences import mutated

from distattn.ir.errors import PlanError
from distattn.ir.plan import Plan
from distattn.parallel.analysis.verify import verify

# mutants per plan
_TRIALS = 12


def check_mutants(
    mutants: int, seed: int, make: Callable[[random.Random, int], tuple[Plan, Callable[[Plan], None]]]
) -> tuple[int, int]:
    """Try at least `mutants` mutants. Return (number refused, number accepted and right). Raise if an accepted mutant
    is wrong.

    make: returns a random plan for a seed, and a function that raises if a given mutant of the plan computes a wrong
    result.
    """
    refused = right = 0
    while refused + right < mutants:
        seed += 1
        rng = random.Random(seed)
        plan, assert_right = make(rng, seed)
        for _ in range(_TRIALS):
            other = mutated(plan, rng)
            if other is None:
                continue
            try:
                verify(other)
            except PlanError:
                refused += 1
                continue
            try:
                assert_right(other)
            except Exception as error:
                raise AssertionError(f"a mutant of plan {seed} is accepted and wrong") from error
            right += 1
    return refused, right
