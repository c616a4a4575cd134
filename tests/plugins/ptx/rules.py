"""Rules from opcodes to C++ statements."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.plugins.ptx.operands import Operands
from tests.plugins.ptx.parse import Instruction, PtxError

__all__ = ["Rules"]

Rule = Callable[[Instruction, re.Match[str], Operands], str]


class Rules:
    """Patterns of whole opcodes, so that a modifier without a rule is an error."""

    def __init__(self) -> None:
        self._rules: list[tuple[re.Pattern[str], Rule]] = []

    def add(self, pattern: str) -> Callable[[Rule], Rule]:
        """Decorator: the function translates instructions whose opcode is the pattern."""

        def keep(rule: Rule) -> Rule:
            self._rules.append((re.compile(pattern), rule))
            return rule

        return keep

    def __or__(self, other: Rules) -> Rules:
        both = Rules()
        both._rules = [*self._rules, *other._rules]
        return both

    def statement(self, instruction: Instruction, operands: Operands) -> str:
        """The C++ statement of an instruction, without its guard.

        Raises:
            PtxError: no rule knows the instruction or an operand.
        """
        for pattern, rule in self._rules:
            match = pattern.fullmatch(instruction.opcode)
            if match is not None:
                try:
                    return rule(instruction, match, operands)
                except PtxError as err:
                    raise PtxError(f"line {instruction.line}, {instruction.opcode}: {err}") from err
        raise PtxError(f"line {instruction.line}: no rule for the instruction {instruction.opcode}")
