"""Graph rewrites that the export uses, one per file. Each reports whether it changed the graph."""

from trtq.graph.passes.boolean_where import BooleanWhere
from trtq.graph.passes.broadcast_timestep import BroadcastTimestep
from trtq.graph.passes.decompose_group_norm import DecomposeGroupNorm
from trtq.graph.passes.decompose_silu import DecomposeSilu
from trtq.graph.passes.decompose_timestep_embedding import DecomposeTimestepEmbedding
from trtq.graph.passes.drop_noop_arithmetic import DropNoopArithmetic
from trtq.graph.passes.drop_noop_squeeze import DropNoopSqueeze
from trtq.graph.passes.layer_norm_in_float64 import CastLayerNormToFloat64
from trtq.graph.passes.low_bit_to_qdq import ExpandLowBitToQdq
from trtq.graph.passes.plugin_nodes import ExpandPlugins, LowBitToPlugins
from trtq.graph.passes.step_lookup import StepInput
from trtq.graph.passes.wide_indices import CastIndicesToInt64

__all__ = [
    "BooleanWhere",
    "BroadcastTimestep",
    "CastIndicesToInt64",
    "CastLayerNormToFloat64",
    "DecomposeGroupNorm",
    "DecomposeSilu",
    "DecomposeTimestepEmbedding",
    "DropNoopArithmetic",
    "DropNoopSqueeze",
    "ExpandLowBitToQdq",
    "ExpandPlugins",
    "LowBitToPlugins",
    "StepInput",
]
