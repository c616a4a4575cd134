"""Fréchet distance between two sets of features (FID's formula, arXiv 1706.08500, eq. 6).

Written here rather than taken from torchmetrics because it is compared with stored statistics of real
images and drawn again hundreds of times for its interval; a test holds it against torchmetrics'.
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
    """features[B,F] -> mean and unbiased covariance.

    Raises:
        UsageError: fewer than two rows.
        NonFiniteError: a feature is NaN or infinite.
    """
    if len(features) < 2:
        raise UsageError(f"a covariance needs at least 2 images, got {len(features)}")
    features = features.double()
    if not bool(torch.isfinite(features).all()):
        raise NonFiniteError("the features of the images hold NaN or infinity")
    return Statistics(features.mean(0), features.T.cov().reshape(features.shape[1], -1))


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`.

    The trace of the root is taken as that of `(C_a^(1/2) C_b C_a^(1/2))^(1/2)`, which is symmetric,
    so no complex root is needed. All in float64.
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

    A set drawn again from itself, with repetitions, lies further from everything than the set does: the
    more so the fewer images. So the spread of the redrawn distances is taken, and centred on the value.
    """
    value = frechet_distance(feature_statistics(features), reference)
    generator = seeded_generator(seed, "bootstrap")
    redrawn = []
    for _ in range(rounds):
        chosen = torch.randint(len(features), (len(features),), generator=generator)
        redrawn.append(frechet_distance(feature_statistics(features[chosen]), reference))
    spread = torch.tensor(redrawn, dtype=torch.float64)
    spread -= spread.mean()
    low, high = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return max(0.0, value + low), value + high
