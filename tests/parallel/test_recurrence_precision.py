"""All recurrences over ranks in training precisions are as accurate as on one device, for any layout and decay."""

import itertools

import pytest
from cases import layouts
from recurrences import RECURRENT, RecurrenceCase, RecurrenceResult, by_definition, recurrence_case, run_recurrence

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import OPS
from distattn.parallel.make_plan import make_plan

LENGTHS = (1, 7, 129, 63)
SINGLE = 2e-5
# states and decay gradients are summed and kept in float32. For bfloat16 inputs, which are exact, their error is about
# 1e-7. One device may therefore be closer by chance (3 times for decays of gated_delta_rule), and twice its error would
# be no bound
LEAST_ALLOWED = 5e-6


def plan_of(layout, op, dtype, strategy="scan"):
    shape = dict(heads=4, kv_heads=2, head_dim=3, v_head_dim=5, dtype=dtype, op=op)
    return make_plan(Mask.documents(LENGTHS), layout, strategy=strategy, **shape)


def rounded(case: RecurrenceCase) -> RecurrenceCase:
    """Round a case's tensors to the precision in which ranks receive them."""
    x = {name: value.float() if name == "g" else value.bfloat16() for name, value in case.x.present().items()}
    x = case.x._replace(**{name: value.double() for name, value in x.items()})
    return case._replace(x=x, do=case.do.bfloat16().double())


def errors(got: RecurrenceResult, wanted: RecurrenceResult) -> dict[str, float]:
    """Return each tensor's error relative to its largest element."""
    pairs = {name: (getattr(got, name), getattr(wanted, name)) for name in ("o", "final", "dinitial")}
    pairs |= {f"d{name}": (got.dx.by_token()[name], value) for name, value in wanted.dx.by_token().items()}
    return {
        name: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for name, (a, b) in pairs.items()
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", RECURRENT)
def test_every_recurrence_is_as_exact_as_on_one_device(name):
    laid_out = layouts(LENGTHS, 4)
    some = [("usual", layout, "scan") for layout in laid_out]
    some += itertools.product(["usual"], ["zigzag", "block_cyclic"], ["ulysses"])
    if OPS[name].decay != "none":
        some += itertools.product(["near 1", "mixed"], ["zigzag"], ["scan", "ulysses"])
    for decay, group in itertools.groupby(some, key=lambda combination: combination[0]):
        case = recurrence_case(OPS[name], LENGTHS, decay=decay)
        narrow, wanted = rounded(case), by_definition(case)
        wanted_of_narrow = by_definition(narrow)
        alone = plan_of(Layout.contiguous(LENGTHS, 1), name, "bfloat16")
        one_device = errors(run_recurrence(alone, narrow), wanted_of_narrow)
        most = {name: max(2 * error, LEAST_ALLOWED) for name, error in one_device.items()}
        for _, layout, strategy in group:
            where = decay, layout, strategy
            single, half = (plan_of(laid_out[layout], name, dtype, strategy) for dtype in ("float32", "bfloat16"))
            actual = errors(run_recurrence(single, case), wanted)
            assert all(error <= SINGLE for error in actual.values()), (where, actual)
            actual = errors(run_recurrence(half, narrow), wanted_of_narrow)
            assert all(error <= most[name] for name, error in actual.items()), (where, actual, most)
