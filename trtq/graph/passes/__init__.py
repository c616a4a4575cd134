"""Graph rewrites, one per file. Each says whether it changed anything."""

from trtq.graph.passes.broadcast_timestep import BroadcastTimestep
from trtq.graph.passes.decompose_group_norm import SpellOutGroupNorm
from trtq.graph.passes.decompose_silu import SpellOutSilu
from trtq.graph.passes.decompose_timestep_embedding import SpellOutAngles
from trtq.graph.passes.drop_noop_squeeze import DropIdleSqueeze
from trtq.graph.passes.layer_norm_in_float64 import WidenLayerNorm
from trtq.graph.passes.low_bit_to_qdq import ExpandLowBitToQdq
from trtq.graph.passes.plugin_nodes import ExpandPlugins, LowBitToPlugins
from trtq.graph.runtimes.break_uniform_scales import UnevenScales
from trtq.graph.runtimes.casts_to_qdq import PairCastCodes
from trtq.graph.runtimes.float64_to_float32 import NarrowDoubles
from trtq.graph.runtimes.fuse_group_norm import FuseGroupNorm
from trtq.graph.runtimes.int4_to_int8 import WidenInt4
from trtq.graph.runtimes.matmul_to_conv import LinearAsConv
from trtq.graph.runtimes.wide_products_to_float import FloatWideProducts
from trtq.graph.runtimes.wide_weights_to_float import FloatWideWeights

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
