"""Plots as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trtq._optional import require

__all__ = ["scale_map", "snr_curves"]

_COLOURS = ("#0b6e4f", "#c8553d", "#3b5b92", "#8a6d3b", "#7a4988")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure without pyplot, so nothing global is touched."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def snr_curves(curves: Mapping[str, Sequence[float]], timesteps: Sequence[float]) -> bytes:
    """SNR of the noise prediction over the denoising steps, noisiest on the left.

    Args:
        curves: dB per step, cleanest first, by model.
        timesteps: of the steps, cleanest first.
    """
    figure, axes = _figure(8.5, 3.4)
    for (name, values), colour in zip(curves.items(), _COLOURS * 9, strict=False):
        axes.plot(timesteps, values, marker="o", markersize=3.5, color=colour, label=name)
    axes.invert_xaxis()
    axes.set_xlabel("timestep (noise on the left, image on the right)")
    axes.set_ylabel("SNR against float, dB")
    axes.grid(axis="y", color="#dde3e9")
    axes.legend(frameon=False)
    return _png(figure)


def scale_map(tables: Mapping[str, Sequence[float]], timesteps: Sequence[float]) -> bytes:
    """Activation scales, layers down and steps across, each relative to the layer's mean over steps.

    Args:
        tables: the scale at each step, cleanest first, by layer.
        timesteps: of the steps, cleanest first.
    """
    rows = np.array([list(values)[::-1] for values in tables.values()])
    relative = np.log2(rows / rows.mean(axis=1, keepdims=True))
    figure, axes = _figure(8.5, 1.2 + 0.155 * len(rows))
    bound = float(np.abs(relative).max()) or 1.0
    shown = axes.imshow(relative, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_yticks(range(len(tables)), list(tables), fontsize=6)
    axes.set_xticks(range(len(timesteps)), [f"{t:g}" for t in reversed(timesteps)], fontsize=7)
    axes.set_xlabel("timestep")
    figure.colorbar(shown, ax=axes, label="log2 of scale over the layer's mean", shrink=0.6)
    return _png(figure)
