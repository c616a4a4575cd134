"""Graph rewrites, one per file. Each says whether it changed anything."""

from trtq.export.passes.angles import SpellOutAngles
from trtq.export.passes.broadcast_timestep import BroadcastTimestep
from trtq.export.passes.expand_qdq import ExpandLowBitToQdq
from trtq.export.passes.float_wide_products import FloatWideProducts
from trtq.export.passes.float_wide_weights import FloatWideWeights
from trtq.export.passes.fuse_group_norm import FuseGroupNorm
from trtq.export.passes.group_norm import SpellOutGroupNorm
from trtq.export.passes.idle_squeeze import DropIdleSqueeze
from trtq.export.passes.layer_norm import WidenLayerNorm
from trtq.export.passes.linear_as_conv import LinearAsConv
from trtq.export.passes.narrow_doubles import NarrowDoubles
from trtq.export.passes.pair_cast_codes import PairCastCodes
from trtq.export.passes.plugins import ExpandPlugins, LowBitToPlugins
from trtq.export.passes.silu import SpellOutSilu
from trtq.export.passes.uneven_scales import UnevenScales
from trtq.export.passes.widen_int4 import WidenInt4

__all__ = [
    "BroadcastTimestep",
    "DropIdleSqueeze",
    "ExpandLowBitToQdq",
    "ExpandPlugins",
    "FloatWideProducts",
    "FloatWideWeights",
    "FuseGroupNorm",
    "LinearAsConv",
    "LowBitToPlugins",
    "NarrowDoubles",
    "PairCastCodes",
    "SpellOutAngles",
    "SpellOutGroupNorm",
    "SpellOutSilu",
    "UnevenScales",
    "WidenInt4",
    "WidenLayerNorm",
]
