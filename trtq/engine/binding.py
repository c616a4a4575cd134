"""Torch tensors as inputs and outputs of an onnxruntime session, bound by their addresses.

`session.run` takes and returns arrays of the host. Bound tensors are read and written where they are,
so a denoising loop copies nothing between its steps: a session reads the latents from the scheduler's
tensor and writes the prediction into the tensor that the scheduler gets.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from trtq.engine.base import TensorSpec, check_names
from trtq.engine.bound_graphs import CapturedShapes
from trtq.engine.foreign_errors import onnxruntime_errors
from trtq.engine.place import HOST, Place
from trtq.errors import UsageError

__all__ = ["ELEMENT_TYPES", "TensorBinding", "torch_dtype"]

ELEMENT_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
"""Numbers of ONNX's `TensorProto.DataType`; unlike numpy's types they include bfloat16."""


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Torch's data type of a numpy data type; `ml_dtypes.bfloat16` is one, too."""
    same: torch.dtype = getattr(torch, dtype.name)
    return same


class TensorBinding:
    """Runs a session on torch tensors.

    Ownership: an input is read during the call only. Each output is a new tensor of torch's allocator,
    which belongs to the caller and is never written again, since multistep schedulers keep earlier
    predictions. Threads may call one object at the same time.

    An input tensor with another type, device or layout is converted. The result is kept while the same
    tensor object comes again unchanged, so the constants of a denoising loop, e.g. the embeddings of a
    prompt, are converted and uploaded once.

    Args:
        session: an `onnxruntime.InferenceSession`.
        provider: name of the provider, for messages.
        inputs: the session's inputs by name.
        outputs: the session's outputs by name.
        place: memory of the tensors.
        graphs: shapes to capture as CUDA graphs, which need fixed addresses; None: no capture.
    """

    def __init__(
        self,
        session: Any,
        provider: str,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        place: Place = HOST,
        graphs: CapturedShapes | None = None,
    ) -> None:
        self.place = place
        self._session, self._provider = session, provider
        self._inputs, self._outputs = inputs, outputs
        self._dtypes = {name: torch_dtype(spec.dtype) for name, spec in inputs.items()}
        self._graphs = graphs
        self._alone = threading.Lock()
        self._free: list[_Slot] = []

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the session once.

        Args:
            feeds: a tensor for each input, by name, of any device.

        Returns:
            The outputs by name, in the session's memory.

        Raises:
            UsageError: an input is missing or unknown, empty, or of a kind that has no address.
            ArtefactError: onnxruntime fails, e.g. because of a shape that the graph does not have.
        """
        check_names(self._inputs, feeds)
        if self._graphs is not None:
            with self._alone:  # The addresses of a captured graph serve one call at a time.
                return self._captured(self._graphs, feeds)
        slot = self._free_slot()
        tensors = slot.converted(feeds, self._dtypes, self.place)
        outputs = self._allocated(tensors)
        self.place.wait()
        with onnxruntime_errors("run", self._provider):
            slot.bind_inputs(feeds, tensors, self.place)
            for name in self._outputs:
                slot.bind_output(name, outputs.get(name), self.place)
            self._session.run_with_iobinding(slot.io)
            results = slot.results(self._outputs, outputs)
        # A slot whose run failed is not used again.
        self._free.append(slot)
        return results

    def _free_slot(self) -> _Slot:
        try:
            return self._free.pop()
        except IndexError:  # Other threads have all slots.
            return _Slot(self._session.io_binding())

    def _allocated(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New tensors for the outputs whose shape follows from the inputs' shapes."""
        sizes: dict[str, set[int]] = {}
        for name, spec in self._inputs.items():
            for size, axis in zip(tensors[name].shape, spec.shape, strict=False):
                if isinstance(axis, str):
                    sizes.setdefault(axis, set()).add(size)
        known = {axis: seen.pop() for axis, seen in sizes.items() if len(seen) == 1 and axis != "?"}
        outputs = {}
        for name, spec in self._outputs.items():
            shape = [known.get(axis) if isinstance(axis, str) else axis for axis in spec.shape]
            if None not in shape:
                dtype = torch_dtype(spec.dtype)
                outputs[name] = torch.empty(shape, dtype=dtype, device=self.place.device)  # type: ignore[arg-type]
        return outputs

    def _captured(self, graphs: CapturedShapes, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run with fixed addresses: inputs are copied to them, outputs are copied from them."""
        slot = graphs.slot or _Slot(self._session.io_binding())
        graphs.slot = slot
        tensors = slot.converted(feeds, self._dtypes, self.place)
        shape = graphs.shape_of(tensors)
        if shape is None:
            shape = graphs.add(tensors, self._allocated(tensors), self._outputs)
        for name, value in tensors.items():
            shape.inputs[name].copy_(value)
        self.place.wait()
        with onnxruntime_errors("run", self._provider):
            slot.bind_inputs(shape.inputs, shape.inputs, self.place)
            for name in self._outputs:
                slot.bind_output(name, shape.outputs[name], self.place)
            self._session.run_with_iobinding(slot.io, graphs.options_of(shape))
        return {name: value.clone() for name, value in shape.outputs.items()}


@dataclass
class _Kept:
    """An input as it came, its version at that time, and what it was converted to."""

    source: weakref.ref[Tensor]
    version: int
    value: Tensor


class _Slot:
    """One onnxruntime binding, and what it holds from earlier calls."""

    def __init__(self, io: Any) -> None:
        self.io = io
        self._kept: dict[str, _Kept] = {}
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def converted(
        self, feeds: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], place: Place
    ) -> dict[str, Tensor]:
        """The inputs with the session's types, in its memory, contiguous.

        Raises:
            UsageError: an input is empty, or has no address.
        """
        tensors = {}
        for name, dtype in dtypes.items():
            source = feeds[name]
            _check(name, source, dtype)
            if self._is_kept(name, source):
                tensors[name] = self._kept[name].value
                continue
            value = source.detach().resolve_conj().resolve_neg()
            value = value.to(place.device, dtype).contiguous()
            tensors[name] = value
            self._kept.pop(name, None)
            version = _version(source)
            is_source = value.data_ptr() == source.data_ptr() and value.device == source.device
            if version is not None and (place.uploads or not is_source):
                self._kept[name] = _Kept(weakref.ref(source), version, value)
                self._bound.pop(name, None)
        return tensors

    def _is_kept(self, name: str, source: Tensor) -> bool:
        kept = self._kept.get(name)
        return kept is not None and kept.source() is source and kept.version == _version(source)

    def bind_inputs(
        self, sources: Mapping[str, Tensor], tensors: Mapping[str, Tensor], place: Place
    ) -> None:
        """Bind the inputs that are not bound already."""
        for name, value in tensors.items():
            key = value.data_ptr(), tuple(value.shape)
            # A copy on a device that torch cannot reach is the tensor's until the tensor changes.
            valid = not place.uploads or self._is_kept(name, sources[name])
            if valid and self._bound.get(name) == key:
                continue
            self._bound.pop(name, None)
            self.io.bind_input(
                name,
                place.name,
                place.index,
                ELEMENT_TYPES[value.dtype],
                list(value.shape),
                value.data_ptr(),
            )
            self._bound[name] = key

    def bind_output(self, name: str, value: Tensor | None, place: Place) -> None:
        """Bind a tensor as an output; None: onnxruntime allocates the output."""
        if value is None:
            self.io.bind_output(name, place.name, place.index)
            return
        self.io.bind_output(
            name,
            place.name,
            place.index,
            ELEMENT_TYPES[value.dtype],
            list(value.shape),
            value.data_ptr(),
        )

    def results(
        self, specs: Mapping[str, TensorSpec], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The outputs in order; those that onnxruntime allocated come without a copy."""
        if len(outputs) == len(specs):
            return dict(outputs)
        values = dict(zip(specs, self.io.get_outputs(), strict=True))
        return {
            name: outputs[name] if name in outputs else _adopted(value, specs[name])
            for name, value in values.items()
        }


def _check(name: str, value: Any, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise UsageError(f"the input {name!r} must be a torch tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.device.type == "meta":
        kind = "on the meta device" if value.device.type == "meta" else str(value.layout)
        raise UsageError(f"the input {name!r} has no address: it is {kind}; pass a dense tensor")
    if value.is_complex() or dtype not in ELEMENT_TYPES:
        raise UsageError(f"the input {name!r} is {value.dtype}, and the graph takes {dtype}")
    if not value.numel():
        raise UsageError(
            f"the input {name!r} of shape {list(value.shape)} is empty; pass at least one row"
        )


def _version(value: Tensor) -> int | None:
    """A number that rises with each change of the tensor; None: changes cannot be seen.

    Torch counts changes made through torch only, except under `inference_mode` and through `.data`. The
    storage of a tensor that shares its memory with numpy or a file cannot be resized.
    """
    if value.is_inference() or not value.untyped_storage().resizable():
        return None
    return value._version


def _adopted(value: Any, spec: TensorSpec) -> Tensor:
    """A tensor over the memory of an `OrtValue`, which lives as long as the tensor."""
    inner = getattr(value, "_ortvalue", value)
    if not hasattr(inner, "__dlpack__"):  # onnxruntime built without DLPack.
        return torch.from_numpy(value.numpy())
    tensor: Tensor = torch.utils.dlpack.from_dlpack(inner)
    # Before version 1.0, DLPack had no booleans.
    return tensor.view(torch.bool) if spec.dtype == np.bool_ else tensor
