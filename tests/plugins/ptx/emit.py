"""A kernel in PTX as a C++ source that device.h and runtime.cpp complete."""

from __future__ import annotations

from tests.plugins.ptx import arithmetic, memory
from tests.plugins.ptx.operands import Operands
from tests.plugins.ptx.parse import Instruction, Kernel, PtxError, parse

__all__ = ["translate"]

_RULES = arithmetic.RULES | memory.RULES


def _places(kernel: Kernel) -> tuple[dict[str, int], int, int]:
    """Starts of the variables in shared memory, bytes of those with a size, start of the other."""
    places, end = {}, 0
    for variable in kernel.shared:
        if variable.size is not None:
            places[variable.name] = -(-end // variable.alignment) * variable.alignment
            end = places[variable.name] + variable.size
    start = end
    for variable in kernel.shared:
        if variable.size is None:
            places[variable.name] = start = -(-end // variable.alignment) * variable.alignment
    return places, end, start


def _line(item: Instruction | str, operands: Operands) -> str:
    if isinstance(item, str):
        return f"{item[:-1].replace('$', 'L_')}:;" if item.endswith(":") else item
    text = _RULES.statement(item, operands)
    if not item.guard:
        return f"{{ {text} }}"
    return f"if ({'!' if item.negated else ''}{operands.variable(item.guard)}) {{ {text} }}"


def translate(text: str) -> str:
    """The C++ source of the only kernel of a module.

    Args:
        text: PTX of the module.

    Raises:
        PtxError: the text has something that the runner does not know.
    """
    kernel = parse(text)
    if not kernel.parameters:
        raise PtxError("a kernel without parameters computes nothing")
    places, static, dynamic = _places(kernel)
    operands = Operands(kernel, places)
    sizes = ", ".join(map(str, kernel.parameters.values()))
    return "\n".join(
        [
            '#include "device.h"',
            'extern "C" {',
            f"extern const u32 ptx_parameters[] = {{{sizes}}};",
            f"extern const u32 ptx_parameter_count = {len(kernel.parameters)};",
            f"extern const u32 ptx_max_threads = {kernel.max_threads};",
            f"extern const u32 ptx_static_bytes = {static};",
            f"extern const u32 ptx_dynamic_start = {dynamic};",
            "void ptx_kernel(void **values) {",
            "const Place at = place();",
            *operands.declarations(),
            *(_line(item, operands) for item in kernel.body),
            "}",
            "}",
        ]
    )
