"""Fréchet distance between two sets of features (FID's formula, arXiv 1706.08500, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from trtq.errors import NonFiniteError, UsageError

__all__ = ["feature_statistics", "frechet_distance"]


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """features[B,F] -> mean[F] and unbiased covariance[F,F], float64.

    Raises:
        UsageError: fewer than two rows.
        NonFiniteError: a feature is NaN or infinite.
    """
    if len(features) < 2:
        raise UsageError(f"a covariance needs at least 2 images, got {len(features)}")
    features = features.double()
    if not bool(torch.isfinite(features).all()):
        raise NonFiniteError("the features of the images hold NaN or infinity")
    return features.mean(0), features.T.cov()


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`.

    The trace of the root is taken as that of `(C_a^(1/2) C_b C_a^(1/2))^(1/2)`, which is symmetric,
    so no complex root is needed. All in float64.
    """
    root_a = _root(covariance_a.double())
    middle = root_a @ covariance_b.double() @ root_a
    trace_of_root = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0).sqrt().sum()
    difference = (mean_a - mean_b).double().square().sum()
    traces = covariance_a.double().trace() + covariance_b.double().trace()
    return float(difference + traces - 2 * trace_of_root)
