"""The HTML report of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtq.artefact.opened import Checkpoint, Opened, open_artefact
from trtq.evaluation.evaluate import Evaluation
from trtq.evaluation.evaluate_called import CallEvaluation
from trtq.evaluation.gates import METRICS
from trtq.pipelines.inspect import inspect
from trtq.pipelines.sheet import contact_sheet
from trtq.quant import precision_text
from trtq.report.lines import INTERVALS
from trtq.report.page import Page, Picture, Section, Table, picture
from trtq.report.plots import model_colours, scale_map, snr_curves

__all__ = [
    "FLOAT",
    "called_page",
    "evaluation_page",
    "grid_section",
    "layer_sections",
    "scale_range",
    "snr_section",
]

_SHOWN = 100
_GRID_SCALE = 4
_MAX_GAIN = 64
FLOAT = "float"


def grid_section(sets: Mapping[str, Tensor], colours: Mapping[str, str]) -> Section:
    """Show the first images of each model side by side, and their differences from the float model.

    Args:
        sets: images[B,C,H,W] in [-1, 1] by model; the float model is named `FLOAT`.
        colours: `#rrggbb` by model, see `model_colours`.
    """
    pictures = [_sheet(images, name, colours[name]) for name, images in sets.items()]
    text = "All grids use the same starting noise, and the same classes or prompts."
    if FLOAT in sets:
        others = {name: images for name, images in sets.items() if name != FLOAT}
        errors = {name: (images - sets[FLOAT])[:_SHOWN] for name, images in others.items()}
        gain = _gain(list(errors.values()))
        pictures += [
            _sheet((error * gain).clamp(-1, 1), f"{name} minus float, {gain} x", colours[name])
            for name, error in errors.items()
        ]
        text += f" In the differences grey means equal; differences are multiplied by {gain}."
    return Section("Images", text, images=tuple(pictures), side_by_side=True)


def _sheet(images: Tensor, caption: str, colour: str) -> Picture:
    columns = min(10, len(images))
    pixels = contact_sheet(images[:_SHOWN], columns, _scale_of(images), gap=_GRID_SCALE)
    return picture(pixels, caption, colour)


def _scale_of(images: Tensor) -> int:
    """Integer magnification of images; 1 for large images."""
    return max(1, min(_GRID_SCALE, 128 // images.shape[-1]))


def _gain(errors: Sequence[Tensor]) -> int:
    """The largest power of two up to 64 that keeps 95 % of the scaled differences within [-1, 1]."""
    if not errors:
        return 1
    values = torch.cat([error.abs().flatten() for error in errors])
    rank = min(len(values), int(0.95 * len(values)) + 1)
    bound = float(values.kthvalue(rank).values)
    return _MAX_GAIN if bound == 0 else max(1, min(_MAX_GAIN, 2 ** math.floor(-math.log2(bound))))


def snr_section(
    curves: Mapping[str, Sequence[float]],
    timesteps: Sequence[float],
    colours: Mapping[str, str],
) -> Section:
    """Show the error of the noise prediction by step.

    Args:
        curves: SNR per step, in dB, by model.
        timesteps: timestep of each step.
        colours: `#rrggbb` by model, see `model_colours`.
    """
    plot = snr_curves(curves, timesteps, colours)
    text = (
        "Signal-to-noise ratio of the predicted noise relative to the float model, at the same points "
        "of the float model's trajectory. At the last steps the noise is smaller than the quantisation "
        "scale of the input, so the ratio drops, but errors affect the image less."
    )
    caption = "Higher is better."
    return Section("Noise prediction per step", text, images=(picture(plot, caption),))


def scale_range(row: dict[str, Any]) -> str:
    """Smallest and largest scale of each input of a layer, given its row of `inspect`."""
    ranges = [f"{min(s):.3g} .. {max(s):.3g}" for s in row.get("scale", {}).values()]
    return "; ".join(ranges)


def _precision(row: Mapping[str, Any]) -> str:
    bits = row["weight_bits"], row["activation_bits"], row["right_bits"]
    return precision_text(*bits, row["format"])


def layer_sections(path: str | Path | Opened) -> tuple[Section, ...]:
    """Show layers and bits of a run or ONNX folder, and the scale tables of a run."""
    details = inspect(path).to_json()
    scales = [scale_range(row) for row in details["layers"]]
    shown = any(scales)  # Only runs contain readable scales.
    rows = tuple(
        (
            row["name"],
            _precision(row).upper(),
            *([scale] if shown else []),
            row["reason"],
        )
        for row, scale in zip(details["layers"], scales, strict=True)
    )
    header = ("layer", "bits", *(["range of scales"] if shown else []), "reason")
    sections = [Section("Layers", table=Table(header, rows, words=True))]
    tables = {
        row["name"] if len(row["scale"]) == 1 else f"{row['name']}.{operand}": values
        for row in details["layers"]
        for operand, values in row.get("scale", {}).items()
        if len(values) > 1
    }
    if tables:
        plot = scale_map(tables, details["timesteps"])
        text = (
            "One activation scale per layer and step. A layer with a uniform colour does not need "
            "separate scales per step."
        )
        caption = "Red: larger than the layer's average scale. Blue: smaller."
        sections.insert(0, Section("Scale tables", text, images=(picture(plot, caption),)))
    return tuple(sections)


def evaluation_page(path: str, evaluation: Evaluation) -> Page:
    """Build the HTML report of `trtq eval`.

    Args:
        path: path of the artefact, shown in the title.
        evaluation: result of `evaluate`.
    """
    result = evaluation.to_json()
    reference = evaluation.reference
    name = Path(path).name or path
    if name == FLOAT:
        name = f"{name} (evaluated)"
    colours = model_colours((FLOAT, name))
    timesteps = sorted(reference.source.timesteps(result["steps"]))
    sections = [
        Section("Numbers", _remarks(result), _numbers(result, name, colours)),
        grid_section({FLOAT: reference.images, name: evaluation.images}, colours),
        snr_section({name: result["snr_db"]}, timesteps, colours),
    ]
    if result.get("layers_worst"):
        rows = tuple((layer, f"{db:.1f}") for layer, db in result["layers_worst"].items())
        text = (
            "Signal-to-noise ratio of each layer's output relative to the float model, for the same "
            "denoiser inputs. The error of a layer includes the errors of the layers before it."
        )
        sections.append(
            Section("Layers with the largest errors", text, Table(("layer", "dB"), rows))
        )
    opened = open_artefact(path, verify=False)
    if not isinstance(opened, Checkpoint):
        sections += layer_sections(opened)
    features = result["features"]
    lead = (
        f"{result['images']} images per model, {result['steps']} steps, seed {result['seed']}, "
        f"guidance {result['guidance']:g}, provider {result['provider']}"
        + (f", features from {features}." if features else ".")
    )
    return Page(f"{name} compared with {reference.source.name}", lead, tuple(sections))


def called_page(path: str, evaluation: CallEvaluation) -> Page:
    """Build the HTML report of `trtq eval` for a pipeline that is used through its own call.

    Args:
        path: path of the artefact, shown in the title.
        evaluation: result of `evaluate_called`.
    """
    result = evaluation.to_json()
    name = Path(path).name or path
    if name == FLOAT:
        name = f"{name} (evaluated)"
    colours = model_colours((FLOAT, name))
    sections = [Section("Numbers", _remarks(result), _numbers(result, name, colours))]
    if evaluation.pictures is not None and evaluation.references is not None:
        sets = {FLOAT: evaluation.references, name: evaluation.pictures}
        sections.append(grid_section(sets, colours))
    steps = "" if result["steps"] is None else f"{result['steps']} steps, "
    lead = (
        f"{result['images']} results per model, {result['frames']} compared, {steps}"
        f"seed {result['seed']}, provider {result['provider']}."
    )
    return Page(f"{name} compared with the float model", lead, tuple(sections))


def _numbers(result: dict[str, Any], name: str, colours: Mapping[str, str]) -> Table:
    """Table of all available metrics of both models, with 95 % intervals."""

    def shown(key: str, interval: str | None) -> str:
        value = result.get(key)
        if value is None:
            return ""
        bounds = result.get(interval) if interval else None
        return f"{value:.3f}" + (f" ({bounds[0]:.3f} .. {bounds[1]:.3f})" if bounds else "")

    rows = []
    for key, meaning in METRICS.items():
        if result.get(key) is None:
            continue
        interval = INTERVALS.get(key)
        theirs = shown(f"{key}_reference", interval and f"{interval}_reference")
        rows.append((key, shown(key, interval), theirs, meaning))
    header = ("metric", name, FLOAT, "description")
    return Table(header, tuple(rows), words=True, colours=colours)


def _remarks(result: dict[str, Any]) -> str:
    """Sentences about intervals, gates and missing metrics."""
    remarks = ["Brackets: 95 % intervals."]
    remarks += [
        f"Gate {gate}: {'passed' if passed else 'FAILED'}."
        for gate, passed in result["gates"].items()
    ]
    if result.get("not_computed"):
        remarks.append(
            f"Not computed without a feature extractor: {', '.join(result['not_computed'])}."
        )
    return " ".join(remarks)
