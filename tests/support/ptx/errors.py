"""Errors of a program, each with a name."""


class MachineError(Exception):
    """A program did what the hardware forbids or leaves undefined."""


class UnknownOperationError(MachineError):
    """An instruction, or a variant of one, that the interpreter does not know."""


class DeadlockError(MachineError):
    """No warp can go on and no copy is under way."""


class EndlessLoopError(MachineError):
    """A warp runs far longer than any tile needs."""


class OutOfBoundsError(MachineError):
    """An address outside of every tensor, of shared memory, or not aligned for its access."""


class MissingProxyFenceError(MachineError):
    """The asynchronous proxy touches shared memory that was written without a fence.proxy.async after it."""


class SharedMemoryRaceError(MachineError):
    """Shared memory is read while a copy lands in it, or written while a product or copy may still read it."""


class RegisterRaceError(MachineError):
    """A register of a matrix product is used before the wait for the product, or reaches it without wgmma.fence."""


class BarrierError(MachineError):
    """A barrier is used in a way that its definition does not allow."""


class TensorMapError(MachineError):
    """A tensor map that the driver would refuse to encode."""
