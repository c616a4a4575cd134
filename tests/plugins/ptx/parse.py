"""PTX text as statements: one kernel, its parameters, shared variables and registers.

Covers what NVRTC writes for kernels without function calls: PTX ISA, "Syntax" and "Directives" (`.entry`
with `.param`, `.shared`, `.reg`, `.maxntid`). Anything else is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Instruction", "Kernel", "PtxError", "Shared", "parse", "split"]

_IGNORED = re.compile(
    r"\.(version|target|address_size|loc|file|pragma|section|minnctapersm|global|const)\b"
)
_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_POINTER = r"(?:\s+\.ptr(?:\s+\.(?:global|shared|const|local))?(?:\s+\.align\s+\d+)?)?"
_PARAMETER = re.compile(rf"\.param\s+\.(\w+){_POINTER}\s+(\w+)")
_SHARED = re.compile(r"(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]")
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"(\$?\w+):(?!:)\s*")
_GUARD = re.compile(r"@(!?)(%?\w+)\s+")
_SIZES = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "b32": 4, "f32": 4, "u64": 8, "s64": 8, "b64": 8}


class PtxError(Exception):
    """The text has something that the runner does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        line: line in the text, from 1.
        opcode: name with its modifiers, e.g. `add.rn.f32`.
        operands: operands as written.
        guard: register of the predicate; "": always executed.
        negated: whether the predicate has to be false.
    """

    line: int
    opcode: str
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False


@dataclass(frozen=True)
class Shared:
    """A variable in shared memory; `size` None: the launch gives the size."""

    name: str
    alignment: int
    size: int | None


@dataclass
class Kernel:
    """The kernel of a module.

    Attributes:
        name: name of the entry.
        parameters: sizes of the parameters in bytes, by name.
        max_threads: maximum number of threads of a block.
        shared: variables in shared memory.
        registers: types of the registers, by name.
        body: instructions, names of labels, and the braces of scopes.
    """

    name: str
    parameters: dict[str, int]
    max_threads: int
    shared: list[Shared] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    body: list[Instruction | str] = field(default_factory=list)


def split(text: str) -> tuple[str, ...]:
    """Operands that commas separate outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return tuple(part for part in (*parts, text[start:].strip()) if part)


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Text up to each mark that ends a statement, and the mark: `;`, `{`, `}` or the end."""
    start, depth = 0, 0
    for match in re.finditer(r"[{};]", text):
        mark, piece = match[0], text[start : match.start()]
        # A brace at the start of a statement is a scope, otherwise a vector.
        if mark == "{" and (depth or _LABEL.sub("", f"{piece} ").strip()):
            depth += 1
        elif mark == "}" and depth:
            depth -= 1
        else:
            yield piece, mark
            start = match.end()
    yield text[start:], ""


def _statements(text: str, line: int) -> Iterator[tuple[int, str]]:
    """Statements without semicolons, labels, and braces, each with its line."""
    for piece, mark in _pieces(text):
        rest = piece
        while True:
            space = len(rest) - len(rest.lstrip())
            line += rest.count("\n", 0, space)
            rest = rest[space:]
            label = _LABEL.match(rest)
            if label is None:
                break
            yield line, f"{label[1]}:"
            rest = rest[len(label[0].rstrip()) :]
        if rest:
            yield line, " ".join(rest.split())
        line += rest.count("\n")
        if mark in ("{", "}"):
            yield line, mark


def _declare(kernel: Kernel, statement: str) -> None:
    shared = _SHARED.fullmatch(statement)
    if shared is not None:
        size = int(shared[3]) if shared[3] else None
        kernel.shared.append(Shared(shared[2], int(shared[1]), size))
        return
    registers = _REGISTER.fullmatch(statement)
    if registers is not None:
        for name in split(registers[2]):
            many = re.fullmatch(r"(%?\w+)<(\d+)>", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            kernel.registers |= dict.fromkeys(names, registers[1])
        return
    if not _IGNORED.match(statement):
        raise PtxError(f"no rule for the directive {statement!r}")


def _instruction(line: int, statement: str) -> Instruction:
    guard = _GUARD.match(statement)
    rest = statement[guard.end() :] if guard else statement
    opcode, _, operands = rest.partition(" ")
    return Instruction(
        line, opcode, split(operands), guard[2] if guard else "", bool(guard and guard[1])
    )


def _closing(text: str, start: int) -> int:
    """Place of the brace that closes the one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    raise PtxError("a brace is not closed")


def parse(text: str) -> Kernel:
    """The only kernel of a module.

    Raises:
        PtxError: the text has something that the runner does not know.
    """
    text = re.sub(r"//[^\n]*", "", text.rstrip("\0"))
    entry = _ENTRY.search(text)
    if entry is None or len(re.findall(r"\.(?:entry|func)\b", text)) != 1:
        raise PtxError("a module has to have one kernel and no function")
    parameters = {name: _SIZES[kind] for kind, name in _PARAMETER.findall(entry[2])}
    if len(parameters) != len(split(entry[2])):
        raise PtxError(f"no rule for one of the parameters {' '.join(entry[2].split())!r}")
    limit = re.search(r"\.maxntid\s+([\d, ]+)", entry[3])
    max_threads = 1024
    if limit is not None:
        max_threads = math.prod(int(size) for size in re.findall(r"\d+", limit[1]))
    kernel = Kernel(entry[1], parameters, max_threads)
    end = _closing(text, entry.end())
    for outside in (text[: entry.start()], text[end + 1 :]):
        # Directives outside of the kernel end with a line or a semicolon.
        for statement in re.split(r"[;\n]", outside):
            if statement.strip():
                _declare(kernel, " ".join(statement.split()))
    first = 1 + text.count("\n", 0, entry.end())
    for line, statement in _statements(text[entry.end() : end], first):
        if statement.startswith("."):
            _declare(kernel, statement)
        elif statement in "{}" or statement.endswith(":"):
            kernel.body.append(statement)
        else:
            kernel.body.append(_instruction(line, statement))
    return kernel
