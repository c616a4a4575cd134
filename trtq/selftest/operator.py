"""Stage 3: the operator of torch on the GPU, with all that a program may do around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trtq.bench.kernel_operands import FORMS, Operands, Shape, draw_operands, expected
from trtq.plugins.low_bit.op import flat_fields, low_bit
from trtq.plugins.spec import Geometry
from trtq.selftest.torch_gpu import require_torch
from trtq.selftest.trials import Options, Outcome, SkippedError, Trial

__all__ = ["SHAPES", "differences", "run", "trials"]

SHAPES = (
    Shape("linear", (3, 77, 320), 136),
    Shape("convolution", (3, 72, 9, 8), 40, Geometry((3, 3), (2, 2), (1, 1))),
)
_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Checks of torch.library.opcheck; the operator has no gradient."""


def trials(options: Options) -> Iterator[Trial]:
    """One trial per use of the operator, in every form of both layers."""
    try:
        require_torch()
    except SkippedError:
        yield Trial("torch", lambda: require_torch() and None)
        return
    uses: dict[str, Callable[[Operands], Tensor | None]] = {
        "definition": lambda o: o.call(),
        "opcheck": _opcheck,
        "contiguous images": _contiguous,
        "side stream": _side_stream,
        "fresh thread": _fresh_thread,
    }
    for shape in SHAPES:
        for form in FORMS:
            for name, use in uses.items():
                yield Trial(f"{name}, {shape.model} {form}", partial(run, use, shape, form))
            call = partial(_graph, shape, form)
            yield Trial(f"CUDA graph, {shape.model} {form}", call)


def run(
    use: Callable[[Operands], Tensor | None], shape: Shape, form: str, device: str = "cuda"
) -> Outcome:
    """Draw a layer, use the operator, and compare the output with the layer's definition.

    Args:
        use: function that calls the operator; it returns the output, or None if it only checks.
        shape: shape of the layer.
        form: name of one of `FORMS`.
        device: torch's device.
    """
    operands = draw_operands(shape, form, torch.device(device))
    output = use(operands)
    return Outcome(fault=None if output is None else differences(output, operands))


def differences(output: Tensor, operands: Operands) -> str | None:
    """What is wrong with an output; None: nothing."""
    wanted = expected(operands)
    if output.shape != wanted.shape or output.dtype != wanted.dtype:
        return f"the output is {output.dtype} of {list(output.shape)}, not of {list(wanted.shape)}"
    wrong = (output != wanted).nonzero()
    if not len(wrong):
        return None
    first = tuple(wrong[0].tolist())
    return (
        f"{len(wrong)} of {wanted.numel()} values are wrong, first at {first}: "
        f"{output[first].item()} in place of {wanted[first].item()}"
    )


def _arguments(o: Operands) -> tuple[Any, ...]:
    return o.x, o.weight, o.terms, o.tables, o.step, None, flat_fields(o.spec), False


def _opcheck(operands: Operands) -> None:
    torch.library.opcheck(low_bit, _arguments(operands), test_utils=_CHECKS)


def _contiguous(operands: Operands) -> Tensor:
    """The input with channels first; the benchmark's operands have channels last."""
    output = replace(operands, x=operands.x.contiguous()).call()
    if operands.x.ndim == 4 and not output.is_contiguous():
        raise AssertionError("the output of contiguous images is not contiguous")
    return output


def _side_stream(operands: Operands) -> Tensor:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output = operands.call()
    torch.cuda.current_stream().wait_stream(stream)
    return output


def _fresh_thread(operands: Operands) -> Tensor:
    """In a thread whose first use of CUDA is the operator, no context is current."""
    results: list[Tensor | Exception] = []

    def work() -> None:
        try:
            results.append(operands.call())
        except Exception as err:  # Raised again in the caller's thread.
            results.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _graph(shape: Shape, form: str) -> Outcome:
    """A captured call computes what is in its input at each replay, not at the capture."""
    device = torch.device("cuda")
    first, second = (draw_operands(shape, form, device, seed=seed) for seed in (0, 1))
    operands = replace(first, x=first.x.clone())
    operands.call()  # Kernels cannot be loaded during a capture.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operands.call()
    for index, given in enumerate((first, second, first, second)):
        operands.x.copy_(given.x)
        graph.replay()
        torch.cuda.synchronize()
        fault = differences(output, replace(first, x=given.x))
        if fault is not None:
            return Outcome(fault=f"replay {index + 1}: {fault}")
    return Outcome()
