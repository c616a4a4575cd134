"""What an evaluation looks like on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtq.evaluate.images import contact_sheet
from trtq.manifest import artefact_kind
from trtq.quant import precision_text
from trtq.report.page import Page, Section, Table, picture
from trtq.report.plots import scale_map, snr_curves
from trtq.stages.evaluate import METRICS, Evaluation
from trtq.stages.inspect import inspect_artefact

__all__ = ["evaluation_page", "grid_section", "layer_sections", "scale_range", "snr_section"]

_SHOWN = 100
_GRID_SCALE = 4


def grid_section(sets: dict[str, Any]) -> Section:
    """The first images of each model side by side; images[B,C,H,W] by name."""
    pictures = tuple(
        picture(contact_sheet(images[:_SHOWN], 10, _GRID_SCALE, gap=_GRID_SCALE), name)
        for name, images in sets.items()
    )
    text = "Same starting noise and same classes in every grid; columns are classes."
    return Section("Images", text, images=pictures, side_by_side=True)


def snr_section(curves: dict[str, list[float]], timesteps: list[float]) -> Section:
    """Error of the noise prediction at each step."""
    plot = snr_curves(curves, timesteps)
    text = (
        "Signal-to-noise ratio of the predicted noise against the float model's, at the same points of "
        "the float model's trajectory. At the last steps the noise to predict is smaller than one "
        "quantisation step of the input, so the ratio falls, and so does its effect on the image."
    )
    caption = "Higher is better."
    return Section("Every step against float", text, images=(picture(plot, caption),))


def scale_range(row: dict[str, Any]) -> str:
    """Smallest and largest scale of a layer's inputs, from its row of `inspect_artefact`."""
    ranges = [f"{min(s):.3g} .. {max(s):.3g}" for s in row.get("scale", {}).values()]
    return "; ".join(ranges)


def layer_sections(path: str | Path) -> tuple[Section, ...]:
    """Layers and bits of a run or ONNX folder; for a run with tables also their map."""
    found = inspect_artefact(path)
    rows = tuple(
        (
            row["name"],
            precision_text(row["weight_bits"], row["activation_bits"], row["right_bits"]).upper(),
            scale_range(row),
            row["reason"],
        )
        for row in found["layers"]
    )
    header = ("layer", "bits", "scale over the steps", "why")
    sections = [Section("Layers", table=Table(header, rows, words=True))]
    tables = {
        row["name"] if len(row["scale"]) == 1 else f"{row['name']}.{operand}": scales
        for row in found["layers"]
        for operand, scales in row.get("scale", {}).items()
        if len(scales) > 1
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
    result = evaluation.result
    reference = evaluation.reference
    name = Path(path).name or path
    timesteps = sorted(reference.source.timesteps(result["steps"]))
    sections = [
        Section("Numbers", _gates(result["gates"]), _numbers(result)),
        grid_section({"float": reference.images, name: evaluation.images}),
        snr_section({name: result["snr_db"]}, timesteps),
    ]
    if result.get("layers_worst"):
        rows = tuple((layer, f"{db:.1f}") for layer, db in result["layers_worst"].items())
        text = (
            "Signal-to-noise ratio of each layer's output against the float model's, on the same inputs "
            "of the denoiser; a layer's error includes what reaches it from the layers before."
        )
        sections.append(Section("Layers that hurt most", text, Table(("layer", "dB"), rows)))
    if Path(path).is_dir() and artefact_kind(Path(path)) is not None:
        sections += layer_sections(path)
    lead = (
        f"{result['images']} images with each model, {result['steps']} steps, seed {result['seed']}, "
        f"guidance {result['guidance']:g}, provider {result['provider']}, features of "
        f"{result['features']}."
    )
    return Page(f"{name} against {reference.source.name}", lead, tuple(sections))


_INTERVALS = {"fd": "fd_interval", "class_accuracy": "accuracy_interval"}
_INTERVALS["faithfulness"] = _INTERVALS["class_accuracy"]


def _numbers(result: dict[str, Any]) -> Table:
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
        interval = _INTERVALS.get(key)
        theirs = shown(f"{key}_reference", interval and f"{interval}_reference")
        rows.append((key, shown(key, interval), theirs, meaning))
    return Table(("metric", "this model", "float", "what it is"), tuple(rows), words=True)


def _gates(gates: dict[str, bool]) -> str:
    if not gates:
        return ""
    return "; ".join(f"{gate}: {'met' if held else 'NOT met'}" for gate, held in gates.items())
