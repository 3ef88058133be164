"""One program: its warps, their divergence, and a scheduler that lets warps run as far apart as their barriers allow.

A warp runs until it waits or synchronizes. A seeded random choice then decides which warp runs next and which copy
lands. Some warps are much faster than others.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .barriers import MBarrier, NamedBarrier
from .copies import CopyQueue, Landing, TensorMap
from .errors import (
    BarrierError,
    DeadlockError,
    EndlessLoopError,
    MachineError,
    OutOfBoundsError,
    SharedMemoryRaceError,
    UnknownOperationError,
)
from .lanes import DTYPES, LANES, Mask, Run, arithmetic, reader
from .memory import SHARED_BASE, GlobalMemory, SharedMemory
from .operands import EXIT, PAUSE, Wait, same_in_all
from .operations import operation
from .parse import Address, Instruction, Kernel, Operand, Symbol, registers_of
from .tensor_core import ProductQueue

# the most instructions that a warp may execute: far more than any tile needs
_MOST_INSTRUCTIONS = 2_000_000
# base addresses of parameters, in the parameter space and in the generic space
_PARAMETERS, _GENERIC_PARAMETERS = 0x100, 1 << 44
_SHARED_SYMBOL = "global_smem"
_VIEWS = {"pred": ("pred",), "b16": ("u16", "s16"), "b32": ("u32", "s32", "f32"), "b64": ("u64", "s64")}
_LANE = np.arange(LANES)


class Step(NamedTuple):
    """An instruction prepared to run."""

    instruction: Instruction
    run: Run | None
    # for a branch, the index of its target step, otherwise None
    target: int | None
    # the 32-bit registers that the instruction names, and those it writes
    uses: frozenset[int]
    writes: frozenset[int]
    # True if all lanes must take part
    collective: bool
    # True for a matrix product, whose queue checks its registers
    product: bool


def prepare(kernel: Kernel) -> list[Step]:
    """Prepare all instructions of a kernel. Raise UnknownOperationError if an instruction is not supported."""
    return [_step(kernel, instruction) for instruction in kernel.instructions]


def _step(kernel: Kernel, instruction: Instruction) -> Step:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in ("bra", "bra.uni"):
        (label,) = operands
        assert isinstance(label, Symbol)
        return Step(instruction, None, kernel.labels[label.name], frozenset(), frozenset(), False, False)
    if opcode == "brx.idx":
        return Step(instruction, _indexed_branch(kernel, instruction), None, _words(operands), frozenset(), True, False)
    # an instruction whose first operand is an address is a store, which writes no register
    results = () if operands and isinstance(operands[0], Address) else operands[:1]
    uses, writes = _words(operands), _words(results)
    collective = ".aligned" in opcode or opcode.startswith(("bar", "shfl", "elect", "ret"))
    try:
        run = arithmetic(instruction) or operation(instruction)
    except MachineError as error:
        raise _located(error, instruction.where()) from error
    return Step(instruction, run, None, uses, writes, collective, opcode.startswith("wgmma.mma_async"))


def _indexed_branch(kernel: Kernel, instruction: Instruction) -> Run:
    """Compile brx.idx, which branches to the label at an index in a list."""
    number, table = instruction.operands
    assert isinstance(table, Symbol)
    labels = kernel.instructions[kernel.labels[table.name]].operands
    targets = [kernel.labels[label.name] for label in labels if isinstance(label, Symbol)]
    read = reader(number, "u32")

    def run(warp: Warp, mask: Mask) -> None:
        which = same_in_all(read(warp))
        if which >= len(targets):
            raise MachineError(f"number {which} of {len(targets)} labels")
        # the scheduler adds 1 to `at` after each instruction
        warp.at = targets[which] - 1

    return run


def _words(operands: tuple[Operand, ...]) -> frozenset[int]:
    """Return the numbers of the 32-bit registers among the operands."""
    return frozenset(register.number for register in registers_of(operands) if register.width == "b32")


class Warp:
    """A warp of 32 lanes: their registers, their positions, and what they wait for."""

    def __init__(self, program: Program, number: int, widths: dict[str, int]):
        self.program, self.number = program, number
        # initialize registers to NaN
        files = {width: np.full((count, LANES), ~DTYPES[width](0)) for width, count in widths.items()}
        self.registers: dict[str, np.ndarray] = {
            kind: files[width].view(DTYPES[kind]) for width, kinds in _VIEWS.items() for kind in kinds
        }
        self.registers |= {width: files[width] for width in ("b16", "b32", "b64")}
        self.at = 0
        # the lanes at step `at` (None means all lanes), and the other lanes with their steps
        self.active: Mask = None
        self.elsewhere: list[tuple[int, np.ndarray]] = []
        self.wait: Wait | None = None
        self.ended = False
        self.speed = 1
        self.steps = 0
        self.products = ProductQueue()
        # bulk copies out of shared memory, and cp.async into it
        self.stores, self.loads = CopyQueue(), CopyQueue()

    def special(self, name: str) -> np.ndarray:
        """Return the value of a special register."""
        values = {
            "%tid.x": _LANE + LANES * self.number,
            "%ctaid.x": np.full(LANES, self.program.number),
            "%nctaid.x": np.full(LANES, self.program.programs),
        }
        if name not in values:
            raise UnknownOperationError(f"the special register {name}")
        return values[name]

    def ready(self) -> bool:
        """Return whether the warp can continue."""
        return not self.ended and (self.wait is None or self.wait.ready())

    def branch(self, taken: np.ndarray, target: int) -> None:
        """Move the `taken` lanes to `target` and the other active lanes to the next step."""
        stay = ~taken if self.active is None else self.active & ~taken
        if not stay.any():
            self.at = target
        elif not taken.any():
            self.at += 1
        else:
            self.elsewhere += [(target, taken), (self.at + 1, stay)]
            self._pick()

    def converge(self) -> None:
        """Move the active lanes to `elsewhere`, and continue with the lanes that are furthest behind."""
        assert self.active is not None
        self.elsewhere.append((self.at, self.active))
        self._pick()

    def _pick(self) -> None:
        self.at = min(at for at, _ in self.elsewhere)
        together = np.logical_or.reduce([lanes for at, lanes in self.elsewhere if at == self.at])
        self.elsewhere = [(at, lanes) for at, lanes in self.elsewhere if at != self.at]
        self.active = together if self.elsewhere else None


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel prepared to run on the tensors of a launch. parameters: integers (a float's bits) or tensor maps, keyed
    by name.
    """

    kernel: Kernel
    steps: list[Step]
    parameters: dict[str, int | TensorMap]
    memory: GlobalMemory
    # shared memory per program, in bytes
    shared_size: int
    # True if a fence must make an mbarrier visible to the asynchronous proxy before a bulk copy counts bytes on it
    fenced_barriers: bool = True


class Program:
    """One program of a launch."""

    def __init__(self, loaded: LoadedKernel, number: int, seed: int, programs: int = 1):
        kernel, parameters = loaded.kernel, loaded.parameters
        self.steps, self.memory, self.parameters = loaded.steps, loaded.memory, parameters
        self.number, self.programs, self.fenced_barriers = number, programs, loaded.fenced_barriers
        self.shared = SharedMemory(loaded.shared_size)
        self.barriers: dict[int, MBarrier] = {}
        self.named = {i: NamedBarrier(i) for i in range(16)}
        # bulk copies into shared memory that have not landed yet
        self.landings: list[Landing] = []
        # warpgroups in the order in which their first warps issued products without an accumulator input
        self.begun: list[int] = []
        self.addresses = {name: _PARAMETERS + 256 * i for i, name in enumerate(parameters)}
        self.maps = {
            self.addresses[name] + _GENERIC_PARAMETERS: value
            for name, value in parameters.items()
            if isinstance(value, TensorMap)
        }
        self.warps = [Warp(self, i, kernel.widths) for i in range(kernel.warps)]
        self.chance = random.Random(f"{seed} {number}")
        # the probability that a copy lands while a warp could run, and which copy lands: the newest, the oldest or any
        self.eagerness, self.lands = self.chance.choice([0.0, 0.02, 0.3]), self.chance.choice([-1, 0, None])
        # the lane that elect.sync picks: an arbitrary lane, but always the same lane
        self.leader = self.chance.randrange(LANES)
        # sometimes entire warpgroups run far apart, sometimes single warps
        size = self.chance.choice([1, 4])
        for first in range(0, kernel.warps, size):
            speed = self.chance.choice([1, 1, 20])
            for warp in self.warps[first : first + size]:
                warp.speed = speed

    def address_of(self, name: str) -> int:
        """Return the address of shared memory or of a parameter."""
        return SHARED_BASE if name == _SHARED_SYMBOL else self.addresses[name]

    def generic_address(self, address: np.ndarray) -> np.ndarray:
        """Convert a parameter's address to a generic address."""
        return address + np.uint64(_GENERIC_PARAMETERS)

    def map(self, address: int) -> TensorMap:
        """Return the tensor map at a generic address."""
        if address not in self.maps:
            raise OutOfBoundsError("there is no tensor map at this address")
        return self.maps[address]

    def barrier(self, address: int) -> MBarrier:
        """Return the mbarrier at an address in shared memory."""
        if address not in self.barriers:
            raise BarrierError(f"there is no mbarrier at byte {address - SHARED_BASE} of shared memory")
        return self.barriers[address]

    def run(self) -> None:
        """Run all warps to completion."""
        with np.errstate(all="ignore"):
            while not all(warp.ended for warp in self.warps):
                able = [warp for warp in self.warps if warp.ready()]
                if self.landings and (not able or self.chance.random() < self.eagerness):
                    which = self.chance.randrange(len(self.landings)) if self.lands is None else self.lands
                    self.landings.pop(which).land()
                elif able:
                    (warp,) = self.chance.choices(able, [warp.speed for warp in able])
                    self._advance(warp)
                else:
                    raise DeadlockError("no warp can go on, all wait: " + "; ".join(self._waiting()))
            self._finish()

    def _waiting(self) -> list[str]:
        """Describe which warps wait, where, and for what."""
        warps: dict[str, list[str]] = {}
        for warp in self.warps:
            if warp.wait is not None and not warp.ended:
                instruction = self.steps[warp.at - 1].instruction
                warps.setdefault(f"{instruction.where()} for {warp.wait.describe()}", []).append(str(warp.number))
        return [f"at {place}: warp {', '.join(numbers)}" for place, numbers in warps.items()]

    def _finish(self) -> None:
        """Raise SharedMemoryRaceError if the ended program has not waited for all of its products and copies."""
        for warp in self.warps:
            if warp.products.groups or warp.products.uncommitted:
                raise SharedMemoryRaceError(f"warp {warp.number} ended with products that it never waited for")
            if warp.stores.busy() or warp.loads.busy():
                raise SharedMemoryRaceError(f"warp {warp.number} ended with copies that it never waited for")
        if self.landings:
            raise SharedMemoryRaceError(f"the program ended before {self.landings[0].text} had landed")
        for barrier in self.barriers.values():
            if barrier.bytes:
                raise BarrierError(f"the program ended while {barrier} counts bytes that do not balance")

    def _advance(self, warp: Warp) -> None:
        """Run a warp until it synchronizes."""
        warp.wait = None
        outcome: Any = None
        while outcome is None:
            step = self._next(warp)
            try:
                outcome = self._execute(warp, step)
            except MachineError as error:
                raise _located(error, f"warp {warp.number}, {step.instruction.where()}") from error
        if outcome is EXIT:
            warp.ended = True
        elif outcome is not PAUSE:
            warp.wait = outcome

    def _next(self, warp: Warp) -> Step:
        if warp.elsewhere:
            warp.converge()
        return self.steps[warp.at]

    def _execute(self, warp: Warp, step: Step) -> Any:
        """Run one instruction. Return its outcome, such as a wait, or None."""
        warp.steps += 1
        if warp.steps > _MOST_INSTRUCTIONS:
            raise EndlessLoopError(f"{_MOST_INSTRUCTIONS:,} instructions and no end")
        mask = warp.active
        guard = step.instruction.guard
        if guard is not None:
            mask = warp.registers["pred"][guard.number] ^ step.instruction.negated
            mask = mask if warp.active is None else mask & warp.active
        if step.target is not None:
            warp.branch(np.ones(LANES, bool) if mask is None else mask, step.target)
            return None
        assert step.run is not None
        outcome = None
        if mask is None or mask.all():
            outcome = self._run(warp, step, None)
        elif mask.any():
            outcome = self._run(warp, step, mask)
        warp.at += 1
        return outcome

    def _run(self, warp: Warp, step: Step, mask: Mask) -> Any:
        if mask is not None and step.collective:
            raise MachineError("only some of a warp's lanes are here, and all of them must be")
        if not step.product:
            warp.products.pass_by(step.uses, step.writes)
        assert step.run is not None
        return step.run(warp, mask)


def _located(error: MachineError, where: str) -> MachineError:
    return type(error)(f"{where}: {error}")
