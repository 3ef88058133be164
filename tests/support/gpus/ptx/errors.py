"""Errors that a program can cause, one class per kind."""


class MachineError(Exception):
    """The program did something that the hardware forbids or leaves undefined."""


class UnknownOperationError(MachineError):
    """An instruction or a variant of an instruction that the interpreter does not support."""


class DeadlockError(MachineError):
    """No warp can continue and no copy is in flight."""


class EndlessLoopError(MachineError):
    """A warp ran far longer than any tile needs."""


class OutOfBoundsError(MachineError):
    """An address outside all tensors or outside shared memory, or an address misaligned for its access."""


class MissingProxyFenceError(MachineError):
    """The asynchronous proxy accessed shared memory that was written without a subsequent fence.proxy.async."""


class SharedMemoryRaceError(MachineError):
    """Shared memory was read while a copy was landing in it, or written while a product or copy could still read it."""


class RegisterRaceError(MachineError):
    """A register of a matrix product was used before the wait for the product, or passed to it without wgmma.fence."""


class BarrierError(MachineError):
    """A barrier was used in a way that its definition does not allow."""


class TensorMapError(MachineError):
    """A tensor map that the driver would refuse to encode."""
