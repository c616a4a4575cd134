"""The layer as a custom operator of torch: `torch.ops.trtq.low_bit`.

On an NVIDIA GPU the operator starts the CUDA kernels on torch's current stream, with scratch memory from
torch's allocator, so it can be captured in a CUDA graph. On a CPU it computes the same integers in
torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trtq.errors import UsageError
from trtq.plugins.device import current_device
from trtq.plugins.launch import Pointers, start_layer
from trtq.plugins.low_bit.attributes import PLUGINS, fields_of, spec_of
from trtq.plugins.low_bit.pack import unpack_bytes, unpack_nibbles
from trtq.plugins.spec import LayerSpec, Problem

__all__ = ["FLAT_FIELDS", "flat_fields", "low_bit", "spec_from_flat"]

FLAT_FIELDS = tuple(fields_of(LayerSpec(1, 1, 1, 8, 8)))
"""Order of a layer's attributes in a list of integers; the first integer is 1 for a convolution."""
_ARGUMENTS = {
    "weight": torch.int8,
    "terms": torch.float32,
    "tables": torch.float32,
    "step": torch.int64,
}


def flat_fields(layer: LayerSpec) -> list[int]:
    """A layer as the operator's list of integers; `spec_from_flat` is the inverse."""
    fields = fields_of(layer)
    return [int(layer.geometry is not None), *(v for name in FLAT_FIELDS for v in fields[name])]


def spec_from_flat(flat: list[int]) -> LayerSpec:
    """Inverse of `flat_fields`.

    Raises:
        UsageError: there are too few integers.
    """
    values = iter(flat)
    conv = next(values, 0)
    lengths = {name: len(v) for name, v in fields_of(LayerSpec(1, 1, 1, 8, 8)).items()}
    fields = {
        name: [value for _, value in zip(range(length), values, strict=False)]
        for name, length in lengths.items()
    }
    return spec_of(PLUGINS[conv], fields)


def _channels_last(x: Tensor, layer: LayerSpec) -> bool:
    return (
        layer.geometry is not None
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def _empty_out(x: Tensor, layer: LayerSpec) -> Tensor:
    """An output tensor in the memory format of the input."""
    if layer.geometry is None:
        return x.new_empty(*x.shape[:-1], layer.out_channels)
    problem = layer.problem(x.shape)
    last = _channels_last(x, layer)
    return torch.empty(
        problem.out_shape,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _check(x: Tensor, layer: LayerSpec, **operands: Tensor) -> None:
    """Check dtypes, sizes and devices, without reading the values of steps from the device.

    Raises:
        UsageError: an operand does not fit the layer.
    """
    if x.dtype not in (torch.float16, torch.float32):
        raise UsageError(f"a low-bit layer takes float16 or float32, got {x.dtype}")
    layer.problem(x.shape)
    shapes = {
        "weight": layer.weight_shape(),
        "terms": (4, layer.out_channels),
        "tables": (4, layer.steps),
        "step": (x.shape[0],),
    }
    for name, tensor in operands.items():
        if tensor.dtype != _ARGUMENTS[name] or tuple(tensor.shape) != shapes[name]:
            raise UsageError(
                f"{name} must be {_ARGUMENTS[name]} of {list(shapes[name])}, got {tensor.dtype} of "
                f"{list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise UsageError(f"{name} must be contiguous; kernels read its memory in order")
        if tensor.device != x.device:
            raise UsageError(f"{name} is on {tensor.device}, the input on {x.device}")


@torch.library.custom_op("trtq::low_bit", mutates_args=(), device_types="cuda")
def low_bit(
    x: Tensor,
    weight: Tensor,
    terms: Tensor,
    tables: Tensor,
    step: Tensor,
    residual: Tensor | None,
    layer: list[int],
    silu: bool,
) -> Tensor:
    """A low-bit linear layer or convolution.

    Args:
        x: input, `[B, ..., C]` or `[B, C, H, W]`, float16 or float32.
        weight: packed weight, int8, in the layout of `trtq.plugins.spec`.
        terms: terms per output channel, float32[4, N].
        tables: scales and limits per step, float32[4, T].
        step: index of each image's step, int64[B]; an index outside the tables gives NaN.
        residual: tensor to add, in the output's shape; None: no residual.
        layer: attributes of the layer, see `flat_fields`.
        silu: whether to apply SiLU to the result.

    Returns:
        The output, `[B, ..., N]` or `[B, N, P, Q]`, in the dtype of x.

    Raises:
        UsageError: an operand does not fit the layer.
        KernelError: a kernel cannot be compiled, loaded or started.
    """
    spec = spec_from_flat(layer)
    _check(x, spec, weight=weight, terms=terms, tables=tables, step=step)
    last = _channels_last(x, spec)
    form = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=form)
    out = _empty_out(x, spec)
    if residual is not None:
        residual = residual.to(x.dtype).expand(out.shape).contiguous(memory_format=form)
    problem = spec.problem(x.shape, channels_last=last)
    codes = torch.empty(problem.code_bytes(native_4=False), dtype=torch.uint8, device=x.device)
    sums = torch.empty(problem.sum_bytes // 4, dtype=torch.int32, device=x.device)
    partial = torch.empty(problem.split_bytes // 4, dtype=torch.int32, device=x.device)
    at = Pointers(
        x.data_ptr(),
        weight.data_ptr(),
        terms.data_ptr(),
        tables.data_ptr(),
        step.data_ptr(),
        out.data_ptr(),
        codes.data_ptr(),
        sums.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        partial.data_ptr() if problem.split_bytes else 0,
    )
    _start(spec, problem, at, x.device, half=x.dtype == torch.float16, silu=silu)
    return out


def _start(
    layer: LayerSpec, problem: Problem, at: Pointers, gpu: torch.device, *, half: bool, silu: bool
) -> None:
    """Start a layer on torch's current stream, in any thread.

    A new thread has no CUDA context until torch changes the device or allocates memory in it, so
    `current_device` sets the context.
    """
    with torch.cuda.device(gpu):
        stream = torch.cuda.current_stream().cuda_stream
        device = current_device(torch.cuda.current_device())
        start_layer(device, layer, problem, at, stream, half=half, silu=silu)


@low_bit.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    terms: Tensor,
    tables: Tensor,
    step: Tensor,
    residual: Tensor | None,
    layer: list[int],
    silu: bool,
) -> Tensor:
    return _empty_out(x, spec_from_flat(layer))


@low_bit.register_kernel("cpu")
def _(
    x: Tensor,
    weight: Tensor,
    terms: Tensor,
    tables: Tensor,
    step: Tensor,
    residual: Tensor | None,
    layer: list[int],
    silu: bool,
) -> Tensor:
    spec = spec_from_flat(layer)
    _check(x, spec, weight=weight, terms=terms, tables=tables, step=step)
    items = (-1, *(1,) * (x.ndim - 1))
    scale, inverse, low, high = (row[step].reshape(items) for row in tables)
    # As in the kernel, NaN becomes the smallest code.
    codes = (x.float() * inverse).round().fmax(low).fmin(high)
    groups = 1 if spec.geometry is None else spec.geometry.groups
    packed, channels = weight.numpy(), spec.channels // groups
    if spec.weight_bits == 4:
        integers = torch.from_numpy(unpack_nibbles(packed, channels)).float()
        integers -= terms[2].reshape(-1, 1, 1, 1)
    else:
        integers = torch.from_numpy(unpack_bytes(packed, channels)).float()
    channel = (-1,) if spec.geometry is None else (-1, 1, 1)
    if spec.geometry is None:
        y = functional.linear(codes, integers.flatten(1))
    else:
        g = spec.geometry
        y = functional.conv2d(codes, integers, None, g.stride, g.padding, g.dilation, groups)
    y = y * (terms[0].reshape(channel) * scale) + terms[1].reshape(channel)
    y = y if residual is None else y + residual.float()
    y = functional.silu(y) if silu else y
    return torch.empty_like(_empty_out(x, spec)).copy_(y)
