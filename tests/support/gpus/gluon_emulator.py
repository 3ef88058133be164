"""Runs Gluon kernels on the CPU, out of order wherever the hardware may, to prove that they wait for everything they
need.

Triton's interpreter does not support Gluon. This module runs the kernels' own Python code with stand-ins for Gluon's
operations. Each warp group is a thread. Only one runs at a time, chosen at random after every synchronizing operation.
Copies by the Tensor Memory Accelerator (TMA) land at a random later moment, and until then their target is NaN.
Asynchronous products read their operands at a random moment before the wait, and their result registers cannot be used
before it. A product or copy must not read shared memory that was written without a fence. Out-of-bounds accesses and
deadlocks raise an error. Layouts are ignored, since the compiler checks them.
"""

from __future__ import annotations

import random
import threading
from types import FunctionType, ModuleType, SimpleNamespace

import torch
import triton
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.interpreter import InterpretedFunction

ACTIVE: list[Machine] = []


def emulate(launch, seed: int) -> list[list[str]]:
    """Run all programs of a launch. Return, for each program, the warp groups that issued products without an
    accumulator input, in the order of issue.
    """
    code = emulated(launch.kernel, {})
    arguments = {name: stand_in(value) for name, value in launch.arguments.items()}
    programs, begun = launch.grid[0], []
    for number in range(programs):
        ACTIVE[:] = [Machine(number, programs, random.Random(f"{seed} {number}"))]
        code(**arguments)
        assert not ACTIVE[0].copies, "the program ended before its copies did"
        begun.append(ACTIVE[0].begun)
    return begun


class Machine:
    """One program: its warp groups and the copies in flight."""

    def __init__(self, number: int, programs: int, chance: random.Random):
        self.number, self.programs, self.chance = number, programs, chance
        self.copies: list[tuple[str | None, object]] = []
        self.shared: list[Shared] = []
        self.groups: list[Group] = []
        self.begun: list[str] = []
        # the probability that a copy lands while a group could run, and which copy lands: the newest, the oldest or any
        self.eagerness, self.lands = chance.choice([0.02, 0.3]), chance.choice([-1, 0, None])

    def run(self, functions, warps, registers) -> None:
        """Run all groups to completion, as `warp_specialize` does."""
        self.groups = [Group(str(i + 1), function, arguments) for i, (function, arguments) in enumerate(functions)]
        # make some groups slow, so that others run far ahead
        for group in self.groups:
            group.speed = self.chance.choice([1, 1, 20])
        while any(not group.ended for group in self.groups):
            able = [group for group in self.groups if not group.ended and group.ready()]
            if not able and not self.copies:
                self.stop()
                raise AssertionError("deadlock: " + ", ".join(group.where for group in self.groups if not group.ended))
            if self.copies and (not able or self.chance.random() < self.eagerness):
                which = self.chance.randrange(len(self.copies)) if self.lands is None else self.lands
                self.copies.pop(which)[1]()
                continue
            (group,) = self.chance.choices(able, [group.speed for group in able])
            group.step()
            if group.error:
                self.stop()
                raise group.error

    def stop(self) -> None:
        for group in self.groups:
            group.stopped = True
            if not group.ended:
                group.step()

    def me(self) -> Group | None:
        return next((group for group in self.groups if group.thread is threading.current_thread()), None)

    def pause(self, ready=lambda: True, where: str = "") -> None:
        """Let another group run. Continue once `ready` returns True."""
        if me := self.me():
            me.pause(ready, where)


class Group:
    """A warp group: a thread that runs one step at a time."""

    def __init__(self, name: str, function, arguments):
        self.name, self.ready, self.where = name, lambda: True, ""
        self.ended = self.stopped = False
        self.speed = 1
        self.error: BaseException | None = None
        # asynchronous products not yet waited for, oldest first
        self.products: list[Product] = []
        # copies out of shared memory, oldest first
        self.stores: list[tuple[str | None, object]] = []
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self.main, args=(function, arguments), daemon=True)
        self.thread.start()

    def main(self, function, arguments) -> None:
        self.go.acquire()
        try:
            function(*arguments)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self.done.release()

    def step(self) -> None:
        self.go.release()
        self.done.acquire()

    def pause(self, ready, where: str) -> None:
        self.ready, self.where = ready, where
        self.done.release()
        self.go.acquire()
        if self.stopped:
            raise Stopped


class Stopped(BaseException):
    pass


class Shared:
    """A piece of shared memory that records which group wrote each element without a fence."""

    def __init__(self, data, writers):
        self.data, self.writers, self.dtype = data, writers, data.dtype

    def index(self, i):
        return Shared(self.data[int(i)], self.writers[int(i)])

    def slice(self, start, length, dim):
        return Shared(self.data.narrow(dim, start, length), self.writers.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(order), self.writers.permute(order))

    def load(self, layout):
        ACTIVE[0].pause()
        return self.data.clone()

    def store(self, value):
        ACTIVE[0].pause()
        self.data.copy_(value)
        self.writers.fill_(int(ACTIVE[0].me().name))

    def read(self):
        """Return the data for a product or a copy. Raise AssertionError if any of it was written without a fence."""
        assert not self.writers.any(), "shared memory is read by another proxy without a fence"
        return self.data


class Barrier:
    """An mbarrier in shared memory, or an indexable array of mbarriers."""

    def __init__(self, size: int):
        self.parts = [self] if size == 1 else [Barrier(1) for _ in range(size)]
        self.count = self.missing = self.bytes = self.phase = 0

    def index(self, i):
        return self.parts[int(i)]

    def settle(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def init(self, count):
        self.count = self.missing = count

    def arrive(self, count=1):
        ACTIVE[0].pause()
        assert self.missing >= count, "more arrivals than the barrier counts"
        self.missing -= count
        self.settle()

    def expect(self, size):
        ACTIVE[0].pause()
        self.bytes += size
        self.missing -= 1
        self.settle()

    def land(self, size):
        self.bytes -= size
        self.settle()

    def wait(self, parity):
        ACTIVE[0].pause(lambda: self.phase % 2 != parity, f"barrier in phase {self.phase}, waited for {parity}")


class Product:
    """An asynchronous product issued by a warp group."""

    def __init__(self, a, b, acc, use_acc):
        self.operands, self.value = (a, b, acc if use_acc else 0), None

    def compute(self):
        if self.value is None:
            a, b, acc = (x.read() if isinstance(x, Shared) else x for x in self.operands)
            if isinstance(acc, Product):
                acc.compute()
                acc = acc.value
            self.value = a.float() @ b.float() + acc


class Pointer:
    """An address in a tensor, or one address per lane."""

    def __init__(self, tensor, place):
        self.tensor, self.place = tensor, place
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, more):
        return Pointer(self.tensor, self.place + more)

    def reach(self, mask):
        """Return (flat memory, offsets, mask). Raise AssertionError if an unmasked offset is outside the tensor."""
        place = torch.as_tensor(self.place)
        mask = torch.as_tensor(True if mask is None else mask).expand(place.shape)
        first = self.tensor.storage_offset()
        last = first + sum((n - 1) * stride for n, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        used = place[mask]
        assert ((used >= first) & (used <= last)).all(), f"access outside of a tensor of {tuple(self.tensor.shape)}"
        return torch.as_strided(self.tensor, (size,), (1,), 0), place, mask


class Descriptor:
    """A matrix in global memory as TMA sees it."""

    def __init__(self, descriptor):
        self.matrix = torch.as_strided(descriptor.base, descriptor.shape, descriptor.strides)
        self.block, self.dtype, self.layout = descriptor.block_shape, descriptor.base.dtype, descriptor.layout

    def part(self, place):
        row, column = (int(x) for x in place)
        assert row >= 0 and column >= 0
        return self.matrix[row : row + self.block[0], column : column + self.block[1]]


def stand_in(value):
    if isinstance(value, torch.Tensor):
        return Pointer(value, value.storage_offset())
    return Descriptor(value) if hasattr(value, "block_shape") else value


def load(pointer, mask=None, other=0.0):
    memory, place, mask = pointer.reach(mask)
    out = torch.full(place.shape, other, dtype=memory.dtype)
    out[mask] = memory[place[mask].long()]
    return out


def store(pointer, value, mask=None):
    memory, place, mask = pointer.reach(mask)
    memory[place[mask].long()] = torch.as_tensor(value).expand(place.shape)[mask].to(memory.dtype)


def allocate(dtype, shape, layout):
    if dtype is torch.int64:
        return Barrier(shape[0])
    data = torch.full(shape, torch.nan, dtype=torch.float32).to(dtype)
    ACTIVE[0].shared.append(Shared(data, torch.zeros(shape, dtype=torch.int8)))
    return ACTIVE[0].shared[-1]


def fence():
    machine = ACTIVE[0]
    machine.pause()
    for piece in machine.shared if machine.me() else ():
        piece.writers[piece.writers == int(machine.me().name)] = 0


def copy_in(source, place, barrier, target):
    ACTIVE[0].pause()
    assert list(target.data.shape) == list(source.block)
    target.data.fill_(torch.nan)

    def land():
        part = source.part(place)
        target.data.zero_()
        target.data[: part.shape[0], : part.shape[1]] = part
        barrier.land(target.data.numel() * target.data.element_size())

    ACTIVE[0].copies.append((None, land))


def add_out(target, place, source):
    machine = ACTIVE[0]
    machine.pause()

    def land():
        part = target.part(place)
        part += source.read()[: part.shape[0], : part.shape[1]]

    machine.copies.append((machine.me().name, land))
    machine.me().stores.append(machine.copies[-1])


def store_wait(count):
    machine, stores = ACTIVE[0], ACTIVE[0].me().stores
    before = stores[: len(stores) - count]
    machine.pause(lambda: not any(copy in machine.copies for copy in before), "copies out of shared memory")


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    assert is_async
    machine = ACTIVE[0]
    machine.pause()
    product = Product(a, b, acc, use_acc)
    machine.me().products.append(product)
    if not use_acc:
        machine.begun.append(machine.me().name)
    if machine.chance.random() < 0.5:
        product.compute()
    return product


def warpgroup_mma_wait(count, deps):
    machine = ACTIVE[0]
    machine.pause()
    products = machine.me().products
    while len(products) > count:
        products.pop(0).compute()
    (wanted,) = deps
    assert wanted not in products, "a product is used before the wait for it"
    return wanted.value


def number(x):
    return torch.as_tensor(x)


LANGUAGE = SimpleNamespace(
    load=load,
    store=store,
    arange=lambda a, b, layout=None: torch.arange(a, b, dtype=torch.int32),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    where=lambda c, a, b: torch.where(number(c), number(a), number(b)),
    maximum=lambda a, b: torch.maximum(number(a), number(b)),
    minimum=lambda a, b: torch.minimum(number(a), number(b)),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    abs=torch.abs,
    cast=lambda x, dtype: torch.as_tensor(x).to(dtype),
    exp2=torch.exp2,
    log2=torch.log2,
    convert_layout=lambda x, layout: x,
    static_range=range,
    program_id=lambda axis: ACTIVE[0].number,
    num_programs=lambda axis: ACTIVE[0].programs,
    allocate_shared_memory=allocate,
    warp_specialize=lambda *arguments: ACTIVE[0].run(*arguments),
    SliceLayout=lambda *arguments: None,
    DotOperandLayout=lambda *arguments: None,
    NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *arguments: None),
    math=SimpleNamespace(exp2=torch.exp2, log2=torch.log2),
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
)
MODULES = {
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.expect(size),
        arrive=lambda barrier, count: barrier.arrive(count),
        wait=lambda barrier, parity: barrier.wait(parity),
    ),
    "tma": SimpleNamespace(store_wait=store_wait),
    "gl": LANGUAGE,
    "tl": LANGUAGE,
}
FUNCTIONS = {
    "fence_async_shared": fence,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "copy_in": copy_in,
    "product_layout": lambda columns: None,
    "add_out": add_out,
}


def emulated(function, cache: dict):
    """Return the Python function of a kernel, or of a function it calls, with its global names replaced by stand-ins."""
    code = function.fn
    if code not in cache:
        names: dict = {}
        cache[code] = FunctionType(code.__code__, names, code.__name__, code.__defaults__)
        for name, value in code.__globals__.items():
            if isinstance(value, ModuleType) and name in MODULES:
                names[name] = MODULES[name]
            elif isinstance(value, GluonJITFunction | InterpretedFunction):
                names[name] = emulated(value, cache)
            elif name in FUNCTIONS:
                names[name] = FUNCTIONS[name]
            else:
                names[name] = value.value if isinstance(value, triton.language.constexpr) else value
    return cache[code]
