"""Low-rank help for fine-tuning: a float branch that decays to nothing, and a start of the adapters.

    W~ = Q_w(W) + (L diag(u)) R        L R: best rank-r approximation of W - Q_w(W) at the start

QVGen (arXiv 2505.11497): the branch carries what the codes cannot hold while the other parameters adapt.
It decays in cycles. In each cycle the weights `u` of the weaker half of the directions fall from 1 to 0
as `(1 + cos(pi p)) / 2`, with the progress `p` of the cycle; then the stronger half is sorted by its
singular values and halved again, until no direction is left. The deployed weight is `Q_w(W)`.

Letters: N out features or channels; r rank; K values per output channel of the weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trtq.quant.modules import QuantLayer

__all__ = ["DecayingBranch", "branch_weights", "cycles_of", "start_adapters"]


def cycles_of(rank: int) -> int:
    """Number of cycles until a branch of this rank is gone: 6 for 32 (32, 16, 8, 4, 2, 1)."""
    return rank.bit_length() if rank else 0


def branch_weights(rank: int, iteration: int, iterations: int) -> Tensor:
    """Weights `u` of the directions, strongest first, float32 `[r]`.

    Args:
        rank: rank r of the branch.
        iteration: index of the update.
        iterations: number of updates after which the branch is gone.
    """
    weights = torch.zeros(rank)
    if iteration >= iterations:
        return weights
    cycle, progress = _place(rank, iteration, iterations)
    weights[: rank >> (cycle + 1)] = 1
    weights[rank >> (cycle + 1) : rank >> cycle] = (1 + math.cos(math.pi * progress)) / 2
    return weights


def _place(rank: int, iteration: int, iterations: int) -> tuple[int, float]:
    """Index of the cycle and progress in it."""
    place = iteration * cycles_of(rank) / iterations
    return int(place), place % 1


class DecayingBranch(nn.Module):
    """The branch of one layer.

    Args:
        error: what the codes do not hold, `W - Q_w(W)`, `[N, ...]`.
        rank: maximum rank r.

    Attributes:
        left: parameter `L`, float32 `[N, r]`.
        right: parameter `R`, float32 `[r, K]`.
        weights: weights `u`, `[r]`; not saved, since the iteration determines them.
    """

    weights: Tensor

    def __init__(self, error: Tensor, rank: int) -> None:
        super().__init__()
        matrix = error.detach().float().flatten(1)
        rank = min(rank, *matrix.shape)
        self._shape = error.shape
        left, right = _factors(matrix, rank)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.register_buffer("weights", torch.ones_like(left[0]), persistent=False)

    def forward(self) -> Tensor:
        """The branch's share of the weight, shaped like the weight."""
        return ((self.left * self.weights) @ self.right).reshape(self._shape)

    @torch.no_grad()
    def decay(self, iteration: int, iterations: int) -> None:
        """Set the weights for an update; at the start of a cycle, sort the directions.

        Whether a cycle starts depends on the iteration alone, so a resumed run computes the same.

        Args:
            iteration: index of the update.
            iterations: number of updates after which the branch is gone.
        """
        rank = len(self.weights)
        cycle = _place(rank, iteration, iterations)[0]
        if 0 < iteration < iterations and cycle != _place(rank, iteration - 1, iterations)[0]:
            kept = branch_weights(rank, iteration, iterations) > 0
            left, right = _factors((self.left * kept) @ self.right, rank)
            self.left.copy_(left)
            self.right.copy_(right)
        self.weights.copy_(branch_weights(rank, iteration, iterations))


@torch.no_grad()
def start_adapters(layer: QuantLayer) -> None:
    """Set a layer's adapters to the best low-rank approximation of what its codes do not hold, in place.

    LoftQ's and SVDQuant's start (arXiv 2310.08659 and 2411.05007), with `B A` inside of the quantiser.
    Directions beyond those of the weight keep their start.

    Args:
        layer: quantised layer; nothing happens without adapters.
    """
    if layer.lora_A is None or layer.lora_B is None:
        return
    error = (layer.updated_weight() - layer.quantized_weight()).flatten(1)
    rank = min(layer.rank, *error.shape)
    left, right = _factors(error, rank)
    # Adam moves both factors by the same amount, so `A` keeps the size that it starts with.
    size = layer.lora_A[:rank].norm() / right.norm().clamp_min(1e-12)
    layer.lora_A[:rank] = (right * size).reshape(layer.lora_A[:rank].shape)
    layer.lora_B[:, :rank] = (left / size).reshape(layer.lora_B[:, :rank].shape)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`U S^(1/2)` and `S^(1/2) V^T` of the strongest directions, `[N, r]` and `[r, K]`."""
    left, strength, right = torch.linalg.svd(matrix, full_matrices=False)
    root = strength[:rank].sqrt()
    factors = left[:, :rank] * root, root[:, None] * right[:rank]
    # LAPACK's matrices are column by column; files hold rows.
    return factors[0].contiguous(), factors[1].contiguous()
