"""The PTX of the Hopper kernels, run by an interpreter on the CPU, matches the dense oracle. No GPU is needed.

The emulator of test_gluon.py runs the kernels' Python code and takes some things for granted. They are tested here on
the compiled text: layouts, swizzles, descriptors, boxes, byte counts on barriers, fences, and registers of products in
flight.
"""

import re
from functools import cache

import numpy as np
import pytest
import torch
from oracle import Inputs, Result, dense, relative_error

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from ptx.cases import Case, backward_call, forward_call
from ptx.compile import ROOT, Compiled, compiled
from ptx.copies import TensorMap
from ptx.errors import DeadlockError, MachineError, OutOfBoundsError, UnknownOperationError
from ptx.launches import interpret
from ptx.machine import LoadedKernel, Program, prepare
from ptx.memory import SHARED_BASE, GlobalMemory
from ptx.parse import parse
from ptx.tensor_core import DEPTH, Descriptor
from test_triton import wanted_of

full = pytest.mark.full
# allow for a few roundings of the products' operands; the log-sum-exp is never rounded
TOLERANCES = {"bfloat16": 4e-3, "float16": 6e-4}
LSE_TOLERANCE = 1e-6
# more key tiles than there are buffers for them
LONG = 600
DOCUMENTS = 100, 7, 150, 83
FORWARD = Case("forward", tokens=LONG)
# programs process several tiles, the last two with a single key tile each, so that queries might be fetched too early
SEVERAL = Case("forward", heads=3, tokens=408, documents=(384, 24), multiprocessors=2)
CASES = [
    SEVERAL,
    Case("forward", dim=128, tokens=LONG, multiprocessors=3),
    Case("forward", "float16", tokens=LONG),
    Case("forward", "float16", dim=128, heads=4, kv_heads=2),
    Case("forward", dim=128, modifiers=True),
    Case("forward", dim=128, documents=DOCUMENTS),
    Case("backward"),
    Case("backward", dim=128, documents=DOCUMENTS),
    Case("backward", "float16", heads=4, kv_heads=2),
    # the tile of the first keys is a partial tile
    Case("backward", heads=4, kv_heads=1),
    Case("backward", dim=128, modifiers=True),
    Case("split"),
    Case("split", dim=128),
]
# installed by `make tritons`
OLDER_TRITON = ROOT / ".venv" / "triton-3.6.0"


@cache
def wanted(case: Case) -> Result:
    """Compute the reference results for the rounded inputs."""
    inputs = Inputs(*(x.double() for x in case.inputs()))
    return wanted_of(case.mask, inputs, case.score) if case.modifiers else dense(case.mask, inputs, case.score.scale)


def run(case: Case, kernels: list[Compiled], seed: int = 0, programs=None) -> dict[str, torch.Tensor]:
    """Run the compiled launches of a case. Return their results."""
    if case.kernels == "forward":
        call = forward_call(case)
    else:
        exact = wanted(case)
        delta = (case.inputs().do.double() * exact.o).sum(-1)
        call = backward_call(case, exact.lse.float(), delta.float())
    # plain Triton omits the fence between an mbarrier's initialization and the first copy that counts bytes on the
    # mbarrier
    fenced = case.kernels != "split"
    for launch, kernel in zip(call.launches, kernels, strict=True):
        only = programs if launch is call.launches[-1] else None
        begun = interpret(launch, kernel, only, seed=seed, fenced_barriers=fenced)
    if case.kernels == "forward":
        warpgroups = list(range(call.launches[0].arguments["BM"] // 64))
        for order in begun:
            assert order == warpgroups * (len(order) // len(warpgroups)), "warpgroups do not take turns"
    return call.results


def assert_close_to_the_reference(case: Case, results: dict[str, torch.Tensor]) -> None:
    exact = wanted(case)
    for name, got in results.items():
        tolerance = LSE_TOLERANCE if name == "lse" else TOLERANCES[case.dtype]
        error = relative_error(got, getattr(exact, name))
        assert error <= tolerance, f"{name} is off by {error:.2e}, more than {tolerance:.0e}"


@pytest.mark.full
def test_one_forward_program_equals_the_reference():
    # queries [256, 384) of the first head: the third tile from the end, with two unmasked key tiles and a masked tile
    results, exact = run(FORWARD, compiled(FORWARD), programs=[4]), wanted(FORWARD)
    rows = slice(256, 384)
    assert relative_error(results["o"][rows, 0], exact.o[rows, 0]) < TOLERANCES["bfloat16"]
    assert relative_error(results["lse"][rows, 0], exact.lse[rows, 0]) < LSE_TOLERANCE
    assert results["o"][rows, 1].isnan().all() and results["lse"][384:].isnan().all()


@full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_programs_equal_the_reference(case):
    first = run(case, compiled(case))
    assert_close_to_the_reference(case, first)
    if case in (SEVERAL, Case("backward"), Case("split")):
        # results are bitwise the same for any order of warps and copies
        second = run(case, compiled(case), seed=1)
        assert all(torch.equal(first[name], second[name]) for name in first)


@full
@pytest.mark.parametrize("case", [FORWARD, Case("backward", dim=128), Case("split", dim=128)], ids=str)
def test_all_programs_compiled_by_an_older_triton_equal_the_reference(case):
    if not OLDER_TRITON.exists():
        pytest.skip("Triton 3.6.0 is not installed next to the environment; run `make tritons`")
    assert_close_to_the_reference(case, run(case, compiled(case, OLDER_TRITON)))


@full
def test_a_merge_weighs_what_was_there_against_what_comes():
    case = Case("merge", dim=128)
    generator = torch.Generator().manual_seed(1)
    before_o, before_lse = (torch.randn(case.tokens, 2, *dim, generator=generator) for dim in ((128,), ()))
    # some rows had no keys before the merge, and some earlier results outweigh everything that is merged
    before_o[::7], before_lse[::7] = 0, -torch.inf
    before_lse[1::7] = 20
    o, lse = before_o.clone(), before_lse.clone()
    interpret(forward_call(case, into=(o, lse)).launches[0], *compiled(case))
    exact = wanted(case)
    merged = torch.logaddexp(before_lse.double(), exact.lse)
    shares = torch.exp(before_lse.double() - merged)[..., None], torch.exp(exact.lse - merged)[..., None]
    assert relative_error(o, before_o * shares[0] + exact.o * shares[1]) < TOLERANCES["bfloat16"]
    assert relative_error(lse, merged) < LSE_TOLERANCE


def replaced(pattern: str, replacement: str, which: int = 0):
    """Return a change that removes source-line directives and replaces match number `which` of a pattern."""

    def change(kernel: Compiled) -> Compiled:
        text = re.sub(r"^\s*(\.loc|//).*\n", "", kernel.ptx, flags=re.M)
        place = list(re.finditer(pattern, text))[which]
        return kernel._replace(ptx=text[: place.start()] + place.expand(replacement) + text[place.end() :])

    return change


def remapped(number: int, **fields):
    """Return a change of one tensor map's fields."""
    return lambda kernel: kernel._replace(
        maps=[entry | fields if i == number else entry for i, entry in enumerate(kernel.maps)]
    )


# maps a name to the kernels, the change of the last kernel, and the error that must follow. The descriptor has a
# 128-byte swizzle and a stride of 1024 bytes between groups of 8 rows
DESCRIPTOR = str(0x4000004000000000)
BUGS = {
    "the map of the keys has no swizzle": ("forward", remapped(1, swizzle=0), "mismatch"),
    "the map of the keys has half a swizzle": ("forward", remapped(1, swizzle=2), "TensorMapError.*longer"),
    "a descriptor has half a swizzle": ("forward", replaced(DESCRIPTOR, str(0x8000004000000000), 3), "mismatch"),
    "dS is stored for another swizzle": (
        "backward",
        replaced(r"and\.b32( +\t?%r\d+, %r\d+,) 112;", r"and.b32\1 48;"),
        "mismatch",
    ),
    "too few bytes are expected": ("forward", replaced(r"expect_tx(.*), 32768;", r"expect_tx\1, 16384;"), "bytes|copy"),
    "too many bytes are expected": (
        "forward",
        replaced(r"expect_tx(.*), 32768;", r"expect_tx\1, 32784;"),
        "DeadlockError.*16 bytes to come",
    ),
    "a descriptor has half its stride": ("forward", replaced(DESCRIPTOR, str(0x4000002000000000), 3), "mismatch"),
    "a descriptor of values has half its offset": ("forward", replaced("67108864", "33554432"), "mismatch"),
    "a descriptor begins elsewhere": (
        "forward",
        replaced(DESCRIPTOR, str(0x4000004000000080), 3),
        "mismatch|while a copy is landing",
    ),
    "dS is not fenced": (
        "backward",
        replaced(r"(stmatrix.*\n\s*)fence\.proxy\.async.*", r"\1"),
        "MissingProxyFenceError.*wgmma",
    ),
    "dQ is not fenced": (
        "backward",
        replaced(r"(st\.shared\.v2.*\n\s*)fence\.proxy\.async.*", r"\1"),
        "MissingProxyFenceError.*cp.reduce",
    ),
    "the barriers are not fenced": (
        "forward",
        replaced(r"fence\.proxy\.async.*", ""),
        "MissingProxyFenceError.*cp.async.bulk",
    ),
    "weights are not fenced": (
        "forward",
        replaced(r"(mov\.b32 %r\d+, %r\d+;\s*)wgmma\.fence.*", r"\1"),
        "RegisterRaceError.*elsewhere",
    ),
    "scores are used too early": (
        "forward",
        replaced(r"wgmma\.wait_group\.sync\.aligned( +\t?)1;", r"wgmma.wait_group.sync.aligned\g<1>2;"),
        "RegisterRaceError.*before the wait for the product",
    ),
    "dQ is overwritten while it is copied": (
        "backward",
        replaced(r"cp\.async\.bulk\.wait_group\.read.*", ""),
        "SharedMemoryRaceError.*written while",
    ),
    "the fetching warp waits for the other parity": (
        "forward",
        replaced(r"not\.b32( +\t?)(%r\d+), (%r\d+);", r"mov.b32\1\2, \3;", -1),
        "DeadlockError.*parity 0 of the mbarrier.*: warp 8",
    ),
    "the queries are waited for by the other parity": (
        "forward",
        replaced(r"(try_wait.*complete, \[%r\d+\]), %r\d+;", r"\1, 1;"),
        "SharedMemoryRaceError.*landing",
    ),
    "a barrier counts one arrival for two": (
        "forward",
        replaced(r"(mbarrier\.init.*), 2;", r"\1, 1;"),
        "Error",
    ),
    "rows and columns of a box change places": (
        "forward",
        replaced(r"(cp\.async\.bulk\.tensor.*)\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}", 2),
        "mismatch",
    ),
}


def finding(case: Case, kernels: list[Compiled]) -> str:
    """Return the error of the interpreter or of the comparison, or an empty string if the results are right."""
    try:
        assert_close_to_the_reference(case, run(case, kernels))
    except MachineError as error:
        return f"{type(error).__name__}: {error}"
    except AssertionError as error:
        return f"mismatch: {error}"
    return ""


@full
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug):
    kernels, change, expected = BUGS[bug]
    case = Case(kernels, dim=128)
    *before, last = compiled(case)
    changed = change(last)
    assert changed != last
    error = finding(case, [*before, changed])
    assert re.search(expected, error, re.S), error or "no error"


# the instructions to remove
NEEDED = re.compile(r"^\s*(@\S+\s+)?(mbarrier|fence\.proxy|cp\.async\.bulk\.wait_group).*;$", re.M)


# seeds of the orders of warps and copies to try. Seeds that found faults missed by others are first
SEEDS = list(dict.fromkeys([0, 26, 15, 10, 8, 7, 5, *range(48)]))


def without(kernel: Compiled, place: re.Match) -> Compiled:
    """Return the kernel without one instruction. A wait is replaced by a wait that succeeds immediately."""
    rest = "mov.pred complete, -1;" if "try_wait" in place[0] else ""
    return kernel._replace(ptx=kernel.ptx[: place.start()] + rest + kernel.ptx[place.end() :])


@full
@pytest.mark.parametrize(("case", "program"), [(SEVERAL, 0), (Case("backward"), 0)], ids=["forward", "backward"])
def test_every_barrier_and_fence_is_needed(case, program):
    # this also proves that the interpreter detects such faults
    *before, last = compiled(case)
    good = run(case, [*before, last], programs=[program])
    unnoticed = []
    for place in NEEDED.finditer(last.ptx):
        for seed in SEEDS:
            try:
                got = run(case, [*before, without(last, place)], seed, programs=[program])
            except (MachineError, AssertionError):
                break
            if not all(torch.equal(got[name].nan_to_num(7), good[name].nan_to_num(7)) for name in good):
                break
        else:
            unnoticed.append(place[0].strip())
    assert not unnoticed


def toy(body: str, threads: int = 32) -> torch.Tensor:
    """Run a small kernel. Return the 32 integers that it stores to its only tensor."""
    text = f"""
    .visible .entry toy(.param .u64 .ptr .global .align 1 toy_param_0) .reqntid {threads}
    {{
        .reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<4>;
        ld.param.b64 %rd1, [toy_param_0];
        mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        {body}
        ret;
    }}"""
    out = torch.zeros(32, dtype=torch.int32)
    memory, kernel = GlobalMemory([out]), parse(text)
    loaded = LoadedKernel(kernel, prepare(kernel), {"toy_param_0": memory.address(out)}, memory, 1024)
    Program(loaded, 0, 0).run()
    memory.write_back()
    return out


def test_diverged_lanes_converge_again():
    body = """
        mov.b32 %r2, 1;
        setp.lt.u32 %p1, %r1, 8;
        @%p1 bra few;
        add.s32 %r2, %r2, 10;
        few: add.s32 %r2, %r2, 100;
        shfl.sync.bfly.b32 %r3, %r2, 31, 31, -1;
        st.global.b32 [%rd2], %r3;"""
    assert toy(body).tolist() == [111] * 24 + [101] * 8


def test_blocks_have_registers_and_labels_of_their_own():
    block = "{ .reg .pred done; again: add.s32 %r2, %r2, 1; setp.ge.s32 done, %r2, LIMIT; @!done bra.uni again; }"
    body = f"mov.b32 %r2, 0; {block.replace('LIMIT', '3')} {block.replace('LIMIT', '7')} st.global.b32 [%rd2], %r2;"
    assert (toy(body) == 7).all()


@pytest.mark.parametrize(
    ("body", "error", "sentence"),
    [
        ("brkpt;", UnknownOperationError, "the instruction brkpt"),
        ("cvt.rzi.s32.f32 %r2, %r1;", UnknownOperationError, "cvt.rzi"),
        ("st.global.b32 [%rd2+4], %r1;", OutOfBoundsError, r"line 8 \(st.global.*4 bytes of global memory \+0"),
        ("setp.eq.u32 %p1, %r1, 0; @%p1 bra out; bar.sync 0; out:", MachineError, "only some of a warp's lanes"),
        ("st.shared.b32 [%r1+1025], %r1;", OutOfBoundsError, "not aligned"),
    ],
)
def test_what_is_wrong_is_named(body, error, sentence):
    with pytest.raises(error, match=sentence):
        toy(body)


def test_a_deadlock_names_what_each_warp_waits_for():
    with pytest.raises(
        DeadlockError, match=r"at line 8 \(bar.sync 0, 64\) for barrier 0, where 1 of 2 warps are: warp 1"
    ):
        toy("setp.lt.u32 %p1, %r1, 32; @%p1 bra out; bar.sync 0, 64; out:", threads=64)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_descriptor_reads_what_a_box_has_written(width):
    # a tile of 64 rows, each as wide as the swizzle, read by rows and by columns
    code, start, columns = {32: (1, 3), 64: (2, 2), 128: (3, 1)}[width], SHARED_BASE + 2048, width // 2
    metadata = dict(elem_size=2, elem_type=10, block_size=[64, columns], swizzle=code[0], fp4_padded=False)
    box = TensorMap.encode(0, [64, columns], [columns, 1], metadata).at(start, (0, 0)).shared[:, ::2]

    def places(first: int, leading: int, stride: int, size: int, transposed: bool) -> np.ndarray:
        bits = code[1] << 62 | stride // 16 << 32 | leading // 16 << 16 | first // 16
        return Descriptor.decode(bits).places(size, 0, transposed)

    for depth in range(columns // DEPTH):
        by_rows = places(start + 2 * DEPTH * depth, 0, 8 * width, 64, False)
        assert (by_rows == box[:, DEPTH * depth : DEPTH * (depth + 1)]).all()
    for depth in range(64 // DEPTH):
        by_columns = places(start + DEPTH * depth * width, 0, 8 * width, columns, True)
        assert (by_columns == box[DEPTH * depth : DEPTH * (depth + 1)].T).all()
