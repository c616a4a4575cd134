"""What a denoiser's prediction says about the clean sample and the noise; for arrays of any kind."""

from __future__ import annotations

from typing import Any

__all__ = ["PREDICTIONS", "clean_and_noise"]

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""The noise; the velocity `signal noise - sigma x_0`; the clean sample; the flow `noise - x_0`."""


def clean_and_noise(
    prediction: str, x: Any, predicted: Any, signal: Any, sigma: Any
) -> tuple[Any, Any]:
    """The clean sample and the noise that a prediction means.

    Args:
        prediction: one of `PREDICTIONS`.
        x: `signal x_0 + sigma noise`, a tensor or a numpy array `[B, ...]`.
        predicted: the denoiser's output at `x`, same shape.
        signal: share of the clean sample, one for all or `[B, 1, ...]`.
        sigma: that of the noise, likewise.

    Returns:
        Two of the shape of `x`.
    """
    if prediction == "epsilon":
        return (x - sigma * predicted) / signal, predicted
    if prediction == "v_prediction":
        return signal * x - sigma * predicted, signal * predicted + sigma * x
    if prediction == "sample":
        return predicted, (x - signal * predicted) / sigma
    return x - sigma * predicted, x + signal * predicted
