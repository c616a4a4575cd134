"""Graph rewrites, one per file. Each rewrite reports whether it changed the graph."""

from trtq.graph.passes.broadcast_timestep import BroadcastTimestep
from trtq.graph.passes.decompose_group_norm import DecomposeGroupNorm
from trtq.graph.passes.decompose_silu import DecomposeSilu
from trtq.graph.passes.decompose_timestep_embedding import DecomposeTimestepEmbedding
from trtq.graph.passes.drop_noop_squeeze import DropNoopSqueeze
from trtq.graph.passes.layer_norm_in_float64 import CastLayerNormToFloat64
from trtq.graph.passes.low_bit_to_qdq import ExpandLowBitToQdq
from trtq.graph.passes.plugin_nodes import ExpandPlugins, LowBitToPlugins
from trtq.graph.runtimes.break_uniform_scales import BreakUniformScales
from trtq.graph.runtimes.casts_to_qdq import CastsToQdq
from trtq.graph.runtimes.float64_to_float32 import CastFloat64ToFloat32
from trtq.graph.runtimes.fuse_group_norm import FuseGroupNorm
from trtq.graph.runtimes.int4_to_int8 import CastInt4ToInt8
from trtq.graph.runtimes.matmul_to_conv import MatMulToConv
from trtq.graph.runtimes.wide_products_to_float import WideProductsToFloat
from trtq.graph.runtimes.wide_weights_to_float import WideWeightsToFloat

__all__ = [
    "BreakUniformScales",
    "BroadcastTimestep",
    "CastFloat64ToFloat32",
    "CastInt4ToInt8",
    "CastLayerNormToFloat64",
    "CastsToQdq",
    "DecomposeGroupNorm",
    "DecomposeSilu",
    "DecomposeTimestepEmbedding",
    "DropNoopSqueeze",
    "ExpandLowBitToQdq",
    "ExpandPlugins",
    "FuseGroupNorm",
    "LowBitToPlugins",
    "MatMulToConv",
    "WideProductsToFloat",
    "WideWeightsToFloat",
]
