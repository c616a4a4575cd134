"""Memory, control flow and warp-wide instructions of PTX as C++ statements.

PTX ISA, "Data Movement" (`ld`, `st`, `cp.async`, `ldmatrix`, `shfl`), "Parallel Synchronization"
(`bar`, `membar`, `fence`, `vote`, `atom`, `red`), "Control Flow", and `mma.sync` with integer
operands. What they do is in device.h and runtime.cpp; addresses are of one state space (`.global`,
`.shared`, `.param`), never generic.
"""

from __future__ import annotations

import re

from tests.plugins.ptx.operands import Operands, size_of
from tests.plugins.ptx.parse import Instruction, PtxError
from tests.plugins.ptx.rules import Rules

__all__ = ["RULES"]

RULES = Rules()
_TYPE = r"(?P<t>[bus](?:8|16|32|64)|f32)"
_ORDER = r"(?:\.(?:weak|volatile|(?:relaxed|acquire|release)\.(?:cta|gpu|sys)))?"
_CACHE = r"(?:\.(?:nc|ca|cg|cs|lu|cv|wb|wt))*(?:\.L1::\w+)?(?:\.L2::\w+)?"


@RULES.add(r"ret|exit")
def _return(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return "return;"


@RULES.add(r"trap")
def _trap(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return f'fault({i.line}, "trap");'


@RULES.add(r"bra(?:\.uni)?")
def _branch(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return f"goto {i.operands[0].replace('$', 'L_')};"


@RULES.add(rf"ld\.param\.{_TYPE}")
def _parameter(i: Instruction, m: re.Match[str], o: Operands) -> str:
    match = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", i.operands[1])
    names = list(o.kernel.parameters)
    if match is None or match[1] not in names:
        raise PtxError(f"no rule for the parameter {i.operands[1]}")
    kind, offset = m["t"].replace("f", "b"), int(match[2] or 0)
    if offset + size_of(kind) > o.kernel.parameters[match[1]]:
        raise PtxError(f"{i.operands[1]} is beyond the parameter")
    at = f"(const u8 *)values[{names.index(match[1])}] + {offset}"
    return o.store(i.operands[0], kind, f"get<{kind.replace('b', 'u')}>({at})")


@RULES.add(rf"ld{_ORDER}\.(?P<space>global|shared){_CACHE}(?:\.v(?P<n>[24]))?{_CACHE}\.{_TYPE}")
def _load(i: Instruction, m: re.Match[str], o: Operands) -> str:
    kind, to = m["t"].replace("f", "b"), o.elements(i.operands[0])
    if len(to) != int(m["n"] or 1):
        raise PtxError(f"{i.operands[0]} does not have the vector's elements")
    size = size_of(kind)
    cxx = kind.replace("b", "u")
    place = f"{o.address(i.operands[1])}, {size * len(to)}, {i.line}"
    text = f"const u8 *from = {m['space']}_read({place}); "
    # An address register may be among the results.
    return text + " ".join(
        o.store(name, kind, f"get<{cxx}>(from + {size * n})") for n, name in enumerate(to)
    )


@RULES.add(rf"st{_ORDER}\.(?P<space>global|shared){_CACHE}(?:\.v(?P<n>[24]))?{_CACHE}\.{_TYPE}")
def _store(i: Instruction, m: re.Match[str], o: Operands) -> str:
    values = o.elements(i.operands[1])
    if len(values) != int(m["n"] or 1):
        raise PtxError(f"{i.operands[1]} does not have the vector's elements")
    kind, size = f"u{m['t'][1:]}", size_of(m["t"]) * len(values)
    return (
        f"const {kind} values_[] = {{{o.array(values, kind)}}}; "
        f"{m['space']}_write({o.address(i.operands[0])}, values_, {size}, {i.line});"
    )


@RULES.add(r"cp\.async\.(?P<c>ca|cg)\.shared(?:::cta)?\.global(?:\.L2::\d+B)?")
def _copy(i: Instruction, m: re.Match[str], o: Operands) -> str:
    size = int(i.operands[2], 0)
    if size != 16 and (m["c"] == "cg" or size not in (4, 8)):
        raise PtxError(f"a copy of {size} bytes is not allowed")
    given = o.value(i.operands[3], "u32") if len(i.operands) == 4 else str(size)
    to, source = (o.address(operand) for operand in i.operands[:2])
    return f"copy_later({to}, {source}, {size}, {given}, {i.line});"


@RULES.add(r"cp\.async\.commit_group")
def _commit(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return "copies_commit();"


@RULES.add(r"cp\.async\.wait_group")
def _wait(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return f"copies_wait({int(i.operands[0], 0)});"


@RULES.add(r"cp\.async\.wait_all")
def _wait_all(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return "copies_commit(); copies_wait(0);"


@RULES.add(r"(?:bar\.sync|barrier\.sync(?:\.aligned)?|bar\.cta\.sync)")
def _barrier(i: Instruction, m: re.Match[str], o: Operands) -> str:
    if i.operands != ("0",):
        raise PtxError("only barrier 0 with all threads of the block is known")
    return f"barrier({i.line});"


@RULES.add(r"bar\.warp\.sync")
def _warp_barrier(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return _together(i, "SYNC", "0", o.value(i.operands[0], "b32"))


@RULES.add(r"membar\.(?:cta|gl|sys)|fence(?:\.\w+)*")
def _fence(i: Instruction, m: re.Match[str], o: Operands) -> str:
    """Nothing: stores are visible at once, and races are found without an order of fences."""
    return ";"


def _together(i: Instruction, operation: str, kind: str, values: str) -> str:
    return (
        f"const u32 in[] = {{{values}}}; "
        f"const u32 *out = together({operation}, {kind}, in, sizeof in / 4, {i.line});"
    )


@RULES.add(
    r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<n>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16"
)
def _matrices(i: Instruction, m: re.Match[str], o: Operands) -> str:
    to = o.elements(i.operands[0])
    if len(to) != int(m["n"]):
        raise PtxError(f"{i.operands[0]} does not have a register for each matrix")
    kind = f"{m['n']} | {int(bool(m['trans']))} << 8"
    stores = " ".join(o.store(name, "b32", f"out[{n}]") for n, name in enumerate(to))
    return f"{_together(i, 'LDMATRIX', kind, o.address(i.operands[1]))} {stores}"


_MMA = (
    r"mma\.sync\.aligned\.m(?P<m>8|16)n8k(?P<k>16|32|64)\.row\.col(?P<sat>\.satfinite)?"
    r"\.s32\.(?P<a>[us])(?P<bits>[48])\.(?P<b>[us])(?P=bits)\.s32"
)


@RULES.add(_MMA)
def _mma(i: Instruction, m: re.Match[str], o: Operands) -> str:
    rows, k, bits = int(m["m"]), int(m["k"]), int(m["bits"])
    shapes = {(8, 16, 8), (8, 32, 4), (16, 16, 8), (16, 32, 8), (16, 32, 4), (16, 64, 4)}
    if (rows, k, bits) not in shapes:
        raise PtxError("no such shape")
    d, a, b, c = (o.elements(operand) for operand in i.operands)
    registers = k * bits // 128
    if (len(a), len(b), len(c), len(d)) != (
        registers * rows // 8,
        registers,
        rows // 4,
        rows // 4,
    ):
        raise PtxError("another number of registers than the shape's")
    signs = f"{int(m['a'] == 's')}, {int(m['b'] == 's')}, {int(bool(m['sat']))}"
    kind = f"mma_kind({rows}, {k}, {bits}, {signs})"
    stores = " ".join(o.store(name, "b32", f"out[{n}]") for n, name in enumerate(d))
    return f"{_together(i, 'MMA', kind, o.array((*a, *b, *c), 'b32'))} {stores}"


@RULES.add(r"shfl\.sync\.(?P<way>up|down|bfly|idx)\.b32")
def _shuffle(i: Instruction, m: re.Match[str], o: Operands) -> str:
    to, _, inside = i.operands[0].partition("|")
    values = o.array((i.operands[4], *i.operands[1:4]), "b32")
    text = _together(i, "SHFL", f"'{m['way'][0]}'", values) + o.store(to, "b32", "out[0]")
    return text + (o.store(inside, "pred", "out[1]") if inside else "")


@RULES.add(r"vote\.sync\.(?P<what>all|any|ballot)\.(?P<t>pred|b32)")
def _vote(i: Instruction, m: re.Match[str], o: Operands) -> str:
    form = {"all": "out[0] == ~0u", "any": "out[0] != 0", "ballot": "out[0]"}[m["what"]]
    values = f"{o.value(i.operands[2], 'b32')}, {o.value(i.operands[1], 'pred')}"
    return _together(i, "VOTE", "0", values) + o.store(i.operands[0], m["t"], form)


_ATOMIC = r"(?:\.(?:relaxed|acq_rel|acquire|release))?(?:\.(?:cta|gpu|sys))?\.global"


@RULES.add(
    rf"(?P<form>atom|red){_ATOMIC}\.(?P<op>add|min|max|and|or|xor|exch)\.(?P<t>[bus](?:32|64))"
)
def _atomic(i: Instruction, m: re.Match[str], o: Operands) -> str:
    kind = f"u{m['t'][1:]}"
    name = m["op"].upper()
    name = f"S{name}" if m["t"][0] == "s" and name in ("MIN", "MAX") else name
    place, value = i.operands[-2:]
    call = f"atomic({name}, {o.address(place)}, {o.value(value, kind)}, {size_of(kind)}, {i.line})"
    return f"{call};" if m["form"] == "red" else o.store(i.operands[0], kind, call)
