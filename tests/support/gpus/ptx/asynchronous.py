"""Instructions that synchronize, or that run concurrently with the issuing warp: barriers, fences, copies, matrix
products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .barriers import MBarrier
from .copies import Landing
from .errors import BarrierError, UnknownOperationError
from .lanes import LANES, Mask, Run, reader, write
from .operands import (
    LANE_NUMBERS,
    PAUSE,
    Wait,
    active_lanes,
    addresses_of,
    constant,
    register_numbers,
    same_in_all,
)
from .parse import Address, Instruction, Register
from .tensor_core import ROWS, Descriptor, Product

if TYPE_CHECKING:
    from .machine import Warp

# bytes of shared memory per mbarrier
_BARRIER_BYTES = 8


def named_barrier(instruction: Instruction) -> Run:
    """Compile bar.sync with a barrier number and a thread count. The default count is all threads of the program."""
    number, *count = (constant(operand) for operand in instruction.operands)

    def run(warp: Warp, mask: Mask) -> Wait:
        barrier = warp.program.named[number]
        warps = count[0] // LANES if count else len(warp.program.warps)
        wanted = barrier.arrive(warp.number, warps)
        return Wait(lambda: barrier.passes >= wanted, lambda: str(barrier))

    return run


def proxy_fence(instruction: Instruction) -> Run:
    """Compile fence.proxy.async, after which products and bulk copies may use the warp's earlier writes."""

    def run(warp: Warp, mask: Mask) -> object:
        warp.program.shared.fence(warp.number)
        return PAUSE

    return run


def _on_barriers(instruction: Instruction, place: int, act: Callable[[Warp, MBarrier], None]) -> Run:
    """Compile an action on the mbarrier of each active lane."""
    address = addresses_of(instruction.operands[place])

    def run(warp: Warp, mask: Mask) -> object:
        for at in address(warp)[active_lanes(mask)]:
            act(warp, warp.program.barrier(int(at)))
        return PAUSE

    return run


def init_barrier(instruction: Instruction) -> Run:
    """Compile mbarrier.init with an address and an arrival count."""
    address, count = addresses_of(instruction.operands[0]), constant(instruction.operands[1])

    def run(warp: Warp, mask: Mask) -> None:
        for at in map(int, address(warp)[active_lanes(mask)]):
            if at in warp.program.barriers:
                raise BarrierError(f"{warp.program.barriers[at]} exists already")
            shared = warp.program.shared
            shared.write(np.array([at]), np.zeros((1, _BARRIER_BYTES), np.uint8), warp.number)
            shared.users[at : at + _BARRIER_BYTES] += 1
            warp.program.barriers[at] = MBarrier(at, count)

    return run


def end_barrier(instruction: Instruction) -> Run:
    """Compile mbarrier.inval, which frees the barrier's bytes."""

    def act(warp: Warp, barrier: MBarrier) -> None:
        del warp.program.barriers[barrier.address]
        warp.program.shared.release(np.arange(barrier.address, barrier.address + _BARRIER_BYTES))

    return _on_barriers(instruction, 0, act)


def arrive(instruction: Instruction) -> Run:
    """Compile mbarrier.arrive, with which every active lane arrives."""
    if len(instruction.operands) != 2:
        raise UnknownOperationError("an arrival with a count")
    return _on_barriers(instruction, 1, lambda warp, barrier: barrier.arrive())


def arrive_expecting(instruction: Instruction) -> Run:
    """Compile mbarrier.arrive.expect_tx, with which every active lane adds to the bytes expected, then arrives."""
    size = constant(instruction.operands[2])
    return _on_barriers(instruction, 1, lambda warp, barrier: barrier.arrive(size))


def wait_for_barrier(instruction: Instruction) -> Run:
    """Compile try_wait, which a program repeats until it returns true. The warp continues when the phase is over."""
    target, place, parity_ = instruction.operands
    assert isinstance(target, Register)
    address, parity = addresses_of(place), reader(parity_, "b32")

    def run(warp: Warp, mask: Mask) -> Wait:
        barrier = warp.program.barrier(same_in_all(address(warp), mask))
        wanted = same_in_all(parity(warp), mask)
        write(warp, mask, target, "pred", np.bool_(True))
        return Wait(lambda: barrier.passed(wanted), lambda: f"parity {wanted} of {barrier}")

    return run


def copy_in(instruction: Instruction) -> Run:
    """Compile a copy of a tensor map's box to shared memory. When the copy lands, it counts its bytes on an mbarrier."""
    target, source, signal = instruction.operands
    assert isinstance(source, Address)
    to, map_at, signal_at = addresses_of(target), reader(source.base, "b64"), addresses_of(signal)
    reads = [reader(coordinate, "s32") for coordinate in source.coordinates]

    def run(warp: Warp, mask: Mask) -> object:
        for lane in active_lanes(mask):
            in_lane = lane == LANE_NUMBERS
            column, row = (same_in_all(read(warp), in_lane) for read in reads)
            _start_landing(
                warp,
                same_in_all(to(warp), in_lane),
                same_in_all(map_at(warp), in_lane),
                (column, row),
                same_in_all(signal_at(warp), in_lane),
            )
        return PAUSE

    return run


def _start_landing(warp: Warp, to: int, map_at: int, coordinates: tuple[int, int], signal: int) -> None:
    program = warp.program
    shared, tensor_map, barrier = program.shared, program.map(map_at), program.barrier(signal)
    if program.fenced_barriers:
        shared.refuse_unfenced(signal, _BARRIER_BYTES)
    box = tensor_map.at(to, coordinates)
    shared.expect(box.shared)

    def land() -> None:
        shared.land(box.shared, tensor_map.load(box, program.memory))
        barrier.complete(tensor_map.bytes)

    program.landings.append(Landing(land, f"a copy of {tensor_map.bytes} bytes for {barrier}"))


def add_out(instruction: Instruction) -> Run:
    """Compile the addition of a shared-memory tile to a box of a tensor map. Shared memory is only read when the warp
    waits for the copy.
    """
    target, source = instruction.operands
    assert isinstance(target, Address)
    map_at, start = reader(target.base, "b64"), addresses_of(source)
    reads = [reader(coordinate, "s32") for coordinate in target.coordinates]

    def run(warp: Warp, mask: Mask) -> object:
        shared, memory = warp.program.shared, warp.program.memory
        for lane in active_lanes(mask):
            in_lane = lane == LANE_NUMBERS
            tensor_map = warp.program.map(same_in_all(map_at(warp), in_lane))
            column, row = (same_in_all(read(warp), in_lane) for read in reads)
            box = tensor_map.at(same_in_all(start(warp), in_lane), (column, row))
            shared.take(box.shared)

            def finish(tensor_map: Any = tensor_map, box: Any = box) -> None:
                tensor_map.add(box, shared.bytes[box.shared], memory)
                shared.release(box.shared)

            warp.stores.uncommitted.append(finish)
        return PAUSE

    return run


def copy_words(instruction: Instruction) -> Run:
    """Compile cp.async, which copies a few bytes per lane to shared memory and fills the rest with zeros. The copy
    lands at the wait.
    """
    target, source, size_, count_ = instruction.operands
    to, origin, size, count = addresses_of(target), addresses_of(source), constant(size_), reader(count_, "b32")

    def run(warp: Warp, mask: Mask) -> None:
        lanes = active_lanes(mask)
        shared, memory = warp.program.shared, warp.program.memory
        places = to(warp)[lanes][:, None] + np.arange(size)
        wanted = np.broadcast_to(count(warp), LANES)[lanes] > 0
        data = np.zeros((len(lanes), size), np.uint8)
        data[wanted] = memory.bytes[memory.places(origin(warp)[lanes][wanted], size)]
        shared.expect(places, bulk=False)
        warp.loads.uncommitted.append(lambda: shared.land(places, data, warp.number))

    return run


def commit_copies(instruction: Instruction) -> Run:
    """Compile the end of a group of copies, either bulk copies out of shared memory or cp.async into it."""
    bulk = ".bulk" in instruction.opcode
    return lambda warp, mask: (warp.stores if bulk else warp.loads).commit()


def wait_for_copies(instruction: Instruction) -> Run:
    """Compile a wait until at most as many groups of copies as the operand says are in flight."""
    bulk, allowed = ".bulk" in instruction.opcode, constant(instruction.operands[0])
    return lambda warp, mask: (warp.stores if bulk else warp.loads).wait(allowed)


def product(instruction: Instruction) -> Run:
    """Compile wgmma.mma_async.

    Its operands are results, left, right, whether to accumulate, two signs, and whether each operand in memory is
    transposed.
    """
    results, left, right, adds_, *rest = instruction.operands
    shape, *kinds = instruction.opcode.split(".")[4:]
    in_memory = isinstance(left, Register)
    sign_left, sign_right, *transposed = (constant(operand) for operand in rest)
    if kinds not in (["f32", "bf16", "bf16"], ["f32", "f16", "f16"]) or not shape.startswith("m64n"):
        raise UnknownOperationError(f"the product {instruction.opcode}")
    columns = int(shape[4:].partition("k")[0])
    accumulators = register_numbers(results)
    adds, right_at = reader(adds_, "pred"), reader(right, "b64")
    left_at = reader(left, "b64") if in_memory else None

    def run(warp: Warp, mask: Mask) -> None:
        operand: Any = register_numbers(left)
        if left_at is not None:
            rows = Descriptor.decode(same_in_all(left_at(warp)))
            operand = rows.places(ROWS, ROWS * (warp.number % 4), bool(transposed[0]))
        places = Descriptor.decode(same_in_all(right_at(warp))).places(columns, 0, bool(transposed[-1]))
        add = bool(same_in_all(adds(warp)))
        if not add and not warp.number % 4:
            warp.program.begun.append(warp.number // 4)
        issued = Product(accumulators, operand, places, kinds[1], add, float(sign_left * sign_right))
        warp.products.start(issued, warp.program.shared)

    return run


def product_fence(instruction: Instruction) -> Run:
    """Compile wgmma.fence."""
    return lambda warp, mask: warp.products.fence()


def commit_products(instruction: Instruction) -> Run:
    """Compile wgmma.commit_group."""
    return lambda warp, mask: warp.products.commit()


def wait_for_products(instruction: Instruction) -> Run:
    """Compile wgmma.wait_group."""
    allowed = constant(instruction.operands[0])

    def run(warp: Warp, mask: Mask) -> object:
        warp.products.wait(allowed, warp, warp.program.shared)
        return PAUSE

    return run
