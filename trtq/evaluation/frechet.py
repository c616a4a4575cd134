"""Fréchet distance between two sets of features (FID's formula, arXiv 1706.08500, eq. 6).

The distance is implemented here rather than taken from torchmetrics, because the reference consists of
stored statistics and the bootstrap interval resamples the features hundreds of times. A test compares
the distance with SciPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtq.errors import NonFiniteError, UsageError
from trtq.seeds import seeded_generator

__all__ = ["Statistics", "bootstrap_interval", "feature_statistics", "frechet_distance"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean `[F]` and covariance `[F,F]` of features, float64."""

    mean: Tensor
    covariance: Tensor


def feature_statistics(features: Tensor) -> Statistics:
    """Mean and unbiased covariance of features[B,F].

    Raises:
        UsageError: there are fewer than two rows.
        NonFiniteError: a feature is NaN or infinite.
    """
    if len(features) < 2:
        raise UsageError(f"a covariance needs at least 2 images, got {len(features)}")
    features = features.double()
    if not bool(torch.isfinite(features).all()):
        raise NonFiniteError("the features of the images contain NaN or infinity")
    return Statistics(features.mean(0), features.T.cov().reshape(features.shape[1], -1))


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`.

    The trace of the root is computed from `(C_a^(1/2) C_b C_a^(1/2))^(1/2)`, which is symmetric, so no
    complex root is needed. The computation is in float64.

    Args:
        a: statistics of the first set of features.
        b: statistics of the second set of features.
    """
    root = _root(a.covariance)
    middle = root @ b.covariance @ root
    trace_of_root = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0).sqrt().sum()
    difference = (a.mean - b.mean).square().sum()
    return float(difference + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root)


def bootstrap_interval(
    features: Tensor, reference: Statistics, *, rounds: int = 200, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the Fréchet distance of features[B,F] to the reference.

    Resampling with replacement biases the distance upwards, more so with fewer images. The interval
    therefore uses the spread of the resampled distances, centred on the value of the original set.

    Args:
        features: features of the images, `[B,F]`.
        reference: statistics of the reference.
        rounds: number of resamplings.
        seed: seed of the resampling.

    Returns:
        Lower and upper bound of the interval.
    """
    value = frechet_distance(feature_statistics(features), reference)
    generator = seeded_generator(seed, "bootstrap")
    resampled = []
    for _ in range(rounds):
        chosen = torch.randint(len(features), (len(features),), generator=generator)
        resampled.append(frechet_distance(feature_statistics(features[chosen]), reference))
    spread = torch.tensor(resampled, dtype=torch.float64)
    spread -= spread.mean()
    low, high = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return max(0.0, value + low), value + high
