"""Parses the PTX text of one kernel into a list of instructions with numbered registers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


class Register(NamedTuple):
    """A register: its width (pred, b16, b32 or b64) and its number among the registers of that width."""

    width: str
    number: int


class Immediate(NamedTuple):
    """A constant. Floating-point constants are given as bits."""

    bits: int


class Symbol(NamedTuple):
    """The address of a parameter or of shared memory, or a label."""

    name: str


class Special(NamedTuple):
    """A read-only register such as %tid.x."""

    name: str


class Address(NamedTuple):
    """A memory operand: [base + offset], or [tensor map, {coordinates}]."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


class Vector(NamedTuple):
    """A list of operands in braces: {a, b, ...}."""

    parts: tuple[Operand, ...]


Operand: TypeAlias = "Register | Immediate | Symbol | Special | Address | Vector | None"


@dataclass
class Instruction:
    """One instruction. A discarded result (_) is None among its operands. guard: the predicate before the opcode."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    text: str

    def where(self) -> str:
        """Return the line number and the start of the instruction's text, for messages."""
        short = self.text if len(self.text) < 100 else self.text[:97] + "..."
        return f"line {self.line} ({short})"


def registers_of(operands: tuple[Operand, ...]) -> Iterator[Register]:
    """Yield all registers that occur in the operands."""
    waiting = list(operands)
    while waiting:
        operand = waiting.pop()
        if isinstance(operand, Register):
            yield operand
        elif isinstance(operand, Vector):
            waiting += operand.parts
        elif isinstance(operand, Address):
            waiting += [operand.base, *operand.coordinates]


class Parameter(NamedTuple):
    """A parameter of the kernel: its name and size in bytes (128 for a tensor map)."""

    name: str
    size: int


@dataclass
class Kernel:
    """A parsed kernel. labels: the index of the instruction after each label. widths: the number of registers of each
    width.
    """

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction]
    labels: dict[str, int]
    widths: dict[str, int]
    # warps per program
    warps: int


@dataclass
class _Scope:
    """The names declared between two braces."""

    number: int
    registers: dict[str, Register] = field(default_factory=dict)
    # maps a prefix of numbered registers, such as %r, to their width and first number
    prefixes: dict[str, tuple[str, int]] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)


_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
)
# the start of a statement
_BEGIN = re.compile(r"\S")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_STATEMENT = re.compile(r"[^;]*;")
_GUARDED = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_SIZES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4, "s32": 4}


def parse(text: str) -> Kernel:
    """Parse a PTX file that contains one kernel."""
    # remove source lines and comments, but keep line breaks for the line numbers
    text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.M)
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("there is no kernel in this text")
    parameters = [
        Parameter(name, int(size) if size else _SIZES[kind]) for kind, name, size in _PARAMETER.findall(entry[2])
    ]
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    if threads is None:
        raise ValueError("the kernel does not say how many threads it needs (.reqntid)")
    return _Parser(text, entry.end()).kernel(entry[1], parameters, int(threads[1]) // 32)


class _Parser:
    """A parser for the statements between the braces of a kernel's body."""

    def __init__(self, text: str, start: int):
        self.text, self.start = text, start
        self.scopes = [_Scope(0)]
        self.widths = {"pred": 0, "b16": 0, "b32": 0, "b64": 0}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.scope_count = 1

    def kernel(self, name: str, parameters: list[Parameter], warps: int) -> Kernel:
        """Parse the kernel whose body starts at `self.start`."""
        at, line = self.start, self.text.count("\n", 0, self.start) + 1
        while self.scopes:
            begin = _BEGIN.search(self.text, at)
            assert begin
            line += self.text.count("\n", at, begin.start())
            at = self._statement(begin.start(), line)
            line += self.text.count("\n", begin.start(), at)
        return Kernel(name, parameters, self.instructions, self.labels, self.widths, warps)

    def _statement(self, at: int, line: int) -> int:
        """Parse one statement. Return the position after it."""
        if self.text[at] == "{":
            self.scopes.append(_Scope(self.scope_count))
            self.scope_count += 1
            return at + 1
        if self.text[at] == "}":
            self.scopes.pop()
            return at + 1
        if label := _LABEL.match(self.text, at):
            self.scopes[-1].labels.add(label[1])
            self.labels[self._scoped(label[1], len(self.scopes) - 1)] = len(self.instructions)
            return label.end()
        statement = _STATEMENT.match(self.text, at)
        assert statement
        body = " ".join(statement[0][:-1].split())
        if body.startswith(".reg"):
            self._declare(body)
        elif not body.startswith(".pragma"):
            self._instruction(body, line)
        return statement.end()

    def _declare(self, body: str) -> None:
        _, width, name = body.split(maxsplit=2)
        width = width[1:]
        many = re.fullmatch(r"(%\w+?)<(\d+)>", name)
        if many:
            self.scopes[-1].prefixes[many[1]] = width, self.widths[width]
            self.widths[width] += int(many[2])
        else:
            self.scopes[-1].registers[name] = Register(width, self.widths[width])
            self.widths[width] += 1

    def _instruction(self, body: str, line: int) -> None:
        parts = _GUARDED.fullmatch(body)
        assert parts
        negated, guard, opcode, rest = parts.groups()
        operands = tuple(part for text in _split(rest) for part in self._operand(text))
        register = self._register(guard) if guard else None
        self.instructions.append(Instruction(opcode, operands, register, bool(negated), line, body))

    def _operand(self, text: str) -> list[Operand]:
        """Return the operand in a list, or two operands for a|b."""
        if text.startswith("["):
            return [self._address(text[1:-1].strip())]
        if text.startswith("{"):
            return [Vector(tuple(part for each in _split(text[1:-1]) for part in self._operand(each)))]
        if "|" in text:
            return [part for each in text.split("|") for part in self._operand(each)]
        if text == "_":
            return [None]
        if number := _number(text):
            return [number]
        if text.startswith("%") and "." in text:
            return [Special(text)]
        register = self._register(text)
        if register is not None:
            return [register]
        for depth in range(len(self.scopes) - 1, -1, -1):
            if text in self.scopes[depth].labels:
                return [Symbol(self._scoped(text, depth))]
        return [Symbol(text)]

    def _address(self, text: str) -> Address:
        base, *more = _split(text)
        coordinates: tuple[Operand, ...] = ()
        if more:
            (vector,) = self._operand(more[0])
            assert isinstance(vector, Vector)
            coordinates = vector.parts
        base, _, offset = base.partition("+")
        (register,) = self._operand(base.strip())
        assert isinstance(register, Register | Symbol | Immediate)
        return Address(register, int(offset, 0) if offset.strip() else 0, coordinates)

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope.registers:
                return scope.registers[name]
            numbered = re.fullmatch(r"(%[a-z]+)(\d+)", name)
            if numbered and numbered[1] in scope.prefixes:
                width, first = scope.prefixes[numbered[1]]
                return Register(width, first + int(numbered[2]))
        return None

    def _scoped(self, label: str, depth: int) -> str:
        number = self.scopes[depth].number
        return f"{label} of block {number}" if number else label


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append(text[begin:i].strip())
            begin = i + 1
    last = text[begin:].strip()
    return [*parts, last] if last else parts


def _number(text: str) -> Immediate | None:
    if re.fullmatch(r"0f[0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16))
    return Immediate(int(text, 0)) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text) else None
