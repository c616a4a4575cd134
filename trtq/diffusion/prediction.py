"""Clean sample and noise from a denoiser's prediction, for tensors and numpy arrays."""

from __future__ import annotations

from typing import Any

__all__ = ["PREDICTIONS", "clean_and_noise"]

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""Kinds of predictions: noise; velocity `signal noise - sigma x_0`; clean sample; flow `noise - x_0`."""


def clean_and_noise(
    prediction: str, x: Any, predicted: Any, signal: Any, sigma: Any
) -> tuple[Any, Any]:
    """The clean sample and the noise implied by a prediction.

    Args:
        prediction: one of `PREDICTIONS`.
        x: noisy sample `signal x_0 + sigma noise`, `[B, ...]`.
        predicted: denoiser output at `x`, `[B, ...]`.
        signal: factor of the clean sample in `x`, a scalar or `[B, 1, ...]`.
        sigma: factor of the noise in `x`, a scalar or `[B, 1, ...]`.

    Returns:
        Clean sample and noise, `[B, ...]` each.
    """
    if prediction == "epsilon":
        return (x - sigma * predicted) / signal, predicted
    if prediction == "v_prediction":
        return signal * x - sigma * predicted, signal * predicted + sigma * x
    if prediction == "sample":
        return predicted, (x - signal * predicted) / sigma
    return x - sigma * predicted, x + signal * predicted
