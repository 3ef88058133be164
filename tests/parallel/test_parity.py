"""Every strategy matches the dense fp64 oracle, forward and backward, with all ranks in lock step."""

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import LENGTHS, all_masks, layouts, masks
from oracle import Record, alive_bytes, assert_close, dense, planned_bytes, random_inputs, relative_error, run_all_ranks
from pairs import all_pairs

from distattn.cluster.topology import Cluster
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import POLICIES, Payload
from distattn.parallel.analysis.verify import verify
from distattn.parallel.make_plan import STRATEGIES, make_plan
from distattn.parallel.runtime.lowering import row_bundles
from distattn.parallel.runtime.lowering.lower import lower

pytestmark = pytest.mark.sampled(8)

TOLERANCE = {"float64": 1e-11, "float32": 2e-5}
LONG = (1, 7, 129, 1000)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@functools.cache
def case(lengths, mask, heads, head_dim=8):
    inputs = random_inputs(sum(lengths), *heads, head_dim)
    return inputs, dense(masks(lengths)[mask], inputs)


@functools.cache
def all_layouts(lengths, ranks):
    return layouts(lengths, ranks)


FACTORS = {
    "layout": list(layouts(LENGTHS, 2)),
    "ranks": [1, 2, 3, 4, 8],
    "heads": [(8, 8), (8, 4), (8, 1), (6, 2)],
    "dims": [(64, 64), (80, 80), (128, 128), (256, 256), (192, 128)],
    "policy": list(POLICIES),
    "kernel": ["reference", "cpu"],
    "dtype": ["float64", "float32"],
}


@functools.cache
def rows(strategy):
    """Return rows that cover every pair of values in FACTORS, except rows that are refused: Ulysses with fewer heads
    than ranks, and cpu with unequal dims of keys and values.
    """
    return all_pairs(
        FACTORS,
        lambda row: (
            not (strategy == "ulysses" and row["ranks"] > row["heads"][0])
            and not (row["kernel"] == "cpu" and row["dims"][0] != row["dims"][1])
        ),
    )


@functools.cache
def wide_case(mask, heads, dims):
    inputs = random_inputs(sum(LENGTHS), *heads, *dims)
    return inputs, dense(all_masks(heads[0])[mask], inputs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mask", all_masks(8))
def test_outputs_and_gradients_equal_the_oracle(mask, strategy):
    # run a seventh of the rows; each strategy covers all rows with two masks, and each mask with all strategies
    first = list(all_masks(8)).index(mask) + list(STRATEGIES).index(strategy)
    for row in rows(strategy)[first % 7 :: 7]:
        inputs, wanted = wide_case(mask, row["heads"], row["dims"])
        plan = make_plan(
            all_masks(row["heads"][0])[mask],
            all_layouts(LENGTHS, row["ranks"])[row["layout"]],
            strategy=strategy,
            heads=row["heads"][0],
            kv_heads=row["heads"][1],
            head_dim=row["dims"][0],
            v_head_dim=row["dims"][1],
            dtype=row["dtype"],
            backward=row["policy"],
            cluster=Cluster(2, row["ranks"] // 2) if row["ranks"] > 2 and row["ranks"] % 2 == 0 else None,
        )
        try:
            assert_close(run_all_ranks(plan, inputs, row["kernel"]), wanted, TOLERANCE[row["dtype"]])
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_six_query_heads_on_four_ranks(strategy):
    inputs, wanted = wide_case("documents", (6, 2), (64, 64))
    for layout in all_layouts(LENGTHS, 4).values():
        shape = dict(heads=6, kv_heads=2, head_dim=64, dtype="float64")
        plan = make_plan(masks(LENGTHS)["documents"], layout, strategy=strategy, **shape)
        assert_close(run_all_ranks(plan, inputs, "cpu"), wanted, TOLERANCE["float64"])


@pytest.mark.parametrize("heads", [(6, 2), (8, 1)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_is_one_kernel_call_or_one_for_each_buffer_of_its_rows(strategy, heads):
    # head groups with and without windows; USP splits groups of query heads that share keys
    mask = all_masks(heads[0])["head groups"]
    inputs, wanted = wide_case("head groups", heads, (64, 64))
    plan = make_plan(
        mask,
        Layout.zigzag(LENGTHS, 4),
        strategy=strategy,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=64,
        dtype="float64",
    )
    record = Record()
    assert_close(run_all_ranks(plan, inputs, "cpu", record), wanted, TOLERANCE["float64"])
    programs = [lower(plan, rank, lambda cells: cells) for rank in range(4)]
    launches = [step.launches for program in programs for step in (*program.forward, *program.backward)]
    assert sum(kind == "compute" for _, kind in record.events) == sum(map(len, launches))
    for of_step in launches:
        # if separate calls compute a rank's own rows and arriving rows, no two calls use the same buffer
        buffers = [{piece.buffer for piece in launch.operands[Payload.Q].slices} for launch in of_step]
        assert sum(map(len, buffers)) == len(set().union(*buffers))


def test_head_groups_of_different_tokens_do_not_share_a_tensor_that_is_mostly_unused():
    # every head has its own keys, so one call for all heads would gather every head's keys for all heads
    n, heads = 64, 8
    bands = [Mask.from_pieces([[0, n, h * 8, h * 8 + 8, -n, n]], n) for h in range(heads)]
    mask = Mask.by_head([(1, band) for band in bands])
    shape = dict(heads=heads, kv_heads=heads, head_dim=8, dtype="float64")
    plan = make_plan(mask, Layout.contiguous([n], 2), strategy="allgather", **shape)
    program = lower(plan, 0, lambda cells: cells)
    launches = [launch for step in program.forward for launch in step.launches]
    needed = sum(8 for h in range(heads))
    assert sum(view.rows * view.heads for launch in launches for view in [launch.operands[Payload.KV]]) <= 2 * needed
    inputs = random_inputs(n, heads, heads, 8)
    assert_close(run_all_ranks(plan, inputs, "cpu"), dense(mask, inputs), TOLERANCE["float64"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_without_tokens_one_document_and_thousands(strategy):
    shape = dict(heads=8, kv_heads=2, head_dim=8, dtype="float64")
    # three of the layout's eight ranks have no tokens
    some = Layout.from_chunks([97], [[(0, 20)], [], [(60, 97)], [], [(20, 21)], [(21, 60)], [], []])
    for layout in (some, Layout.zigzag([97], 8)):
        inputs = random_inputs(97, 8, 2, 8)
        plan = make_plan(Mask.causal(97), layout, strategy=strategy, **shape)
        assert_close(run_all_ranks(plan, inputs, "cpu"), dense(Mask.causal(97), inputs), 1e-11)
    ones = [1] * 5000
    for layout in (Layout.zigzag(ones, 8), Layout.balanced(ones, 8), Layout.document_zigzag(ones, 8)):
        plan = make_plan(Mask.documents(ones), layout, strategy=strategy, **shape)
        inputs = random_inputs(5000, 8, 2, 8)
        got = run_all_ranks(plan, inputs, "cpu")
        # each token attends only to itself, so o = v, lse is its own score, and scores have no gradient
        assert torch.equal(got.o, inputs.v.repeat_interleave(4, 1)), "o"
        wanted = {
            "lse": (inputs.q * inputs.k.repeat_interleave(4, 1)).sum(-1) / 8**0.5,
            "dq": torch.zeros_like(inputs.q),
            "dk": torch.zeros_like(inputs.k),
            "dv": inputs.do.unflatten(1, (2, 4)).sum(2),
        }
        for name, exact in wanted.items():
            off = float((getattr(got, name) - exact).abs().max())
            assert off < 1e-12, f"{name} is off by {off:.1e}"


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_is_at_most_twice_as_far_off_as_one_device(strategy, kernel):
    for mask in ("causal", "documents", "window"):
        inputs, _ = case(LENGTHS, mask, (8, 2), 64)
        # make the inputs exact in bf16, so that only the computation is judged
        inputs = type(inputs)(*(x.bfloat16().double() for x in inputs))
        wanted = dense(masks(LENGTHS)[mask], inputs)
        shape = dict(heads=8, kv_heads=2, head_dim=64, dtype="bfloat16")
        alone = make_plan(masks(LENGTHS)[mask], all_layouts(LENGTHS, 1)["zigzag"], strategy="ring", **shape)
        bound = run_all_ranks(alone, inputs, kernel)
        for ranks in (4, 8):
            plan = make_plan(masks(LENGTHS)[mask], all_layouts(LENGTHS, ranks)["zigzag"], strategy=strategy, **shape)
            got = run_all_ranks(plan, inputs, kernel)
            for name, a, b, exact in zip(got._fields, got, bound, wanted, strict=True):
                assert relative_error(a, exact) <= 2 * relative_error(b, exact), name


SPREAD = [
    ("causal", "ring", 4, (8, 2), "zigzag"),
    ("causal", "allgather", 2, (8, 8), "contiguous"),
    ("causal", "ulysses", 4, (8, 2), "document_zigzag"),
    ("full", "ring", 2, (8, 8), "from_chunks"),
    ("full", "ulysses", 2, (8, 2), "contiguous"),
    ("documents", "ring", 4, (8, 8), "document_zigzag"),
    ("documents", "allgather", 4, (8, 2), "zigzag"),
    ("documents", "ulysses", 4, (8, 8), "from_chunks"),
    ("window", "ring", 4, (8, 2), "contiguous"),
    ("window", "allgather", 4, (8, 8), "document_zigzag"),
    ("odd", "allgather", 4, (8, 2), "from_chunks"),
]


@pytest.mark.parametrize(("mask", "strategy", "ranks", "heads", "layout"), SPREAD)
def test_longer_axes_equal_the_oracle_too(mask, strategy, ranks, heads, layout):
    inputs, wanted = case(LONG, mask, heads)
    for dtype in TOLERANCE:
        shape = dict(heads=heads[0], kv_heads=heads[1], head_dim=8, dtype=dtype)
        plan = make_plan(masks(LONG)[mask], all_layouts(LONG, ranks)[layout], strategy=strategy, **shape)
        assert_close(run_all_ranks(plan, inputs, "cpu"), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_policy_is_right_moves_what_it_says_and_stays_in_memory(strategy, policy, monkeypatch):
    for number, mask in enumerate(("causal", "documents", "window")):
        inputs, wanted = case(LENGTHS, mask, (6, 2))
        for ranks in (2, 4):
            # run every other layout; the other number of ranks and the next mask run the rest
            for layout in list(all_layouts(LENGTHS, ranks).values())[(number + ranks // 2) % 2 :: 2]:
                shape = dict(heads=6, kv_heads=2, head_dim=8, dtype="float64", backward=policy)
                plan = make_plan(masks(LENGTHS)[mask], layout, strategy=strategy, **shape)
                record = Record()
                assert_close(run_all_ranks(plan, inputs, "reference", record), wanted, 1e-11)
                assert record.bytes == planned_bytes(plan)
                proof = verify(plan)
                with monkeypatch.context() as patch:
                    # without rows in which small keys and values live as long as queries
                    patch.setattr(row_bundles, "_MOST_EXTENDED", -1)
                    apart = [lower(plan, program.rank, lambda mask: None) for program in record.programs]
                for program, joined in zip(apart, record.programs, strict=True):
                    for steps, joined_steps, peaks in (
                        (program.forward, joined.forward, proof.forward_peak),
                        (program.backward, joined.backward, proof.backward_peak),
                    ):
                        assert alive_bytes(plan.call, steps) == peaks[program.rank]
                        extended = alive_bytes(plan.call, joined_steps, (Payload.KV,))
                        assert 0 <= alive_bytes(plan.call, joined_steps) - peaks[program.rank] <= extended


def test_value_heads_may_be_wider_than_key_heads():
    inputs = random_inputs(sum(LENGTHS), 4, 2, 8, 12)
    wanted = dense(masks()["documents"], inputs)
    for strategy in STRATEGIES:
        shape = dict(heads=4, kv_heads=2, head_dim=8, v_head_dim=12, dtype="float64")
        plan = make_plan(masks()["documents"], all_layouts(LENGTHS, 4)["zigzag"], strategy=strategy, **shape)
        assert_close(run_all_ranks(plan, inputs, "reference"), wanted, 1e-11)


def test_results_are_the_same_bits_every_time():
    inputs, _ = case(LENGTHS, "causal", (8, 2))
    for strategy in STRATEGIES:
        shape = dict(heads=8, kv_heads=2, head_dim=8, dtype="float32")
        plan = make_plan(masks()["causal"], all_layouts(LENGTHS, 4)["zigzag"], strategy=strategy, **shape)
        first, second = (run_all_ranks(plan, inputs, "cpu") for _ in range(2))
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["causal", "documents", "ones"])
def test_bfloat16_is_at_most_twice_as_far_off_as_pytorch(name, kernel):
    lengths = {"causal": [200], "documents": list(LENGTHS), "ones": [1] * 64}[name]
    n, shape = sum(lengths), dict(heads=4, kv_heads=4, head_dim=64, dtype="bfloat16")
    inputs = type(random_inputs(1, 1, 1, 1))(*(x.bfloat16().double() for x in random_inputs(n, 4, 4, 64)))
    wanted = dense(Mask.documents(lengths), inputs)
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs[:3])
    parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    o = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], 1).transpose(0, 1)
    o.backward(inputs.do.bfloat16())
    plan = make_plan(Mask.documents(lengths), Layout.zigzag(lengths, 4), strategy="ring", **shape)
    got = run_all_ranks(plan, inputs, kernel)
    theirs = {"o": o, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    for part, x in theirs.items():
        exact = getattr(wanted, part)
        ours, other = ((y.detach().double() - exact).abs().max() for y in (getattr(got, part), x))
        # the last term covers fp32 rounding where the true gradient is zero
        assert ours <= 2 * other + 4e-6, part


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sixty_four_ranks_in_lock_step(strategy):
    lengths = [1, 300, 7, 129, 203]
    mask, cluster = Mask.documents(lengths), Cluster(8, 8)
    inputs = random_inputs(640, 64, 8, 4)
    layout = Layout.document_zigzag(lengths, 64, min_chunk=8)
    shape = dict(heads=64, kv_heads=8, head_dim=4, dtype="float64", cluster=cluster)
    plan = make_plan(mask, layout, strategy=strategy, **shape)
    assert_close(run_all_ranks(plan, inputs, "cpu"), dense(mask, inputs), 1e-11)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_results_may_travel_in_half_width(strategy, policy):
    """Compare bytes and memory with the proof. Outputs that a single task computes are as exact as in full precision."""
    mask, layout = Mask.documents(LENGTHS), Layout.zigzag(LENGTHS, 4)
    inputs = random_inputs(mask.n, 8, 2, 64)
    inputs = type(inputs)(*(x.bfloat16().double() for x in inputs))
    wanted = dense(mask, inputs)
    shape = dict(heads=8, kv_heads=2, head_dim=64, dtype="bfloat16", backward=policy)
    wide, narrow = (
        make_plan(mask, layout, strategy=strategy, comm_dtype=comm_dtype, **shape) for comm_dtype in (None, "bfloat16")
    )
    assert wide.bytes()["bytes"].sum() > narrow.bytes()["bytes"].sum()
    record = Record()
    got, usual = run_all_ranks(narrow, inputs, "cpu", record), run_all_ranks(wide, inputs, "cpu")
    assert record.bytes == planned_bytes(narrow)
    for part in ("o", "dq", "dk", "dv"):
        exact = getattr(wanted, part)
        ours, other = ((getattr(x, part).double() - exact).abs().max() for x in (got, usual))
        # each partial result is rounded once more
        assert ours <= 2 * other + exact.abs().max() * 2**-8, part
