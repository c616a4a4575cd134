"""What an evaluation looks like on a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtq.artefact.opened import Checkpoint, Opened, open_artefact
from trtq.evaluation.evaluate import METRICS, Evaluation
from trtq.pipelines.draw import contact_sheet
from trtq.pipelines.inspect import inspect
from trtq.quant import precision_text
from trtq.report.lines import INTERVALS
from trtq.report.page import Page, Picture, Section, Table, picture
from trtq.report.plots import model_colours, scale_map, snr_curves

__all__ = [
    "FLOAT",
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
    """The first images of each model side by side, and their difference to the float model's.

    Args:
        sets: images[B,C,H,W] in [-1, 1] by model; the float model's are named `FLOAT`.
        colours: `#rrggbb` by model, see `model_colours`.
    """
    pictures = [_sheet(images, name, colours[name]) for name, images in sets.items()]
    text = "Same starting noise and same classes or prompts in every grid."
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
    """Small images are shown with larger pixels; large ones as they are."""
    return max(1, min(_GRID_SCALE, 128 // images.shape[-1]))


def _gain(errors: Sequence[Tensor]) -> int:
    """The largest power of two, 64 at most, by which 95 % of the differences stay within [-1, 1]."""
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
    """Error of the noise prediction at each step: dB per step by model."""
    plot = snr_curves(curves, timesteps, colours)
    text = (
        "Signal-to-noise ratio of the predicted noise against the float model's, at the same points of "
        "the float model's trajectory. At the last steps the noise to predict is smaller than one "
        "quantisation interval of the input, so the ratio falls, and so does its effect on the image."
    )
    caption = "Higher is better."
    return Section("Every step against float", text, images=(picture(plot, caption),))


def scale_range(row: dict[str, Any]) -> str:
    """Smallest and largest scale of a layer's inputs, from its row of `inspect`."""
    ranges = [f"{min(s):.3g} .. {max(s):.3g}" for s in row.get("scale", {}).values()]
    return "; ".join(ranges)


def layer_sections(path: str | Path | Opened) -> tuple[Section, ...]:
    """Layers and bits of a run or ONNX folder; for a run with tables also their map."""
    found = inspect(path).to_json()
    scales = [scale_range(row) for row in found["layers"]]
    shown = any(scales)  # Only a run holds its scales in a readable form.
    rows = tuple(
        (
            row["name"],
            precision_text(row["weight_bits"], row["activation_bits"], row["right_bits"]).upper(),
            *([scale] if shown else []),
            row["reason"],
        )
        for row, scale in zip(found["layers"], scales, strict=True)
    )
    header = ("layer", "bits", *(["scale over the steps"] if shown else []), "why")
    sections = [Section("Layers", table=Table(header, rows, words=True))]
    tables = {
        row["name"] if len(row["scale"]) == 1 else f"{row['name']}.{operand}": values
        for row in found["layers"]
        for operand, values in row.get("scale", {}).items()
        if len(values) > 1
    }
    if tables:
        plot = scale_map(tables, found["timesteps"])
        text = (
            "One activation scale per layer and step. A layer that is the same colour all along "
            "would do with one scale."
        )
        caption = "Red: a larger range than on average, blue: a smaller one."
        sections.insert(0, Section("Scale tables", text, images=(picture(plot, caption),)))
    return tuple(sections)


def evaluation_page(path: str, evaluation: Evaluation) -> Page:
    """The report of `trtq eval`."""
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
            "Signal-to-noise ratio of each layer's output against the float model's, on the same inputs "
            "of the denoiser; a layer's error includes what reaches it from the layers before."
        )
        sections.append(Section("Layers that hurt most", text, Table(("layer", "dB"), rows)))
    opened = open_artefact(path, verify=False)
    if not isinstance(opened, Checkpoint):
        sections += layer_sections(opened)
    features = result["features"]
    lead = (
        f"{result['images']} images with each model, {result['steps']} steps, seed {result['seed']}, "
        f"guidance {result['guidance']:g}, provider {result['provider']}"
        + (f", features of {features}." if features else ".")
    )
    return Page(f"{name} against {reference.source.name}", lead, tuple(sections))


def _numbers(result: dict[str, Any], name: str, colours: Mapping[str, str]) -> Table:
    """Every metric that there is, of both models, with its 95 % interval."""

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
    header = ("metric", name, FLOAT, "what it is")
    return Table(header, tuple(rows), words=True, colours=colours)


def _remarks(result: dict[str, Any]) -> str:
    """Gates, what the brackets are, and what is not there."""
    remarks = ["In brackets: 95 % intervals."]
    remarks += [
        f"Gate {gate}: {'met' if held else 'NOT met'}." for gate, held in result["gates"].items()
    ]
    if result.get("not_computed"):
        remarks.append(
            f"Not computed without a feature extractor: {', '.join(result['not_computed'])}."
        )
    return " ".join(remarks)
