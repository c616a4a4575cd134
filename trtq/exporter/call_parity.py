"""Comparison of exported graphs with torch inside the pipeline's own call, at every denoiser call."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trtq.calls.copies import copied_containers
from trtq.calls.form import result_tensors
from trtq.calls.processors import attention_processors, with_processors
from trtq.calls.user_call import UserCall, run_call
from trtq.calls.variations import VariedForm
from trtq.errors import GateError, NonFiniteError
from trtq.exporter.last_bits import LAST_BIT, last_bit_moved
from trtq.exporter.parity import (
    FLOOR_MARGIN_DB,
    MAX_TIES_PER_STEP,
    TIE_DB,
    StepParity,
    compare,
)
from trtq.snr import EXACT_DB, snr_db

__all__ = ["CHANGES", "call_parities", "form_parity", "named_parities", "tensor_parity"]


def call_parities(
    pipeline: Any, exported: Mapping[str, nn.Module], call: UserCall, seed: int = 0
) -> list[StepParity]:
    """One row per call of a denoiser, see `named_parities`."""
    return [row for _, row in named_parities(pipeline, exported, call, seed)]


def named_parities(
    pipeline: Any, exported: Mapping[str, nn.Module], call: UserCall, seed: int = 0
) -> list[tuple[str, StepParity]]:
    """Run a pipeline in torch and compare every call of its denoisers with the exported graphs.

    Args:
        pipeline: the pipeline with its low-bit denoisers in torch.
        exported: denoisers that run on the graphs, by name.
        call: the user's call.
        seed: seed of the random numbers.

    Returns:
        The denoiser's name and a row per call of a denoiser, in the order of the calls.

    Raises:
        NonFiniteError: a graph returns NaN or infinity.
    """
    rows: list[tuple[str, StepParity]] = []
    inside = False
    passed: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def before(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not inside:
                passed[name] = copied_containers((args, kwargs))

        return keep

    def hook(name: str) -> Any:
        def after(module: nn.Module, _: tuple[Any, ...], __: dict[str, Any], result: Any) -> None:
            nonlocal inside
            # The measurement of the floor calls the module again.
            if inside:
                return
            inside = True
            try:
                args, kwargs = passed[name]
                row = _compared(name, module, exported[name], args, kwargs, result)
                rows.append((name, row))
            finally:
                inside = False

        return after

    with ExitStack() as stack:
        for name in exported:
            module = getattr(pipeline, name)
            for handle in (
                module.register_forward_pre_hook(before(name), with_kwargs=True),
                module.register_forward_hook(hook(name), with_kwargs=True),
            ):
                stack.callback(handle.remove)
        run_call(pipeline, call, seed, "parity")
    return rows


@torch.no_grad()
def form_parity(
    name: str,
    module: nn.Module,
    exported: nn.Module,
    form: VariedForm,
    known_floor: float = EXACT_DB,
) -> StepParity:
    """Compare one recorded call of a denoiser.

    Args:
        name: name of the component, for messages.
        module: the low-bit denoiser in torch.
        exported: the denoiser that runs on the graphs.
        form: form of the call, with its tensors.
        known_floor: see `tensor_parity`.
    """
    arguments = form.form.rebuild(form.tensors)
    with with_processors(module, form.processors):
        result = module(**copied_containers(arguments))
        return _compared(name, module, exported, (), arguments, result, known_floor)


def _compared(
    name: str,
    module: nn.Module,
    exported: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Any,
    known_floor: float = EXACT_DB,
) -> StepParity:
    expected = list(result_tensors(result))

    def called(denoiser: nn.Module) -> list[Tensor]:
        fresh_args, fresh_kwargs = copied_containers((args, kwargs))
        return list(result_tensors(denoiser(*fresh_args, **fresh_kwargs)))

    with with_processors(exported, attention_processors(module)):
        given = called(exported)
    if len(expected) != len(given):
        raise GateError(f"the graph of {name} returns {len(given)} tensors, torch {len(expected)}")
    for tensor in given:
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"the graph of {name} returns NaN or infinity")

    @functools.cache
    def moved(pattern: int) -> list[Tensor]:
        with last_bit_moved(module, CHANGES[pattern], pattern):
            return called(module)

    rows = []
    for index, tensor in enumerate(expected):
        floors = (_batched(moved(pattern)[index], expected) for pattern in range(len(CHANGES)))
        reference, other = _batched(tensor, expected), _batched(given[index], expected)
        rows.append(tensor_parity(reference, other, floors, known_floor=known_floor))
    return min(rows, key=lambda row: (row.db, row.pooled_db))


CHANGES = (LAST_BIT, LAST_BIT, 4 * LAST_BIT, 4 * LAST_BIT)
"""Relative changes of the values in successive measurements of the floor, each with its own pattern. In
one call of few images, one pattern flips a code or none, and another one several. The greater changes
are those of a sum over hundreds of values in another order, as another runtime computes it."""
_FEW_IMAGES = 4
"""Minimum number of images of one call of which one may be set aside because a value lies on a rounding
tie, see `trtq.exporter.parity`; an error of the export would change every image."""


def tensor_parity(
    expected: Tensor,
    given: Tensor,
    floors: Iterable[Tensor],
    usual: float = MAX_TIES_PER_STEP,
    *,
    few: bool = True,
    known_floor: float = EXACT_DB,
) -> StepParity:
    """Compare one output of one call, with the lowest floor that the agreement needs.

    Args:
        expected: the expected output, float32 `[B, ...]`.
        given: the output to check.
        floors: the expected output with changed last bits, by one pattern after the other; a pattern is
            measured only if the output does not agree as well as torch does by the earlier ones.
        usual: see `trtq.exporter.parity.compare`.
        few: whether one image of a call of few images may be set aside.
        known_floor: floor of other calls of the same model, in dB; the floor of this call is measured
            only if the output agrees worse than that.
    """

    def row_of(moved: Tensor | None = None) -> StepParity:
        row = compare(expected, given, moved, usual)
        return _without_tie(row, expected, given) if few else row

    row = row_of()
    if row.pooled_db >= TIE_DB:
        return row
    if row.db >= known_floor - FLOOR_MARGIN_DB:
        return replace(row, floor_db=known_floor)
    for pattern, moved in enumerate(floors):
        measured = row_of(moved)
        row = measured if pattern == 0 else min(row, measured, key=lambda each: each.floor_db)
        if row.db >= row.floor_db - FLOOR_MARGIN_DB:
            break
    return row


def _without_tie(row: StepParity, expected: Tensor, given: Tensor) -> StepParity:
    """The row without the one image of a small batch in which a code flips."""
    if row.db >= TIE_DB or len(expected) < _FEW_IMAGES:
        return row
    each = [snr_db(a, b) for a, b in zip(expected, given, strict=True)]
    kept = [index for index, db in enumerate(each) if db >= TIE_DB]
    if len(kept) < len(each) - 1:
        return row
    db = snr_db(expected[kept], given[kept])
    return replace(row, db=db, ties=1 / len(each))


def _batched(tensor: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """A tensor `[B, ...]` in float32; a list of outputs holds one image per tensor."""
    return tensor.float() if len(outputs) == 1 or tensor.ndim < 2 else tensor.float()[None]
