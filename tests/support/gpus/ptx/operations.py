"""All non-arithmetic instructions by name. Memory accesses and moves between lanes are compiled here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import asynchronous
from .errors import UnknownOperationError
from .lanes import DTYPES, LANES, Mask, Run, reader, write
from .operands import EXIT, LANE_NUMBERS, active_lanes, addresses_of, constant, parts_of, register_numbers
from .parse import Address, Instruction, Register, Symbol

if TYPE_CHECKING:
    from .machine import Warp


def operation(instruction: Instruction) -> Run:
    """Compile an instruction that is not arithmetic."""
    # a cluster has one program, so both names of shared memory mean the program's own
    opcode = instruction.opcode.replace("::cta", "").replace("::cluster", "")
    for name, build in _BUILDERS.items():
        if opcode == name or (name.endswith(".") and opcode.startswith(name)):
            return build(instruction)
    raise UnknownOperationError(f"the instruction {opcode}")


def _nothing(instruction: Instruction) -> Run:
    return lambda warp, mask: None


def _exit(instruction: Instruction) -> Run:
    return lambda warp, mask: EXIT


def _generic_parameter(instruction: Instruction) -> Run:
    target, source = instruction.operands
    assert isinstance(target, Register)
    read = reader(source, "b64")
    return lambda warp, mask: write(warp, mask, target, "b64", warp.program.generic_address(read(warp)))


def _load_parameter(instruction: Instruction) -> Run:
    target, source = instruction.operands
    assert isinstance(target, Register) and isinstance(source, Address) and isinstance(source.base, Symbol)
    name, dtype = source.base.name, np.dtype(DTYPES[target.width])
    bits = (1 << 8 * dtype.itemsize) - 1

    def run(warp: Warp, mask: Mask) -> None:
        value = warp.program.parameters[name]
        assert isinstance(value, int)
        write(warp, mask, target, target.width, np.array(value & bits, dtype))

    return run


def _element(opcode: str) -> np.dtype:
    """Return the dtype of one element moved by a load or store."""
    kind = opcode.rpartition(".")[2]
    if kind[0] not in "bus" or kind[1:] not in ("8", "16", "32", "64"):
        raise UnknownOperationError(f"the instruction {opcode}")
    # a signed number is sign-extended in its register
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")


def _load(instruction: Instruction) -> Run:
    target, source = instruction.operands
    registers, address, element = parts_of(target), addresses_of(source), _element(instruction.opcode)
    size, shared = element.itemsize * len(registers), ".shared" in instruction.opcode

    def run(warp: Warp, mask: Mask) -> None:
        lanes = active_lanes(mask)
        program, addresses = warp.program, address(warp)[lanes]
        memory = program.memory
        data = program.shared.read(addresses, size) if shared else memory.bytes[memory.places(addresses, size)]
        for i, values in enumerate(np.ascontiguousarray(data).view(element).T):
            register = registers[i]
            assert isinstance(register, Register)
            warp.registers[register.width][register.number, lanes] = values

    return run


def _store(instruction: Instruction) -> Run:
    target, source = instruction.operands
    address, element = addresses_of(target), _element(instruction.opcode)
    reads = [reader(part, f"b{8 * element.itemsize}") for part in parts_of(source)]
    shared = ".shared" in instruction.opcode

    def run(warp: Warp, mask: Mask) -> None:
        lanes = active_lanes(mask)
        program, addresses = warp.program, address(warp)[lanes]
        data = np.stack([np.broadcast_to(read(warp), LANES)[lanes] for read in reads], 1).view(np.uint8)
        if shared:
            program.shared.write(addresses, data, warp.number)
        else:
            program.memory.bytes[program.memory.places(addresses, data.shape[1])] = data

    return run


def _store_matrices(instruction: Instruction) -> Run:
    """Compile stmatrix, which stores four 8 x 8 matrices. Lane 8 i + r holds the address of row r of matrix i."""
    target, source = instruction.operands
    address, registers = addresses_of(target), list(register_numbers(source))

    def run(warp: Warp, mask: Mask) -> None:
        rows = warp.registers["b32"][registers].reshape(LANES, 4)
        warp.program.shared.write(address(warp), rows.view(np.uint8), warp.number)

    return run


def _shuffle(instruction: Instruction) -> Run:
    """Compile a shuffle. Each lane reads from lane `which` (idx), or from the lane whose number differs in the bits of
    `which` (bfly).
    """
    target, source, which, clamp, members = instruction.operands
    if (constant(clamp), constant(members)) != (31, -1):
        raise UnknownOperationError("a shuffle in parts of a warp")
    assert isinstance(target, Register)
    read, lane = reader(source, "b32"), constant(which)
    origin = LANE_NUMBERS ^ lane if ".bfly" in instruction.opcode else np.full(LANES, lane)
    return lambda warp, mask: write(warp, mask, target, "b32", np.broadcast_to(read(warp), LANES)[origin])


def _elect(instruction: Instruction) -> Run:
    number, chosen, _ = instruction.operands
    assert isinstance(number, Register) and isinstance(chosen, Register)

    def run(warp: Warp, mask: Mask) -> None:
        leader = warp.program.leader
        write(warp, mask, number, "b32", np.uint32(leader))
        write(warp, mask, chosen, "pred", leader == LANE_NUMBERS)

    return run


# keyed by opcode, or by its prefix if the key ends in a dot
_BUILDERS: dict[str, Callable[[Instruction], Run]] = {
    "ret": _exit,
    # a list of labels for brx.idx
    ".branchtargets": _nothing,
    "setmaxnreg.": _nothing,
    "cvta.param.u64": _generic_parameter,
    "ld.param.": _load_parameter,
    "ld.global.": _load,
    "ld.shared.": _load,
    "st.global.": _store,
    "st.shared.": _store,
    "stmatrix.sync.aligned.m8n8.x4.shared.b16": _store_matrices,
    "shfl.sync.bfly.b32": _shuffle,
    "shfl.sync.idx.b32": _shuffle,
    "elect.sync": _elect,
    # the lanes of a warp run in lock step
    "bar.warp.sync": _nothing,
    "bar.sync": asynchronous.named_barrier,
    "barrier.sync": asynchronous.named_barrier,
    "fence.proxy.async.shared": asynchronous.proxy_fence,
    "mbarrier.init.shared.b64": asynchronous.init_barrier,
    "mbarrier.inval.shared.b64": asynchronous.end_barrier,
    "mbarrier.arrive.shared.b64": asynchronous.arrive,
    "mbarrier.arrive.expect_tx.shared.b64": asynchronous.arrive_expecting,
    "mbarrier.try_wait.parity.shared.b64": asynchronous.wait_for_barrier,
    "cp.async.bulk.tensor.2d.shared.global.mbarrier::complete_tx::bytes": asynchronous.copy_in,
    "cp.reduce.async.bulk.tensor.2d.global.shared.add.bulk_group": asynchronous.add_out,
    "cp.async.bulk.commit_group": asynchronous.commit_copies,
    "cp.async.bulk.wait_group.read": asynchronous.wait_for_copies,
    "cp.async.ca.shared.global": asynchronous.copy_words,
    "cp.async.commit_group": asynchronous.commit_copies,
    "cp.async.wait_group": asynchronous.wait_for_copies,
    "wgmma.mma_async.": asynchronous.product,
    "wgmma.fence.sync.aligned": asynchronous.product_fence,
    "wgmma.commit_group.sync.aligned": asynchronous.commit_products,
    "wgmma.wait_group.sync.aligned": asynchronous.wait_for_products,
}
