"""The Triton kernels match the dense fp64 oracle in Triton's interpreter. Tiles are small, so that there are many.

The interpreter silently computes bfloat16 incorrectly. float16 and float32 replace it here, and bfloat16 is tested on a
GPU.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import LENGTHS, all_masks
from oracle import Result, assert_close, dense, random_inputs, relative_error, run_all_ranks
from pairs import all_pairs

pytest.importorskip("triton", reason="Triton is not installed")

from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.kernels import reference
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.registry import choose_kernel
from distattn.kernels.spec import MOST_TURNS, FinalRows, KernelRequirements, ScoreMod
from distattn.kernels.split_tiles import split_long_tiles
from distattn.kernels.tile_runs import TileRuns, tile_runs, transposed_runs
from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton import tf32 as triton_tf32
from distattn.kernels.triton.attention import Tiles
from distattn.kernels.triton.launch import Tile
from distattn.parallel.make_plan import STRATEGIES, make_plan

pytestmark = pytest.mark.sampled(4)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
SCALE = 0.25
PLAIN = ScoreMod(SCALE)
SMALL = Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1))
UNEVEN = Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1))


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forward(mask, inputs, tiles=SMALL, score=PLAIN, dtype=torch.float32):
    q, k, v, _ = (x.to(dtype) for x in inputs)
    work = triton_attention.prepare_tiles(LaunchMask.from_mask(mask, q.shape[1], k.shape[1]), tiles, 132)
    return work, *triton_attention.forward(q, k, v, work, score)


def both(mask, inputs, tiles=SMALL, score=PLAIN, dtype=torch.float32) -> Result:
    work, o, lse = forward(mask, inputs, tiles, score, dtype)
    q, k, v, do = (x.to(dtype) for x in inputs)
    delta = (do.float() * o).sum(-1)
    return Result(o, lse, *triton_attention.backward(do, q, k, v, lse, delta, work, score))


def visited(
    runs: TileRuns, heads: int, shape: tuple[int, int], block_rows: int, block_keys: int, tile_of: Sequence[int] = ()
) -> np.ndarray:
    """Count how often each cell is visited and allowed according to the tile lists. tile_of: maps the parts of split
    tiles to their tiles.
    """
    rows, keys = shape
    out = np.zeros((heads, rows, keys), int)
    for head in range(heads):
        for part, tile in enumerate(tile_of or range(runs.tiles)):
            row = np.arange(tile * block_rows, min((tile + 1) * block_rows, rows))
            at = runs.group[head] * runs.tiles + part
            for begin, full, rest, end, band, rows_at in runs.run[runs.first[at] : runs.first[at + 1]].tolist():
                bands = np.full(len(row), band) if rows_at < 0 else runs.row_band[rows_at : rows_at + len(row)]
                q0, q1, k0, k1, low, high, bq, bk, oq, _ = runs.band[bands].T.astype(np.int64)
                climbed = bk * ((row - oq) // bq)
                low, high = np.maximum(k0, low + climbed), np.minimum(k1, high + climbed)
                high = np.where((row >= q0) & (row < q1), high, low)
                for n in [*range(begin, full, block_keys), *range(rest, end, block_keys)]:
                    key = np.arange(n, min(n + block_keys, keys))
                    out[head][np.ix_(row, key)] += (key >= low[:, None]) & (key < high[:, None])
                for n in range(full, rest, block_keys):
                    out[head][np.ix_(row, np.arange(n, n + block_keys))] += 1
    return out


@pytest.mark.parametrize("blocks", [(16, 16), (64, 16), (16, 64)])
@pytest.mark.parametrize("name", all_masks(4))
def test_runs_visit_every_allowed_cell_once_and_no_other(name, blocks):
    mask = all_masks(4)[name]
    cells = LaunchMask.from_mask(mask, 4, 2)
    wanted = np.broadcast_to(mask.dense(), (4, mask.n, mask.n)).astype(int)
    assert (visited(tile_runs(cells, *blocks), 4, (mask.n, mask.n), *blocks) == wanted).all()
    turned = wanted.transpose(0, 2, 1)
    runs = transposed_runs(cells, *blocks)
    assert (visited(runs, 4, (mask.n, mask.n), *blocks) == turned).all()
    # on a device with very many multiprocessors, every tile that is long enough is split
    split = split_long_tiles(runs, cells, blocks[1], 10_000)
    assert (visited(split.runs, 4, (mask.n, mask.n), *blocks, split.part[:, 0].tolist()) == turned).all()
    assert split.slots == split.sums[:, 2].sum() == (split.part[:, 1] >= 0).sum()


def test_runs_of_a_causal_axis_are_one_for_each_query_tile():
    runs = tile_runs(LaunchMask.from_mask(Mask.causal(1 << 20), 1, 1), 128, 128)
    assert len(runs.run) == 8192 and runs.visited == sum(128 * (i + 1) for i in range(8192))


def test_short_documents_of_one_query_tile_are_one_run():
    runs = tile_runs(LaunchMask.from_mask(Mask.documents([8] * 64), 1, 1), 128, 128)
    assert len(runs.run) == 4 and runs.visited == 4 * 128


def wanted_of(mask, inputs, score) -> Result:
    """Compute the results with the reference kernel in fp64. It is tested against the oracle, which has no score
    modifiers.
    """
    demand = KernelRequirements(torch.float64, *inputs.v.shape[1:], torch.device("cpu"))
    work = reference.prepare(LaunchMask.from_mask(mask, inputs.q.shape[1], inputs.k.shape[1]), demand)
    o, lse = reference.forward(*inputs[:3], work, score)
    delta = (inputs.do * o).sum(-1)
    return Result(o, lse, *reference.backward(inputs.do, *inputs[:3], lse, delta, work, score))


FACTORS = {
    "dtype": [torch.float32, torch.float16],
    "heads": [(4, 4), (4, 2), (6, 2), (3, 1)],
    "dims": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (32, 16)],
    "tiles": [SMALL, UNEVEN],
    "modifier": ["none", "softcap", "alibi", "both"],
}


def score_of(modifier: str, heads: int) -> ScoreMod:
    slopes = torch.linspace(0.02, 0.5, heads) if modifier in ("alibi", "both") else None
    return ScoreMod(SCALE, 1.5 if modifier in ("softcap", "both") else 0.0, slopes)


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", all_masks(4))
def test_forward_and_backward_equal_the_reference(name):
    # each mask runs with some combinations of FACTORS, and together the masks cover all of them
    names = list(all_masks(4))
    for row in all_pairs(FACTORS, lambda row: True)[names.index(name) :: len(names)]:
        mask = all_masks(row["heads"][0])[name]
        inputs = random_inputs(sum(LENGTHS), *row["heads"], *row["dims"])
        score = score_of(row["modifier"], row["heads"][0])
        wanted = wanted_of(mask, inputs, score)
        try:
            assert_close(both(mask, inputs, row["tiles"], score, row["dtype"]), wanted, TOLERANCE[row["dtype"]])
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from None


@pytest.mark.parametrize("n", [2, 15, 33])
def test_any_length_equals_the_oracle(n):
    inputs = random_inputs(n, 2, 1, 16)
    assert_close(both(Mask.sliding_window(n, 20, 5), inputs), dense(Mask.sliding_window(n, 20, 5), inputs, SCALE), 1e-5)


def test_one_token_attends_to_itself():
    inputs = random_inputs(1, 2, 1, 16)
    got = both(Mask.causal(1), inputs)
    assert (
        relative_error(got.o, inputs.v.expand(1, 2, 16)) < 1e-6
        and relative_error(got.dv[0, 0], inputs.do[0].sum(0)) < 1e-6
    )
    assert got.dq.abs().max() < 1e-5 and got.dk.abs().max() < 1e-5


def test_rows_without_keys_give_zero_and_minus_infinity():
    mask = Mask.from_pieces([[20, 70, 0, 30, -90, 90]], n=90)
    got = both(mask, random_inputs(90, 2, 1, 16))
    empty = [*range(20), *range(70, 90)]
    assert (got.o[empty] == 0).all() and (got.lse[empty] == -torch.inf).all() and (got.dq[empty] == 0).all()
    assert torch.isfinite(got.lse[20:70]).all() and (got.dk[30:] == 0).all()


def test_results_are_the_same_bits_every_time():
    mask, inputs = Mask.documents([40, 30, 26]), random_inputs(96, 4, 2, 32)
    for a, b in zip(both(mask, inputs), both(mask, inputs), strict=True):
        assert torch.equal(a, b)


def thirds(n):
    """Split the causal mask by key into three parts, as a ring does. Some rows have no keys in the second part."""
    return [Mask.from_pieces([[0, n, k, k + n // 3, -n, 0]], n) for k in range(0, n, n // 3)]


def test_a_ring_of_merges_equals_one_shot():
    n, score = 96, ScoreMod(SCALE)
    inputs = random_inputs(n, 2, 1, 80, 48)
    q, k, v, _ = (x.to(torch.float16) for x in inputs)
    o, lse = torch.full((n, 2, 48), torch.nan), torch.full((n, 2), torch.nan)
    for i, part in enumerate(thirds(n)):
        work = triton_attention.prepare_tiles(LaunchMask.from_mask(part, 2, 1), SMALL, 132)
        triton_attention.forward(q, k, v, work, score, into=(o, lse), merge=i > 0)
    wanted = wanted_of(Mask.causal(n), inputs, score)
    assert relative_error(o, wanted.o) < 4e-3 and relative_error(lse, wanted.lse) < 4e-3


def test_gradients_are_added_to_what_is_there():
    n, score = 96, ScoreMod(SCALE)
    inputs = random_inputs(n, 2, 1, 32)
    wanted = dense(Mask.causal(n), inputs, SCALE)
    q, k, v, do = (x.float() for x in inputs)
    delta = (inputs.do * wanted.o).sum(-1).float()
    dq, dk, dv = torch.zeros(n, 2, 32), torch.zeros(n, 1, 32), torch.zeros(n, 1, 32)
    for part in thirds(n):
        work = triton_attention.prepare_tiles(LaunchMask.from_mask(part, 2, 1), SMALL, 132)
        into = (dq, (dk, dv))
        triton_attention.backward(do, q, k, v, wanted.lse.float(), delta, work, score, into=into, add=(True, True))
    for name, got in (("dq", dq), ("dk", dk), ("dv", dv)):
        assert relative_error(got, getattr(wanted, name)) < 1e-5, name


def launches_in_turn(n, heads, order):
    """Yield (rows, cells, turns) of a causal mask's launches. order: thirds of the keys; earlier rows are left out."""
    third = np.arange(n) * 3 // n
    writers = [[number for number, part in enumerate(order) if part <= of_row] for of_row in third]
    turns = torch.tensor([numbers[0] * MOST_TURNS + numbers[-1] for numbers in writers], dtype=torch.int32)
    for part in order:
        begin = part * n // 3
        mask = Mask.from_pieces([[0, n - begin, 0, n // 3, begin - n, 0]], n - begin)
        yield slice(begin, n), LaunchMask.from_mask(mask, heads, 1), turns[begin:]


ORDERS = [(0, 1, 2), (2, 1, 0), (1, 0, 2)]


@pytest.mark.parametrize("order", ORDERS)
def test_the_last_launch_of_a_row_writes_it_in_the_inputs_dtype(order):
    n, score, heads = 96, ScoreMod(SCALE), 2
    inputs = random_inputs(n, heads, 1, 80, 48)
    q, k, v, do = (x.to(torch.float16) for x in inputs)
    wanted = wanted_of(Mask.causal(n), inputs, score)
    lse_all, delta = wanted.lse.float(), (inputs.do * wanted.o).sum(-1).float()
    # rows that no launch has written may hold any value
    o, dq = torch.full((n, heads, 48), torch.nan), torch.full((n, heads, 80), torch.nan)
    out, dq_out = (torch.full_like(x, torch.nan, dtype=q.dtype) for x in (o, dq))
    lse = torch.full((n, heads), -torch.inf)
    for number, (rows, cells, turns) in enumerate(launches_in_turn(n, heads, order)):
        work = triton_attention.prepare_tiles(cells, SMALL, 132)
        operands = q[rows], k[rows], v[rows]
        final, dq_final = (FinalRows(x[rows], turns, number) for x in (out, dq_out))
        triton_attention.forward(*operands, work, score, into=(o[rows], lse[rows]), merge=number > 0, final=final)
        triton_attention.backward(
            do[rows], *operands, lse_all[rows], delta[rows], work, score,
            into=(dq[rows], None), add=(number > 0, False), final=dq_final,
        )  # fmt: skip
        is_finished = turns % MOST_TURNS <= number
        for x in (out, dq_out):
            assert torch.isfinite(x[rows][is_finished]).all() and torch.isnan(x[rows][~is_finished]).all()
    assert relative_error(out, wanted.o) < 4e-3 and relative_error(lse, wanted.lse) < 4e-3
    assert relative_error(dq_out, wanted.dq) < 4e-3


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "dims"), [(torch.float32, (80, 48)), (torch.float16, (32, 32))])
def test_keys_that_all_rows_see_are_summed_by_several_programs(dims, dtype):
    n, score = 256, ScoreMod(SCALE)
    inputs = random_inputs(n, 4, 1, *dims)
    mask = Mask.documents([n], (15, 0), sink_tokens=3)
    work, o, lse = forward(mask, inputs, score=score, dtype=dtype)
    assert work.dkdv.slots > 4
    q, k, v, do = (x.to(dtype) for x in inputs)
    delta = (do.float() * o).sum(-1)
    got, again = (Result(o, lse, *triton_attention.backward(do, q, k, v, lse, delta, work, score)) for _ in range(2))
    wanted = wanted_of(mask, inputs, score)
    assert_close(got, wanted, TOLERANCE[dtype])
    assert torch.equal(got.dk, again.dk) and torch.equal(got.dv, again.dv)
    # gradients accumulate into earlier values
    delta = (inputs.do * wanted.o).sum(-1).float()
    dk, dv = torch.ones_like(got.dk), torch.ones_like(got.dv)
    triton_attention.backward(
        do, q, k, v, wanted.lse.float(), delta, work, score, into=(None, (dk, dv)), add=(False, True)
    )
    assert relative_error(dk - 1, wanted.dk) < TOLERANCE[dtype] and relative_error(dv - 1, wanted.dv) < TOLERANCE[dtype]


# each strategy gets one of the two masks
STRATEGY_MASKS = list(zip(STRATEGIES, itertools.cycle(["documents", "head groups"]), strict=False))


@pytest.mark.sampled(20)
@pytest.mark.parametrize(("strategy", "mask"), STRATEGY_MASKS)
def test_strategies_equal_the_oracle_with_the_triton_kernel(strategy, mask):
    inputs = random_inputs(sum(LENGTHS), 6, 2, 32)
    plan = make_plan(
        all_masks(6)[mask],
        Layout.zigzag(LENGTHS, 4),
        strategy=strategy,
        heads=6,
        kv_heads=2,
        head_dim=32,
        dtype="float32",
    )
    assert_close(run_all_ranks(plan, inputs, "triton"), dense(all_masks(6)[mask], inputs), 2e-5)


def test_a_ring_step_writes_and_merges_in_the_kernel(monkeypatch):
    # fail if partial results are merged outside the kernel
    def refuse(*fields):
        raise AssertionError("a second kernel merges")

    monkeypatch.setattr("distattn.parallel.runtime.execution.buffers.merge_rows", refuse)
    inputs = random_inputs(128, 2, 1, 32)
    shape = dict(heads=2, kv_heads=1, head_dim=32, dtype="float32")
    plan = make_plan(Mask.causal(128), Layout.contiguous([128], 4), strategy="ring", **shape)
    assert_close(run_all_ranks(plan, inputs, "triton"), dense(Mask.causal(128), inputs), 2e-5)


def test_calls_that_cannot_be_computed_are_refused():
    for demand, sentence in (
        (KernelRequirements(torch.float64, 64, 64, torch.device("cpu")), "bfloat16, float16 and float32, not float64"),
        (
            KernelRequirements(torch.float16, 112, 112, torch.device("cpu")),
            "sums of two from 16 to 256 .80, 96, 192., not 112",
        ),
        (KernelRequirements(torch.float16, 512, 512, torch.device("cpu")), "not 512"),
    ):
        with pytest.raises(DistattnError, match=sentence):
            choose_kernel("triton", demand)
    assert choose_kernel(None, KernelRequirements(torch.bfloat16, 192, 128, torch.device("cuda"))) == "triton"


def test_half_precision_goes_by_descriptors_and_single_by_pointers():
    for dtype, tma in ((torch.float16, True), (torch.float32, False)):
        q, k, v, _ = (x.to(dtype) for x in random_inputs(20, 2, 1, 32))
        work = triton_attention.prepare_tiles(LaunchMask.from_mask(Mask.causal(20), 2, 1), SMALL, 132)
        o, lse = torch.empty(20, 2, 32), torch.empty(20, 2)
        plan = triton_attention.forward_launch
        assert plan(q, k, v, o, lse, work, ScoreMod(SCALE)).arguments["TMA"] is tma
        # rows that are not aligned to 16 bytes
        odd = torch.zeros(20 * 64 + 1, dtype=dtype)[1:].view(20, 2, 32)
        assert not plan(odd, k, v, o, lse, work, ScoreMod(SCALE)).arguments["TMA"]


def test_heads_may_lie_further_apart_than_32_bits_reach():
    # a view that spans 6 GB, most of which is never touched or filled
    torch.use_deterministic_algorithms(False)
    n, stride, dtype = 20, (1 << 30) + 64, torch.float16
    memory = torch.empty(3 * stride, dtype=dtype)
    q = torch.as_strided(memory, (n, 3, 16), (16, stride, 1))
    inputs = random_inputs(n, 3, 3, 16)
    q.copy_(inputs.q)
    wanted = dense(Mask.causal(n), inputs, SCALE)
    work = triton_attention.prepare_tiles(LaunchMask.from_mask(Mask.causal(n), 3, 3), SMALL, 132)
    k, v, do = (x.to(dtype) for x in inputs[1:])
    o, lse = triton_attention.forward(q, k, v, work, PLAIN)
    assert relative_error(o, wanted.o) < TOLERANCE[dtype]
    delta = (do.float() * o).sum(-1)
    dq, dk, _ = triton_attention.backward(do, q, k, v, lse, delta, work, PLAIN)
    assert relative_error(dq, wanted.dq) < TOLERANCE[dtype] and relative_error(dk, wanted.dk) < TOLERANCE[dtype]


def test_tf32_is_a_kernel_of_its_own():
    inputs = random_inputs(40, 2, 1, 32)
    q, k, v, do = (x.float() for x in inputs)
    cells, wanted = LaunchMask.from_mask(Mask.causal(40), 2, 1), dense(Mask.causal(40), inputs, SCALE)
    work = triton_tf32.prepare(cells, KernelRequirements(torch.float32, 32, 32, torch.device("cpu")))
    o, lse = triton_tf32.forward(q, k, v, work, PLAIN)
    grads = triton_tf32.backward(do, q, k, v, lse, (do * o).sum(-1), work, PLAIN)
    assert_close(Result(o, lse, *grads), wanted, 2e-3)
