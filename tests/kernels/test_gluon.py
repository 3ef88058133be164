"""The Gluon kernels match the reference in an emulator that runs their warps, copies and products out of order."""

import ast
import inspect
import textwrap

import pytest
import torch
from cases import LENGTHS, all_masks
from oracle import Result, assert_close, dense, random_inputs, relative_error, run_all_ranks
from pairs import all_pairs

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from gluon_emulator import emulate
from test_triton import TOLERANCE, score_of, thirds, wanted_of

from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.gluon import backward as gluon_backward
from distattn.kernels.gluon import forward as gluon_forward
from distattn.kernels.gluon import split as gluon_split
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.registry import choose_kernel
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.triton import launch as triton_launch
from distattn.parallel.make_plan import make_plan

pytestmark = pytest.mark.sampled(5)

CPU = torch.device("cpu")
TOLERANCES = TOLERANCE | {torch.bfloat16: 3e-2}
PLAIN = ScoreMod(0.25)
FACTORS = {
    "dtype": [torch.float16, torch.bfloat16],
    "heads": [(4, 4), (4, 2), (6, 2), (3, 1)],
    "dim": [64, 128],
    "modifier": ["none", "softcap", "alibi", "both"],
    "seed": [1, 2],
}


def run_emulated(launch, seed=0):
    """Run a launch in the emulator instead of with `run_launch`."""
    if launch.kernel is gluon_forward.forward_kernel:
        warpgroups = ["1", "2", "3"][: launch.arguments["BM"] // 64]
        for begun in emulate(launch, seed):
            assert begun == warpgroups * (len(begun) // len(warpgroups)), "warpgroups do not take turns"
    elif launch.kernel is gluon_backward.backward_kernel:
        emulate(launch, seed)
    else:
        triton_launch.run_launch(launch)


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch):
    monkeypatch.setattr(gluon_attention, "run_launch", run_emulated)
    # make programs process several tiles, however unevenly the tiles are distributed
    monkeypatch.setattr(gluon_attention, "forward_programs", lambda runs, *_: min(2, runs.tiles * len(runs.group)))
    for kernel in (gluon_attention, gluon_split):
        monkeypatch.setattr(kernel, "unsupported_reason", lambda demand: None)
    # fill uninitialized memory with NaN
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(cells, inputs, score=PLAIN, dtype=torch.float16) -> Result:
    q, k, v, do = (x.to(dtype) for x in inputs)
    work = gluon_attention.prepare(cells, KernelRequirements(dtype, q.shape[2], v.shape[2], CPU))
    o, lse = gluon_attention.forward(q, k, v, work, score)
    delta = (do.float() * o).sum(-1)
    return Result(o, lse, *gluon_attention.backward(do, q, k, v, lse, delta, work, score))


@pytest.mark.parametrize("name", all_masks(4))
def test_forward_and_backward_equal_the_reference(name, monkeypatch):
    # each mask runs with some combinations of FACTORS, and together the masks cover all of them
    names = list(all_masks(4))
    for row in all_pairs(FACTORS, lambda row: True)[names.index(name) :: len(names)]:
        monkeypatch.setattr(gluon_attention, "run_launch", lambda launch, seed=row["seed"]: run_emulated(launch, seed))
        mask = all_masks(row["heads"][0])[name]
        inputs = random_inputs(sum(LENGTHS), *row["heads"], row["dim"])
        score = score_of(row["modifier"], row["heads"][0])
        try:
            got = both(LaunchMask.from_mask(mask, *row["heads"]), inputs, score, row["dtype"])
            assert_close(got, wanted_of(mask, inputs, score), TOLERANCES[row["dtype"]])
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from None


@pytest.mark.parametrize("n", [1, 2, 15, 33, 129, 700])
def test_any_length_equals_the_oracle(n):
    # the values have zero mean, so that gradients of a few tokens are not differences of nearly equal numbers
    mask, inputs = Mask.sliding_window(n, 300, 5), random_inputs(n, 2, 1, 64)
    got, wanted = both(LaunchMask.from_mask(mask, 2, 1), inputs), dense(mask, inputs, 0.25)
    assert relative_error(got.o, wanted.o) < 4e-3 and relative_error(got.dv, wanted.dv) < 4e-3
    if n > 1:
        assert_close(got, wanted, 8e-3)


def test_rows_without_keys_give_zero_and_minus_infinity():
    mask = Mask.from_pieces([[20, 190, 0, 30, -290, 290]], n=290)
    got = both(LaunchMask.from_mask(mask, 2, 1), random_inputs(290, 2, 1, 64))
    empty = [*range(20), *range(190, 290)]
    assert (got.o[empty] == 0).all() and (got.lse[empty] == -torch.inf).all() and (got.dq[empty] == 0).all()
    assert torch.isfinite(got.lse[20:190]).all() and (got.dk[30:] == 0).all()


def test_heads_that_begin_inside_a_group_use_its_keys():
    # query heads 1 to 3 in groups of two use the keys of heads 0, 1 and 1
    n, inputs = 150, random_inputs(150, 3, 2, 64)
    cells = LaunchMask.from_mask(Mask.causal(n), 3, 2)._replace(group_size=2, first_head=1)
    got = both(cells, inputs)
    wide = [torch.cat([x[:, :1], x], 1) for x in (inputs.q, inputs.do)]
    whole = dense(Mask.causal(n), inputs._replace(q=wide[0], do=torch.cat([0 * wide[1][:, :1], inputs.do], 1)), 0.25)
    wanted = Result(whole.o[:, 1:], whole.lse[:, 1:], whole.dq[:, 1:], whole.dk, whole.dv)
    assert_close(got, wanted, 4e-3)


def test_a_ring_of_merges_equals_one_shot(monkeypatch):
    n = 288
    inputs = random_inputs(n, 2, 1, 64)
    q, k, v, _ = (x.to(torch.float16) for x in inputs)
    o, lse = torch.full((n, 2, 64), torch.nan), torch.full((n, 2), torch.nan)
    for i, part in enumerate(thirds(n)):
        monkeypatch.setattr(gluon_attention, "run_launch", lambda launch, seed=i: run_emulated(launch, seed))
        work = gluon_attention.prepare(LaunchMask.from_mask(part, 2, 1), KernelRequirements(torch.float16, 64, 64, CPU))
        gluon_attention.forward(q, k, v, work, PLAIN, into=(o, lse), merge=i > 0)
    wanted = wanted_of(Mask.causal(n), inputs, PLAIN)
    assert relative_error(o, wanted.o) < 4e-3 and relative_error(lse, wanted.lse) < 4e-3


def test_gradients_are_added_to_what_is_there():
    n, inputs = 288, random_inputs(288, 2, 1, 128)
    wanted = dense(Mask.causal(n), inputs, 0.25)
    q, k, v, do = (x.to(torch.float16) for x in inputs)
    delta = (inputs.do * wanted.o).sum(-1).float()
    dq, dk, dv = torch.ones(n, 2, 128), torch.ones(n, 1, 128), torch.ones(n, 1, 128)
    for part in thirds(n):
        work = gluon_attention.prepare(
            LaunchMask.from_mask(part, 2, 1), KernelRequirements(torch.float16, 128, 128, CPU)
        )
        gluon_attention.backward(
            do, q, k, v, wanted.lse.float(), delta, work, PLAIN, into=(dq, (dk, dv)), add=(True, True)
        )
    for name, got in (("dq", dq), ("dk", dk), ("dv", dv)):
        assert relative_error(got - 1, getattr(wanted, name)) < 4e-3, name


def test_operands_that_begin_anywhere_are_copied():
    inputs, n = random_inputs(100, 2, 1, 64), 100
    odd = torch.zeros(n * 128 + 1, dtype=torch.float16)[1:].view(n, 2, 64).copy_(inputs.q)
    work = gluon_attention.prepare(
        LaunchMask.from_mask(Mask.causal(n), 2, 1), KernelRequirements(torch.float16, 64, 64, CPU)
    )
    o, _ = gluon_attention.forward(odd, inputs.k.half(), inputs.v.half(), work, PLAIN)
    assert relative_error(o, dense(Mask.causal(n), inputs, 0.25).o) < 4e-3


def test_no_keys_and_no_rows():
    q, none = torch.randn(40, 2, 64).half(), torch.zeros(0, 1, 64).half()
    bands, heads, shift = (x[:0] for x in LaunchMask.from_mask(Mask.causal(1), 2, 1)[:3])
    work = gluon_attention.prepare(
        LaunchMask(bands, heads, shift, 40, 0, 2, 1, 2), KernelRequirements(torch.float16, 64, 64, CPU)
    )
    o, lse = gluon_attention.forward(q, none, none, work, PLAIN)
    assert (o == 0).all() and (lse == -torch.inf).all()
    work = gluon_attention.prepare(
        LaunchMask(bands, heads, shift, 0, 40, 2, 1, 2), KernelRequirements(torch.float16, 64, 64, CPU)
    )
    some, lse = torch.randn(40, 1, 64).half(), torch.zeros(0, 2)
    grads = gluon_attention.backward(q[:0], q[:0], some, some, lse, lse, work, PLAIN)
    assert all((x == 0).all() for x in grads[1:])


@pytest.mark.parametrize("kernel", ["gluon", "gluon_split"])
def test_a_ring_and_ulysses_equal_the_oracle(kernel):
    torch.use_deterministic_algorithms(kernel == "gluon_split")
    inputs, mask = random_inputs(sum(LENGTHS), 6, 2, 64), all_masks(6)["documents"]
    shape = dict(heads=6, kv_heads=2, head_dim=64, dtype="float16")
    for strategy in ("ring", "ulysses"):
        plan = make_plan(mask, Layout.zigzag(LENGTHS, 2), strategy=strategy, **shape)
        assert_close(run_all_ranks(plan, inputs, kernel), dense(mask, inputs), 5e-3)


@pytest.mark.full
def test_any_order_of_warps_gives_the_same_forward_dk_and_dv(monkeypatch):
    mask, inputs = Mask.documents([200, 250, 100]), random_inputs(550, 2, 1, 64)
    wanted = dense(mask, inputs, 0.25)
    first = both(LaunchMask.from_mask(mask, 2, 1), inputs)
    for seed in range(1, 12):
        monkeypatch.setattr(gluon_attention, "run_launch", lambda launch, seed=seed: run_emulated(launch, seed))
        got = both(LaunchMask.from_mask(mask, 2, 1), inputs)
        assert_close(got, wanted, 4e-3)
        for name in ("o", "lse", "dk", "dv"):
            assert torch.equal(getattr(got, name), getattr(first, name)), name


SYNCHRONISING = ("mbarrier.wait", "mbarrier.arrive", "mbarrier.expect", "fence_async_shared", "tma.store_wait")


def statements_that_synchronise(function) -> list[int]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) in SYNCHRONISING
    ]


def without(function, line: int):
    """Return the function without the statement at `line`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))

    class Remove(ast.NodeTransformer):
        def visit_Expr(self, node):
            return ast.Pass() if node.lineno == line else node

    tree.body[0].decorator_list = []
    namespace: dict = {}
    exec(compile(ast.fix_missing_locations(Remove().visit(tree)), "<mutant>", "exec"), function.__globals__, namespace)
    return namespace[function.__name__]


MUTANTS = [
    (kernel, line)
    for kernel in (
        *(gluon_forward._fetch, gluon_forward._multiply),
        *(gluon_backward._fetch, gluon_backward._multiply, gluon_backward._add_out),
    )
    for line in statements_that_synchronise(kernel.fn)
]


@pytest.mark.parametrize(("kernel", "line"), MUTANTS, ids=lambda x: x if isinstance(x, int) else x.fn.__qualname__)
def test_every_barrier_and_fence_is_needed(kernel, line, monkeypatch):
    # this also proves that the emulator detects such faults. The last tile of a head needs only one key tile, so
    # without a barrier the queries of the tile after the next would arrive too early
    lengths = [576, 300, 84, 24]
    mask, inputs = Mask.documents(lengths), random_inputs(sum(lengths), 3, 1, 64)
    cells, wanted = LaunchMask.from_mask(mask, 3, 1), dense(mask, inputs, 0.25)
    statement = inspect.getsource(kernel.fn).splitlines()[line - 1].strip()
    monkeypatch.setattr(kernel, "fn", without(kernel.fn, line))
    for seed in range(60):
        monkeypatch.setattr(gluon_attention, "run_launch", lambda launch, seed=seed: run_emulated(launch, seed))
        try:
            assert_close(both(cells, inputs), wanted, 4e-3)
        except AssertionError:
            return
    raise AssertionError(f"no run misses {statement}")


def test_dispatch_is_explicit(monkeypatch):
    monkeypatch.undo()
    hopper = KernelRequirements(torch.bfloat16, 128, 128, torch.device("cuda"))
    monkeypatch.setattr(gluon_attention, "compute_capability", lambda device: 90)
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(gluon_attention, "compute_capability", lambda device: 90)
    assert choose_kernel("gluon", hopper) == "gluon" and choose_kernel(None, hopper) == "triton"
    torch.use_deterministic_algorithms(True)
    assert choose_kernel("gluon", hopper) == "gluon_split"
    for demand, sentence in (
        (hopper._replace(device=CPU), "Hopper GPUs"),
        (hopper._replace(dtype=torch.float32), "bfloat16 and float16, not float32"),
        (hopper._replace(v_head_dim=64), "64 and 128, not 128 and 64"),
    ):
        with pytest.raises(DistattnError, match=sentence):
            choose_kernel("gluon", demand)
    monkeypatch.setattr(gluon_attention, "compute_capability", lambda device: 100)
    with pytest.raises(DistattnError, match="sm_90"):
        choose_kernel("gluon", hopper)


@pytest.mark.parametrize(("dtype", "low"), [(torch.float16, -20.0), (torch.bfloat16, -105.0)])
def test_rows_past_the_end_of_the_keys_do_not_overflow(dtype, low):
    # every score is far below 0, so a zero in place of a missing key would get a weight that overflows
    n, inputs = 200, random_inputs(200, 1, 1, 64)
    inputs = inputs._replace(q=torch.full_like(inputs.q, 1.0), k=torch.full_like(inputs.k, low / 16) + inputs.k / 64)
    got, wanted = both(LaunchMask.from_mask(Mask.full(n), 1, 1), inputs, dtype=dtype), dense(Mask.full(n), inputs, 0.25)
    assert got.lse.max() < low + 8 and torch.isfinite(got.dq).all()
    assert relative_error(got.dv, wanted.dv) < 0.05


def test_keys_that_all_rows_see_are_summed_by_several_programs(monkeypatch):
    monkeypatch.setattr(gluon_attention, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(gluon_attention, "run_launch", lambda launch: run_emulated(launch, 3))
    mask = Mask.documents([520], (40, 0), sink_tokens=3)
    cells, inputs = LaunchMask.from_mask(mask, 4, 1), random_inputs(520, 4, 1, 64)
    work = gluon_attention.prepare(cells, KernelRequirements(torch.float16, 64, 64, CPU))
    assert work.backward.slots > 2
    assert_close(both(cells, inputs), wanted_of(mask, inputs, PLAIN), TOLERANCES[torch.float16])
