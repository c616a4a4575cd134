"""The cases of fused plugins: norms, GELU and SiLU in front of the codes; values are exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np

from trtq.plugins.fused.attributes import Fusion
from trtq.plugins.fused.launches import FusedCall, FusedPointers, fused_launches
from trtq.plugins.fused.reference import prepared
from trtq.plugins.launch import Launch, Pointers
from trtq.plugins.low_bit import reference
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.plugins.variants import TILES
from trtq.selftest.layers import Array, Case, draw
from trtq.selftest.suite import FORMS, Check, Machine, Operand, compare

__all__ = ["FUSED_CHECKS", "FUSIONS", "draw_fused", "fused_output", "wanted_output"]

_POISON, _SUM_POISON = 0x5A, -9
_SAME = Geometry((3, 3), padding=(1, 1))
FUSIONS = {
    "layer norm": Fusion("layer", affine=True),
    "gated": Fusion("gated", affine=True),
    "heads": Fusion(heads=4, affine=True),
    "rows, SiLU": Fusion(activated=True, affine=True),
    "group norm": Fusion("group", 4, affine=True),
    "group norm, SiLU, shift": Fusion(
        "group", 4, True, affine=True, image_shift=True, shift_first=3
    ),
    "factor": Fusion(affine=True),
    "channels last in": Fusion(x_last=True),
    "channels last out": Fusion("group", 2, affine=True, out_last=True),
    "channels last, layer norm": Fusion("layer", affine=True, x_last=True),
}
_FLOATS = ("layer norm", "group norm, SiLU, shift")
_ROWS = ("layer norm", "gated", "heads", "rows, SiLU")


def _laid_out(values: Array, last: bool) -> Array:
    return np.ascontiguousarray(values.transpose(0, 2, 3, 1) if last else values)


def fused_output(
    machine: Machine, case: Case, fusion: Fusion, operands: Mapping[str, Array], native_4: bool
) -> Array:
    """Run the kernels of a fused layer on a case and return the output in the layout of the call.

    Args:
        machine: the machine.
        case: the layer; its input is replaced by the operand x.
        fusion: what is computed in addition to the layer.
        operands: x, and the inputs `affine`, `image_shift` and `residual` that the fusion has.
        native_4: whether tensor cores multiply nibbles.
    """
    problem = case.problem
    linear = problem.channels_last and problem.width == 1
    layer = LayerSpec(
        problem.channels,
        problem.out_channels,
        problem.steps,
        case.bits,
        4 if native_4 else 8,
        None if linear else problem.geometry,
    )
    x = operands["x"]
    call = FusedCall.of(layer, fusion, x.shape)
    codes = np.full(call.source.code_bytes(native_4=native_4), _POISON, np.uint8)
    memory = {
        "out": Operand(np.full(call.problem.out_shape, np.nan, x.dtype), writable=True),
        "weight": Operand(case.packed),
        "terms": Operand(case.terms),
        "tables": Operand(case.tables),
        "step": Operand(case.step),
        "codes": Operand(codes, writable=True),
        "sums": Operand(np.full(problem.sum_bytes // 4, _SUM_POISON, np.int32), writable=True),
        "statistics": Operand(
            np.full(call.statistics_bytes // 4, np.nan, np.float32), writable=True
        ),
        **{name: Operand(values) for name, values in operands.items()},
    }

    def launches(addresses: Mapping[str, int]) -> Sequence[Launch]:
        further = {name: addresses.get(name, 0) for name in ("affine", "image_shift", "statistics")}
        its = {name: at for name, at in addresses.items() if name not in further}
        width = operands["image_shift"].shape[1] if "image_shift" in operands else 0
        at = FusedPointers(Pointers(**its), **further, shift_width=width)
        return fused_launches(call, at, TILES[0], half=x.dtype == np.float16, native_4=native_4)

    return machine.compute(memory, launches, 3)


def wanted_output(case: Case, fusion: Fusion, operands: Mapping[str, Array]) -> Array:
    """The reference's output, in the layout of the call."""
    problem = case.problem
    linear = problem.channels_last and problem.width == 1
    values = prepared(
        operands["x"],
        fusion,
        operands.get("affine"),
        operands.get("image_shift"),
        channels_first=not linear and not fusion.x_last,
    )
    if linear:
        values = values[:, :, None]
    if linear or fusion.x_last:
        values = values.transpose(0, 3, 1, 2)
    residual = operands.get("residual")
    last = linear or fusion.out_last
    if residual is not None:
        residual = residual.transpose(0, 3, 1, 2) if last else residual
    y = reference.low_bit(
        values, case.integers, case.terms, case.tables, case.step, problem.geometry, residual
    )
    return _laid_out(y.astype(operands["x"].dtype), last)


def draw_fused(
    name: str, form: str, half: bool, channels: int
) -> tuple[Case, Fusion, dict[str, Array]]:
    """A case with its operands; channels do not fill a block, and pixels do not fill a launch.

    Args:
        name: a key of `FUSIONS`.
        form: a key of `trtq.selftest.suite.FORMS`.
        half: whether values are float16 instead of float32.
        channels: number of input channels.
    """
    fusion, linear = FUSIONS[name], name in _ROWS
    bits, activation_bits, _ = FORMS[form]
    case = draw(
        41,
        height=7,
        width=1 if linear else 6,
        channels=channels,
        out=24,
        geometry=None if linear or fusion.x_last or fusion.out_last else _SAME,
        bits=bits,
        activation_bits=activation_bits,
        channels_last=linear,
        half=half,
    )
    rng = np.random.default_rng(5)
    problem = case.problem
    batch, dtype = problem.batch, case.x.dtype
    x = _laid_out(case.x, linear or fusion.x_last)
    if linear:
        x = x[:, :, 0]
    if fusion.norm == "gated":
        x = np.concatenate([x, 3 * rng.standard_normal(x.shape).astype(dtype)], axis=-1)
    if fusion.heads:
        x = x.reshape(batch, -1, fusion.heads, channels // fusion.heads).swapaxes(1, 2)
    operands: dict[str, Array] = {"x": np.ascontiguousarray(x)}
    if fusion.affine:
        affine = rng.standard_normal((4, channels)).astype(np.float32)
        affine[3] = 1e-5
        operands["affine"] = affine
    if fusion.image_shift:
        operands["image_shift"] = rng.standard_normal((batch, channels + 9)).astype(dtype)
    fusion = replace(fusion, residual=form == "w8a8")
    if fusion.residual:
        out = rng.standard_normal((batch, 24, *problem.out_size)).astype(dtype)
        operands["residual"] = _laid_out(out, linear or fusion.out_last)
    return case, fusion, operands


def _fused(machine: Machine, name: str, form: str, half: bool, channels: int) -> None:
    case, fusion, operands = draw_fused(name, form, half, channels)
    actual = fused_output(machine, case, fusion, operands, FORMS[form][2])
    wanted = wanted_output(case, fusion, operands)
    last = case.problem.channels_last or fusion.out_last
    order = (0, 3, 1, 2) if last else (0, 1, 2, 3)
    compare(actual.transpose(order), wanted.transpose(order), case.problem, TILES[0])


def _cases() -> Iterator[Check]:
    for half, form, name in product((True, False), ("w4a8", "w8a8", "native"), FUSIONS):
        if half or name in _FLOATS:
            channels = 40 if form == "w4a8" else 100
            call = partial(_fused, name=name, form=form, half=half, channels=channels)
            case = f"{'half' if half else 'float'}-{form}-{name}"
            yield Check("norms", case, form, TILES[0], call)


FUSED_CHECKS = [*_cases()]
"""All cases that every machine runs."""
