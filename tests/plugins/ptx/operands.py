"""Operands of PTX as C++ expressions, and results as assignments."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.plugins.ptx.parse import Kernel, PtxError, split

__all__ = ["Operands", "size_of"]

_REGISTERS = {"pred": "bool", "b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64"}
_REGISTERS |= {f"{sign}{bits}": f"u{bits}" for sign in "us" for bits in (8, 16, 32, 64)}
_REGISTERS |= {"f32": "u32", "f16": "u16"}
_SPECIAL = {"%tid.x": "at.tid", "%ntid.x": "at.ntid", "%laneid": "(at.tid % 32)"}
_SPECIAL |= {f"%ctaid.{a}": f"at.ctaid[{i}]" for i, a in enumerate("xyz")}
_SPECIAL |= {f"%nctaid.{a}": f"at.nctaid[{i}]" for i, a in enumerate("xyz")}
_SPECIAL |= {"%tid.y": "0u", "%tid.z": "0u", "%ntid.y": "1u", "%ntid.z": "1u"}


def size_of(kind: str) -> int:
    """Bytes of a value of a PTX type."""
    return int(kind[1:]) // 8


def _cxx(kind: str) -> str:
    """C++ type of a PTX type that is not a float; `b` and `f` types are bits."""
    return f"{'s' if kind[0] == 's' else 'u'}{kind[1:]}"


@dataclass(frozen=True)
class Operands:
    """Names that operands may have.

    Attributes:
        kernel: kernel with its registers and parameters.
        places: start of each variable in shared memory, in bytes.
    """

    kernel: Kernel
    places: dict[str, int]

    def variable(self, name: str) -> str:
        """The C++ variable of a register."""
        if name not in self.kernel.registers:
            raise PtxError(f"{name!r} is not a register")
        return f"R{name.replace('%', '_')}"

    def declarations(self) -> list[str]:
        """Definitions of all registers, filled with garbage."""
        return [
            f"{_REGISTERS[kind]} {self.variable(name)} = ({_REGISTERS[kind]})0xa5a5a5a5a5a5a5a5;"
            for name, kind in self.kernel.registers.items()
        ]

    def value(self, text: str, kind: str) -> str:
        """An operand as an expression of the type; `f32` is float, `f16` and `b` types are bits."""
        if kind == "pred":
            constants = {"0": "false", "1": "true", "-1": "true"}
            return constants.get(text) or self.variable(text)
        if kind == "f32":
            return f"f32({self._bits(text, 'b32')})"
        return f"({_cxx(kind)})({self._bits(text, kind)})"

    def _bits(self, text: str, kind: str) -> str:
        if text in self.kernel.registers:
            return self.variable(text)
        if text in _SPECIAL:
            return _SPECIAL[text]
        if text in self.places:
            return f"{self.places[text]}u"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text) and kind[1:] == "32":
            return f"0x{text[2:]}u"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0)
            return f"{number % (1 << 64)}ull"
        raise PtxError(f"no rule for the operand {text!r}")

    def store(self, register: str, kind: str, expression: str) -> str:
        """The assignment of a result of a type to a register; wider registers are extended."""
        if register == "_":
            return ""
        if kind == "pred":
            return f"{self.variable(register)} = {expression};"
        if kind == "f32":
            return f"{self.variable(register)} = result({expression});"
        return f"{self.variable(register)} = ({_cxx(kind)})({expression});"

    def address(self, text: str) -> str:
        """An address in brackets as an expression of 64 bits."""
        match = re.fullmatch(r"\[\s*(.+?)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if match is None:
            raise PtxError(f"{text!r} is not an address")
        base = match[1]
        # Addresses of shared memory have 32 bits and wrap.
        wide = base in self.kernel.registers and self.kernel.registers[base].endswith("64")
        kind = "u64" if wide else "u32"
        return f"({kind})({self.value(base, kind)} + ({kind}){match[2] or 0})"

    def elements(self, text: str) -> tuple[str, ...]:
        """The operands of a vector in braces, or the operand itself."""
        return split(text[1:-1]) if text.startswith("{") else (text,)

    def array(self, operands: tuple[str, ...], kind: str) -> str:
        """Values of operands as an initialiser; `f32` values stay bits."""
        kind = "b32" if kind == "f32" else kind
        return ", ".join(self.value(text, kind) for text in operands)
