"""Random streams that depend on what they are for, and on nothing that ran before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["seeded_generator"]


def seeded_generator(*key: int | str) -> torch.Generator:
    """A torch generator for this key, e.g. `(seed, "noise", image)`; different keys, other streams."""
    import torch

    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
