"""The whole way of a pipeline: recorded, quantised, exported, loaded, called as its user calls it."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trtq
from tests.calls.zoo.case import STEPS, Case
from trtq.artefact.manifest import Manifest
from trtq.calls.recorder import TIMESTEP_NAMES
from trtq.checkpoint.components import denoisers_of
from trtq.errors import LegalityError

__all__ = ["MAX_DIFFERENCE", "MIN_PARITY_DB", "MIN_PSNR_DB", "Measured", "called", "measure"]

RECIPE = {"method": "minmax", "bits": "w4a8", "steps": STEPS, "calibration": {"images": 2}}
MIN_PSNR_DB = 12.0
"""Minimum PSNR of the low-bit run against the float pipeline; unrelated noise has 8 dB."""
MIN_PARITY_DB = 40.0
MAX_DIFFERENCE = 0.02
"""Maximum mean absolute difference between the outputs of graph and run."""
EXACT_DB = 200.0


@dataclass
class Measured:
    """What a pipeline's whole way gives.

    Attributes:
        title: name that people know.
        pipeline: class name of the pipeline.
        denoisers: class names of the denoisers by component.
        layers: number of layers of the denoisers.
        low_bit: number of layers that are low-bit.
        float_layers: number of float layers by reason.
        graphs: number of graphs.
        free: what may vary in the graphs: `batch`, `prompt`.
        fixed: reason by what may not vary.
        psnr_db: PSNR of the low-bit run against the float pipeline, in dB.
        parity_db: minimum SNR of the graphs against torch, in dB; None for a refused export.
        floor_db: SNR of torch against itself with inputs changed in their last bit, in dB, at the call
            with the minimum.
        refused: message of a refused export.
        difference: mean absolute difference between the outputs of graph and run.
        engines: GPU architectures for which TensorRT-RTX builds the graphs; None: not tried.
    """

    title: str
    pipeline: str
    denoisers: dict[str, str]
    layers: int
    low_bit: int
    float_layers: dict[str, int]
    psnr_db: float
    graphs: int = 0
    free: list[str] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)
    parity_db: float | None = None
    floor_db: float | None = None
    refused: str | None = None
    difference: float | None = None
    engines: list[str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, rounded."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def called(pipeline: Any, case: Case, **changes: Any) -> Tensor:
    """Output of a pipeline for the user's call with seed 0, as one tensor.

    Args:
        pipeline: diffusers pipeline.
        case: the case whose arguments are passed.
        changes: arguments that differ from the user's.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    arguments = case.call() | changes
    if "generator" in accepted:
        arguments["generator"] = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return _tensor(pipeline(**arguments)[0])


def _tensor(output: Any) -> Tensor:
    """Images, video or sound as one tensor."""
    if isinstance(output, Tensor):
        return output.detach().float()
    if isinstance(output, np.ndarray):
        return torch.from_numpy(output).float()
    assert isinstance(output, list | tuple), type(output)
    return torch.stack([_tensor(item) for item in output])


def psnr(output: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio for values from 0 to 1, in dB."""
    error = float((output - reference).double().square().mean())
    return EXACT_DB if error == 0 else -10 * math.log10(error)


def passed_timesteps(pipeline: Any, case: Case) -> tuple[Tensor, dict[str, list[float]]]:
    """Output of the float pipeline, and the timesteps that it passes, by denoiser.

    The values are the largest of each call, each once, rising, in single precision.
    """
    passed: dict[str, set[float]] = {}

    def hook(name: str, parameters: list[str]) -> Any:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(parameters, args, strict=False)) | kwargs
            timestep = next(given[key] for key in TIMESTEP_NAMES if given.get(key) is not None)
            value = torch.as_tensor(timestep).float().max()
            passed.setdefault(name, set()).add(float(value))

        return before

    with ExitStack() as stack:
        for name, module in denoisers_of(pipeline).items():
            parameters = list(inspect.signature(module.forward).parameters)
            handle = module.register_forward_pre_hook(hook(name, parameters), with_kwargs=True)
            stack.callback(handle.remove)
        output = called(pipeline, case)
    return output, {name: sorted(values) for name, values in passed.items()}


def _read(folder: Path) -> Manifest:
    return Manifest.model_validate(json.loads((folder / "manifest.json").read_text()))


def measure(case: Case, folder: Path, architectures: Sequence[str] = ()) -> Measured:
    """Take a pipeline the whole way and check every part of it.

    Args:
        case: the pipeline.
        folder: new or empty folder for the checkpoint, the run and the graphs.
        architectures: GPU architectures to build engines for; empty: engines are not built.

    Raises:
        AssertionError: a part of the way does not hold.
        LegalityError: the export is refused, but not as the case expects.
    """
    pipeline = case.pipeline()
    expected, timesteps = passed_timesteps(pipeline, case)
    assert bool(torch.isfinite(expected).all()), "the float pipeline returns NaN or infinity"
    pipeline.save_pretrained(folder / "model")
    trtq.quantize(folder / "model", RECIPE, folder / "run", calls=[case.call()])
    manifest = _read(folder / "run")
    calibrated = {
        row.denoiser: [float(torch.tensor(value)) for value in row.timesteps or []]
        for row in manifest.denoisers
    }
    assert calibrated == timesteps
    low_bit = called(trtq.load(folder / "run"), case)
    assert low_bit.shape == expected.shape
    row = _measured(case, pipeline, manifest, psnr(low_bit, expected))
    assert row.psnr_db >= MIN_PSNR_DB
    try:
        exported = trtq.export(folder / "run", folder / "onnx")
    except LegalityError as err:
        if case.refused is None or not re.search(case.refused, str(err)):
            raise
        row.refused = str(err)
        return row
    assert case.refused is None, f"expected to be refused: {case.refused}"
    row.parity_db = exported.parity_db_min
    row.floor_db = exported.parity_floor_db[exported.parity_db.index(row.parity_db)]
    # Below torch's own floor the export itself raises.
    assert row.parity_db >= MIN_PARITY_DB or row.floor_db < MIN_PARITY_DB
    _add_graphs(row, _read(folder / "onnx"))
    loaded = trtq.load(folder / "onnx")
    assert type(loaded) is type(pipeline)
    row.difference = float((called(loaded, case) - low_bit).abs().mean())
    assert row.difference < MAX_DIFFERENCE
    for name in row.denoisers:
        setattr(loaded, name, getattr(pipeline, name))
    assert torch.equal(called(loaded, case), expected), "the pipeline around the denoiser changed"
    if architectures:
        built = trtq.build(folder / "onnx", folder / "engine", architectures=architectures)
        assert len(built.engines) == row.graphs
        row.engines = list(built.architectures)
    return row


def _measured(case: Case, pipeline: Any, manifest: Manifest, psnr_db: float) -> Measured:
    layers = [layer for row in manifest.denoisers for layer in row.layers]
    float_layers: dict[str, int] = {}
    for layer in layers:
        if layer.weight_bits is None and layer.activation_bits is None:
            reason = layer.reason or "no reason"
            float_layers[reason] = float_layers.get(reason, 0) + 1
    return Measured(
        title=case.title,
        pipeline=type(pipeline).__name__,
        denoisers={row.denoiser: row.recorded.model for row in manifest.denoisers},
        layers=len(layers),
        low_bit=len(layers) - sum(float_layers.values()),
        float_layers=float_layers,
        psnr_db=psnr_db,
    )


def _add_graphs(row: Measured, manifest: Manifest) -> None:
    graphs = [graph for part in manifest.denoisers for graph in part.recorded.graphs]
    axes = [axis for graph in graphs for rows in graph.free.values() for axis in rows]
    row.graphs = len(graphs)
    row.free = sorted({axis.varies for axis in axes})
    row.fixed = dict(_reasons(graph.fixed for graph in graphs))


def _reasons(fixed: Any) -> Mapping[str, str]:
    """All reasons by what is fixed, each once."""
    joined: dict[str, str] = {}
    for reasons in fixed:
        for what, reason in reasons.items():
            if reason not in joined.get(what, ""):
                joined[what] = f"{joined[what]}; {reason}" if what in joined else reason
    return joined
