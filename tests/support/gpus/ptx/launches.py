"""Binds a launch of the project to its compiled kernel and runs it in the interpreter."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from distattn.kernels.triton.launch import TritonLaunch

from .compile import Compiled
from .copies import TensorMap
from .machine import LoadedKernel, Program, prepare
from .memory import GlobalMemory
from .parse import parse


def interpret(
    launch: TritonLaunch,
    kernel: Compiled,
    programs: Iterable[int] | None = None,
    *,
    seed: int = 0,
    fenced_barriers: bool = True,
) -> list[list[int]]:
    """Run programs of a launch one after another, by default all of them. Results are written to the launch's tensors.

    Return, for each program, its warpgroups in the order in which they issued products without an accumulator input.
    seed: seeds the order in which warps run and copies land. fenced_barriers: see `LoadedKernel`.
    """
    _refuse_other_arguments(launch, kernel)
    parsed = parse(kernel.ptx)
    memory = GlobalMemory(list(_tensors(launch)))
    values = list(_parameters(launch, kernel, memory))
    # these kernels have no scratch memory, so pass null pointers for it
    values += [0] * (len(parsed.parameters) - len(values))
    parameters = {parameter.name: value for parameter, value in zip(parsed.parameters, values, strict=True)}
    loaded = LoadedKernel(parsed, prepare(parsed), parameters, memory, kernel.shared, fenced_barriers)
    programs = range(launch.grid[0]) if programs is None else programs
    begun = []
    for number in programs:
        program = Program(loaded, number, seed, launch.grid[0])
        program.run()
        begun.append(program.begun)
    memory.write_back()
    return begun


def _refuse_other_arguments(launch: TritonLaunch, kernel: Compiled) -> None:
    """Raise ValueError if the kernel was compiled for argument values other than the launch's."""
    for name, wanted in kernel.constants.items():
        if launch.arguments[name] != wanted:
            raise ValueError(f"the kernel was compiled for {name} = {wanted}, not {launch.arguments[name]}")
    for name in kernel.divisible:
        value: Any = launch.arguments[name]
        if (value.data_ptr() if isinstance(value, torch.Tensor) else int(value)) % 16:
            raise ValueError(f"the kernel was compiled for {name} that is a multiple of 16")


def _tensors(launch: TritonLaunch) -> Iterator[torch.Tensor]:
    for value in launch.arguments.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "block_shape"):
            yield value.base


def _parameters(launch: TritonLaunch, kernel: Compiled, memory: GlobalMemory) -> Iterator[int | TensorMap]:
    """Yield the kernel's parameters in the order in which Triton's launcher passes them."""
    maps = iter(kernel.maps)
    for name, kind in kernel.signature.items():
        value: Any = launch.arguments[name]
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            yield TensorMap.encode(memory.address(value.base), value.shape, value.strides, next(maps))
            yield from (*value.shape, *value.strides)
        elif kind.startswith("*"):
            yield memory.address(value)
        else:
            yield struct.unpack("<I", struct.pack("<f", value))[0] if kind == "fp32" else int(value)
