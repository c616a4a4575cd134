"""Plots of reports, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trtq._optional import require

__all__ = [
    "latency_boxes",
    "model_colours",
    "roofline_plot",
    "scale_map",
    "snr_curves",
    "throughput_curves",
]

# Distinguishable on light and dark pages, and with red-green colour blindness.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b58900",
    "#cc79a7",
    "#7a5195",
    "#4a8fc7",
    "#8c564b",
    "#6b8e23",
    "#708090",
)


def model_colours(names: Iterable[str]) -> dict[str, str]:
    """Assign a colour to each model of a page: `#rrggbb` by name, in the given order.

    Colours repeat after ten names.
    """
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Create a figure without pyplot, which would change global state."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _text(label: str) -> str:
    """Escape a label: matplotlib typesets `$...$` and hides labels that start with `_`."""
    plain = label.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def snr_curves(
    curves: Mapping[str, Sequence[float]],
    timesteps: Sequence[float],
    colours: Mapping[str, str],
) -> bytes:
    """Plot the SNR of the noise prediction over the denoising steps, noisiest step on the left.

    Args:
        curves: SNR in dB per step, cleanest step first, by model.
        timesteps: timestep of each step, cleanest step first.
        colours: colour by model, see `model_colours`.
    """
    figure, axes = _figure(8.5, 3.4)
    for name, values in curves.items():
        style = {"marker": "o", "markersize": 3.5, "color": colours[name], "label": _text(name)}
        axes.plot(timesteps, values, **style)
    axes.invert_xaxis()
    axes.set_xlabel("timestep (noise on the left, image on the right)")
    axes.set_ylabel("SNR relative to float, dB")
    axes.grid(axis="y", color="#dde3e9")
    axes.legend(frameon=False)
    return _png(figure)


def scale_map(tables: Mapping[str, Sequence[float]], timesteps: Sequence[float]) -> bytes:
    """Plot activation scales relative to each layer's mean: one line per layer, one column per step.

    Args:
        tables: scale at each step, cleanest step first, by layer.
        timesteps: timestep of each step, cleanest step first.
    """
    rows = np.array([list(values)[::-1] for values in tables.values()])
    relative = np.log2(rows / rows.mean(axis=1, keepdims=True))
    figure, axes = _figure(8.5, 1.2 + 0.155 * len(rows))
    bound = float(np.abs(relative).max()) or 1.0
    shown = axes.imshow(relative, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_yticks(range(len(tables)), [_text(name) for name in tables], fontsize=6)
    axes.set_xticks(range(len(timesteps)), [f"{t:g}" for t in reversed(timesteps)], fontsize=7)
    axes.set_xlabel("timestep")
    figure.colorbar(shown, ax=axes, label="log2(scale / mean scale of the layer)", shrink=0.6)
    return _png(figure)


def latency_boxes(rows: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> bytes:
    """Plot the duration of a call: box from first to third quartile, whisker to the 90th percentile.

    Args:
        rows: `p50`, `q1`, `q3` and `p90` of the duration in milliseconds, by label.
        colours: colour by label, see `model_colours`.
    """
    figure, axes = _figure(8.5, 0.9 + 0.42 * len(rows))
    boxes = [
        {"label": _text(label), "med": row["p50"], "q1": row["q1"], "q3": row["q3"]}
        | {"whislo": row["q1"], "whishi": row["p90"]}
        for label, row in rows.items()
    ]
    drawn = axes.bxp(boxes, orientation="horizontal", showfliers=False, patch_artist=True)
    for box, label in zip(drawn["boxes"], rows, strict=True):
        box.set(facecolor=colours[label], alpha=0.65)
    for median in drawn["medians"]:
        median.set(color="#1d2733")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("ms (lower is better)")
    axes.grid(axis="x", color="#dde3e9")
    return _png(figure)


def throughput_curves(
    curves: Mapping[str, Mapping[int, float]], colours: Mapping[str, str]
) -> bytes:
    """Plot images per second over the batch size.

    Args:
        curves: images per second by batch size, by label.
        colours: colour by label, see `model_colours`.
    """
    figure, axes = _figure(8.5, 3.2)
    for label, values in curves.items():
        style = {"marker": "o", "color": colours[label], "label": _text(label)}
        axes.plot(list(values), list(values.values()), **style)
    axes.set_xticks(sorted({batch for values in curves.values() for batch in values}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    axes.grid(axis="y", color="#dde3e9")
    axes.legend(frameon=False)
    return _png(figure)


def roofline_plot(rows: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> bytes:
    """Plot operations per second over operations per byte of weights, with the device's roofline.

    Args:
        rows: result of `trtq.bench.cost.roofline` by label; peaks may differ between rows.
        colours: colour by label, see `model_colours`.
    """
    figure, axes = _figure(8.5, 3.6)
    places = [row["operations_per_byte"] for row in rows.values()]
    span = np.geomspace(min(places) / 8, max(places) * 8, 100)
    roofs = {
        (row["peak_operations_per_second"], row["peak_bytes_per_second"]) for row in rows.values()
    }
    for operations, transferred in sorted(roofs):
        axes.plot(span, np.minimum(operations, span * transferred) / 1e9, color="#5b6875")
    for label, row in rows.items():
        rate = row["operations_per_second"] / 1e9
        axes.plot(row["operations_per_byte"], rate, "o", color=colours[label], label=_text(label))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("10⁹ operations per second")
    axes.grid(color="#dde3e9")
    axes.legend(frameon=False)
    return _png(figure)
