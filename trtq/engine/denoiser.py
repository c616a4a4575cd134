"""A denoiser that runs on an engine, with the interface of diffusers' models."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from trtq.artefact.graph_metadata import free_sizes
from trtq.diffusion.families import family_named
from trtq.engine.base import Engine, only_output
from trtq.engine.shared import SharesEngines
from trtq.errors import ArtefactError, UsageError
from trtq.quant.stand_in import StandIn

__all__ = ["EngineDenoiser"]


_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Half-precision types that a pipeline is to see, by numpy's names."""


class EngineDenoiser(SharesEngines, StandIn):
    """Replaces the UNet or transformer in a pipeline of diffusers.

    Args:
        engine: engine of the exported graph.
        config: configuration of the exported model.
        model_class: diffusers class of the model, for the order of its arguments.

    Raises:
        ArtefactError: the graph is not a denoiser's graph.
    """

    def __init__(self, engine: Engine, config: Any, model_class: type[nn.Module]) -> None:
        super().__init__()
        self.engine = engine
        self.config = config
        self.model_class = model_class
        parameters = list(inspect.signature(model_class.forward).parameters)
        self._positions = parameters[1:]
        self._output = only_output(engine)
        self._specs = dict(engine.inputs)
        self.family = family_named(model_class.__name__)
        if self.family.sample not in self._specs:
            raise ArtefactError(
                f"the graph has no input {self.family.sample!r}, which a {model_class.__name__} has; "
                f"it takes {', '.join(self._specs) or 'none'}"
            )
        self.dtype = _FLOATS.get(self._specs[self.family.sample].dtype.name, torch.float32)
        self.device = torch.device(engine.device)
        # The hooks of `enable_model_cpu_offload` take the model's device from the first parameter.
        self.place = nn.Parameter(torch.empty(0, device=self.device), requires_grad=False)
        sizes = free_sizes(engine.metadata)
        self._sizes = None if sizes is None else sizes.model_dump()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments of the diffusers model -> `(prediction,)`, or an output with `.sample`.

        Raises:
            UsageError: an argument is missing, or the graph has no such input.
        """
        given = dict(zip(self._positions, args, strict=False)) | kwargs
        return_dict = given.pop("return_dict", True)
        flat = self.family.flatten(given)
        sample: Tensor = flat[self.family.sample]
        if self._sizes is not None:
            _check_size(sample.shape[-2], sample.shape[-1], **self._sizes)
        feeds = {}
        for name, spec in self._specs.items():
            value = flat.pop(name, None)
            if value is None:
                raise UsageError(f"the graph needs the input {name!r}, which was not given")
            # A constant of the loop stays the same object: the engine converts it once.
            tensor = torch.as_tensor(value)
            feeds[name] = tensor if tensor.ndim else tensor.reshape(1)
            _check_shape(name, tuple(feeds[name].shape), spec.shape)
        if flat:
            raise UsageError(f"the exported graph has no input {next(iter(flat))!r}")
        prediction = self.engine.run_tensors(feeds)[self._output].to(sample.device, sample.dtype)
        if not return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=prediction)


def _check_size(height: int, width: int, low: list[int], high: list[int], cell: int) -> None:
    for size, min_size, max_size in zip((height, width), low, high, strict=True):
        if not min_size <= size <= max_size or size % cell:
            raise UsageError(
                f"the graph does not support latents of {height}x{width} (HEIGHTxWIDTH); it supports "
                f"{low[0]}x{low[1]} to {high[0]}x{high[1]}, multiples of {cell}; export it for "
                "another range with --size"
            )


def _check_shape(name: str, given: tuple[int, ...], expected: tuple[int | str, ...]) -> None:
    fits = len(given) == len(expected) and all(
        size == fixed for size, fixed in zip(given, expected, strict=True) if isinstance(fixed, int)
    )
    if not fits:
        raise UsageError(
            f"the graph takes {name!r} of shape [{', '.join(map(str, expected))}], got {list(given)}; "
            "images of another size need another export: trtq export ... --size HEIGHTxWIDTH"
        )
