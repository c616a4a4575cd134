"""Arithmetic instructions of PTX as C++ statements.

PTX ISA, "Integer Arithmetic", "Floating Point" of f32, "Comparison and Selection", "Logic and Shift",
`mov`, `cvt`, `cvta`, `prmt`. Modifiers that no rule names (`.ftz` of an addition, `.sat` of a product)
are unknown: an error, not another meaning.
"""

from __future__ import annotations

import re

from tests.plugins.ptx.operands import Operands, size_of
from tests.plugins.ptx.parse import Instruction, PtxError
from tests.plugins.ptx.rules import Rules

__all__ = ["RULES"]

RULES = Rules()
INT = r"(?P<t>[us](?:16|32|64))"
BITS = r"(?P<t>b(?:16|32|64))"
_COMPARE = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
}


def unsigned(kind: str) -> str:
    """The unsigned type of the same width, whose arithmetic wraps."""
    return f"u{kind[1:]}"


@RULES.add(rf"(?P<op>add|sub|mul\.lo)\.{INT}")
def _wrapping(i: Instruction, m: re.Match[str], o: Operands) -> str:
    kind = unsigned(m["t"])
    sign = {"add": "+", "sub": "-", "mul.lo": "*"}[m["op"]]
    return o.store(
        i.operands[0],
        m["t"],
        f"(u64){o.value(i.operands[1], kind)} {sign} (u64){o.value(i.operands[2], kind)}",
    )


def _product(i: Instruction, part: str, kind: str, o: Operands) -> str:
    """A product in twice the width, or a half of it."""
    width = 8 * size_of(kind)
    wide = f"{kind[0]}{2 * width}"
    a, b = (f"({wide}){o.value(operand, kind)}" for operand in i.operands[1:3])
    # The wide product of two values never overflows.
    return {"wide": f"{a} * {b}", "hi": f"({a} * {b}) >> {width}", "lo": f"{a} * {b}"}[part]


@RULES.add(rf"mul\.(?P<part>hi)\.{INT}")
def _high(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return o.store(i.operands[0], m["t"], _product(i, "hi", m["t"], o))


@RULES.add(r"mul\.wide\.(?P<t>[us](?:16|32))")
def _wide(i: Instruction, m: re.Match[str], o: Operands) -> str:
    wide = f"{m['t'][0]}{16 * size_of(m['t'])}"
    return o.store(i.operands[0], wide, _product(i, "wide", m["t"], o))


@RULES.add(rf"mad\.(?P<part>lo|hi|wide)\.{INT}")
def _mad(i: Instruction, m: re.Match[str], o: Operands) -> str:
    kind = m["t"]
    out = f"{kind[0]}{16 * size_of(kind)}" if m["part"] == "wide" else kind
    if m["part"] == "lo":
        a, b = (f"(u64){o.value(operand, unsigned(kind))}" for operand in i.operands[1:3])
        product = f"{a} * {b}"
    else:
        product = _product(i, m["part"], kind, o)
    return o.store(
        i.operands[0], out, f"(u64)({product}) + (u64){o.value(i.operands[3], unsigned(out))}"
    )


@RULES.add(rf"(?P<op>div|rem)\.{INT}")
def _divide(i: Instruction, m: re.Match[str], o: Operands) -> str:
    name = {"div": "quotient", "rem": "remainder_of"}[m["op"]]
    a, b = (o.value(operand, m["t"]) for operand in i.operands[1:])
    return o.store(i.operands[0], m["t"], f"{name}<{m['t']}>({a}, {b}, {i.line})")


@RULES.add(rf"(?P<op>min|max)\.{INT}")
def _extreme(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a, b = (o.value(operand, m["t"]) for operand in i.operands[1:])
    sign = "<" if m["op"] == "min" else ">"
    return o.store(i.operands[0], m["t"], f"{a} {sign} {b} ? {a} : {b}")


@RULES.add(r"(?P<op>neg|abs)\.(?P<t>s(?:16|32|64))")
def _signed(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a = o.value(i.operands[1], m["t"])
    negative = f"0 - (u64){a}"
    return o.store(
        i.operands[0], m["t"], negative if m["op"] == "neg" else f"{a} < 0 ? {negative} : (u64){a}"
    )


@RULES.add(r"dp4a\.(?P<a>[us])32\.(?P<b>[us])32")
def _dot(i: Instruction, m: re.Match[str], o: Operands) -> str:
    values = ", ".join(o.value(operand, "u32") for operand in i.operands[1:])
    return o.store(i.operands[0], "u32", f"dot_4<{m['a']}8, {m['b']}8>({values})")


@RULES.add(r"(?P<op>popc|clz|brev)\.b32")
def _count(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a = o.value(i.operands[1], "u32")
    reverse = " | ".join(f"({a} >> {k} & 1) << {31 - k}" for k in range(32))
    form = {"popc": f"__builtin_popcount({a})", "clz": f"{a} ? __builtin_clz({a}) : 32"}
    return o.store(i.operands[0], "u32", form.get(m["op"], reverse))


@RULES.add(r"(?P<op>add|sub|mul)\.(?:rn\.)?f32")
def _float(i: Instruction, m: re.Match[str], o: Operands) -> str:
    sign = {"add": "+", "sub": "-", "mul": "*"}[m["op"]]
    a, b = (o.value(operand, "f32") for operand in i.operands[1:])
    return o.store(i.operands[0], "f32", f"{a} {sign} {b}")


@RULES.add(r"fma\.(?P<r>r[nzmp])\.f32")
def _fma(i: Instruction, m: re.Match[str], o: Operands) -> str:
    values = ", ".join(o.value(operand, "f32") for operand in i.operands[1:])
    exact = (
        f"__builtin_fmaf({values})" if m["r"] == "rn" else f"fma_directed({values}, '{m['r'][1]}')"
    )
    return o.store(i.operands[0], "f32", exact)


@RULES.add(r"(?:div|rcp|sqrt)\.rn\.f32")
def _correct(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a = [o.value(operand, "f32") for operand in i.operands[1:]]
    form = {"div": "{0} / {1}", "rcp": "1.0f / {0}", "sqrt": "__builtin_sqrtf({0})"}
    return o.store(i.operands[0], "f32", form[i.opcode.partition(".")[0]].format(*a))


@RULES.add(r"(?P<op>ex2|lg2|rcp|rsqrt)\.approx(?P<ftz>\.ftz)?\.f32")
def _approximate(i: Instruction, m: re.Match[str], o: Operands) -> str:
    """Correctly rounded, where a GPU may differ in the last bits."""
    a = o.value(i.operands[1], "f32")
    a = f"without_subnormal({a})" if m["ftz"] else a
    form = {"ex2": "__builtin_exp2({})", "lg2": "__builtin_log2({})", "rcp": "1.0 / {}"}
    exact = form.get(m["op"], "1.0 / __builtin_sqrt({})").format(f"(double){a}")
    exact = f"(float)({exact})"
    return o.store(i.operands[0], "f32", f"without_subnormal({exact})" if m["ftz"] else exact)


@RULES.add(r"(?P<op>min|max)\.f32")
def _float_extreme(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a, b = (o.value(operand, "f32") for operand in i.operands[1:])
    return o.store(i.operands[0], "f32", f"{'lesser' if m['op'] == 'min' else 'greater'}({a}, {b})")


@RULES.add(r"(?P<op>neg|abs)\.f32")
def _sign_bit(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a = o.value(i.operands[1], "b32")
    return o.store(
        i.operands[0],
        "b32",
        f"{a} ^ 0x80000000u" if m["op"] == "neg" else f"{a} & 0x7fffffffu",
    )


@RULES.add(r"(?P<op>and|or|xor)\.(?P<t>pred|b(?:16|32|64))")
def _logic(i: Instruction, m: re.Match[str], o: Operands) -> str:
    sign = {"and": "&", "or": "|", "xor": "^"}[m["op"]]
    a, b = (o.value(operand, m["t"]) for operand in i.operands[1:])
    return o.store(i.operands[0], m["t"], f"{a} {sign} {b}")


@RULES.add(r"not\.(?P<t>pred|b(?:16|32|64))")
def _not(i: Instruction, m: re.Match[str], o: Operands) -> str:
    sign = "!" if m["t"] == "pred" else "~"
    return o.store(i.operands[0], m["t"], f"{sign}{o.value(i.operands[1], m['t'])}")


@RULES.add(r"lop3\.b32")
def _lop3(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return o.store(
        i.operands[0], "b32", f"lop3({', '.join(o.value(p, 'u32') for p in i.operands[1:])})"
    )


@RULES.add(r"(?P<op>shl|shr)\.(?P<t>[bus](?:16|32|64))")
def _shift(i: Instruction, m: re.Match[str], o: Operands) -> str:
    name = {"shl": "shifted_left", "shr": "shifted_right"}[m["op"]]
    kind = m["t"].replace("b", "u")
    a, n = o.value(i.operands[1], kind), o.value(i.operands[2], "u32")
    return o.store(i.operands[0], kind, f"{name}<{kind}>({a}, {n})")


@RULES.add(r"shf\.(?P<way>[lr])\.(?P<mode>wrap|clamp)\.b32")
def _funnel(i: Instruction, m: re.Match[str], o: Operands) -> str:
    values = ", ".join(o.value(operand, "u32") for operand in i.operands[1:])
    left, wrap = int(m["way"] == "l"), int(m["mode"] == "wrap")
    return o.store(i.operands[0], "u32", f"funnel({values}, {left}, {wrap})")


@RULES.add(r"bfi\.b(?P<w>32|64)")
def _insert(i: Instruction, m: re.Match[str], o: Operands) -> str:
    kind = f"u{m['w']}"
    fields = [o.value(operand, kind) for operand in i.operands[1:3]]
    place = [o.value(operand, "u32") for operand in i.operands[3:]]
    return o.store(i.operands[0], kind, f"bfi<{kind}>({', '.join([*fields, *place])})")


@RULES.add(r"bfe\.(?P<t>[us](?:32|64))")
def _extract(i: Instruction, m: re.Match[str], o: Operands) -> str:
    values = [o.value(i.operands[1], m["t"]), *(o.value(p, "u32") for p in i.operands[2:])]
    return o.store(i.operands[0], m["t"], f"bfe<{m['t']}>({', '.join(values)})")


@RULES.add(r"prmt\.b32")
def _permute(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return o.store(
        i.operands[0], "b32", f"prmt({', '.join(o.value(p, 'u32') for p in i.operands[1:])})"
    )


@RULES.add(r"setp\.(?P<c>[a-z]+)(?:\.(?P<with>and|or|xor))?\.(?P<t>[bus](?:16|32|64)|f32)")
def _compare(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a, b = (o.value(operand, m["t"]) for operand in i.operands[1:3])
    unordered = f"({a} != {a} || {b} != {b})"
    name, kind = m["c"], m["t"]
    if kind == "f32" and name in ("num", "nan"):
        test = unordered if name == "nan" else f"!{unordered}"
    elif kind == "f32" and name.endswith("u") and name[:-1] in _COMPARE:
        test = f"({unordered} || {a} {_COMPARE[name[:-1]]} {b})"
    elif kind == "f32" and name == "ne":
        test = f"(!{unordered} && {a} != {b})"
    elif name in _COMPARE and (kind[0] in "us" or name not in ("lo", "ls", "hi", "hs")):
        test = f"({a} {_COMPARE[name]} {b})"
    else:
        raise PtxError(f"no rule for {i.opcode}")
    first, _, second = i.operands[0].partition("|")
    sign = {None: None, "and": "&", "or": "|", "xor": "^"}[m["with"]]
    more = f" {sign} {o.value(i.operands[3], 'pred')}" if sign else ""
    text = f"bool test = {test}; " + o.store(first, "pred", f"test{more}")
    return text + (o.store(second, "pred", f"!test{more}") if second else "")


@RULES.add(r"selp\.(?P<t>[bus](?:16|32|64)|f32)")
def _select(i: Instruction, m: re.Match[str], o: Operands) -> str:
    kind = m["t"].replace("f", "b")
    a, b = (o.value(operand, kind) for operand in i.operands[1:3])
    return o.store(i.operands[0], kind, f"{o.value(i.operands[3], 'pred')} ? {a} : {b}")


@RULES.add(r"mov\.(?P<t>[bus](?:16|32|64)|f32|pred)")
def _move(i: Instruction, m: re.Match[str], o: Operands) -> str:
    kind = m["t"].replace("f", "b")
    to, source = (o.elements(operand) for operand in i.operands)
    if len(to) == len(source) == 1:
        return o.store(to[0], kind, o.value(source[0], kind))
    part = f"u{8 * size_of(kind) // max(len(to), len(source))}"
    width = 8 * size_of(part)
    if len(to) == 1:  # The first element is in the lowest bits.
        packed = (f"(u64){o.value(text, part)} << {width * n}" for n, text in enumerate(source))
        return o.store(to[0], kind, " | ".join(packed))
    parts = (o.store(text, part, f"all >> {width * n}") for n, text in enumerate(to))
    return f"u64 all = {o.value(source[0], kind)}; " + " ".join(parts)


@RULES.add(r"cvta\.to\.global\.u64")
def _generic(i: Instruction, m: re.Match[str], o: Operands) -> str:
    """Global addresses are generic addresses; those of shared memory have no rule."""
    return o.store(i.operands[0], "u64", o.value(i.operands[1], "u64"))


@RULES.add(r"cvt\.(?P<to>[us](?:8|16|32|64))\.(?P<from>[us](?:8|16|32|64))")
def _resize(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return o.store(i.operands[0], m["to"], o.value(i.operands[1], m["from"]))


@RULES.add(r"cvt\.rn\.f32\.(?P<from>[us](?:8|16|32|64))")
def _to_float(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return o.store(i.operands[0], "f32", f"(float){o.value(i.operands[1], m['from'])}")


@RULES.add(r"cvt\.r(?P<r>[nzmp])i\.(?P<to>[us](?:8|16|32|64))\.f32")
def _to_integer(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a = o.value(i.operands[1], "f32")
    return o.store(i.operands[0], m["to"], f"integer_of<{m['to']}>({a}, '{m['r']}')")


@RULES.add(r"cvt\.(?:r(?P<r>[nzmp])i(?P<sat>\.sat)?|sat)\.f32\.f32")
def _round(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a = o.value(i.operands[1], "f32")
    a = f"whole({a}, '{m['r']}')" if m["r"] else a
    return o.store(i.operands[0], "f32", f"saturated({a})" if m["sat"] or not m["r"] else a)


@RULES.add(r"cvt\.r(?P<r>[nz])\.f16\.f32")
def _to_half(i: Instruction, m: re.Match[str], o: Operands) -> str:
    a = o.value(i.operands[1], "f32")
    return o.store(i.operands[0], "b16", f"half_of({a}, {int(m['r'] == 'z')})")


@RULES.add(r"cvt\.r(?P<r>[nz])\.f16x2\.f32")
def _to_halves(i: Instruction, m: re.Match[str], o: Operands) -> str:
    """The first source becomes the upper half."""
    upper, lower = (
        f"(u32)half_of({o.value(operand, 'f32')}, {int(m['r'] == 'z')})"
        for operand in i.operands[1:]
    )
    return o.store(i.operands[0], "b32", f"{upper} << 16 | {lower}")


@RULES.add(r"cvt\.f32\.f16")
def _from_half(i: Instruction, m: re.Match[str], o: Operands) -> str:
    return o.store(i.operands[0], "f32", f"float_of_half({o.value(i.operands[1], 'b16')})")
