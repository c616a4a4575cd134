"""Graph rewrites, one per file. Each says whether it changed anything."""

from trtq.export.passes.broadcast_timestep import BroadcastTimestep
from trtq.export.passes.expand_qdq import ExpandLowBitToQdq

__all__ = ["BroadcastTimestep", "ExpandLowBitToQdq"]
