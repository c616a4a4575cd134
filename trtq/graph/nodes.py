"""Names of the nodes that represent low-bit layers, see `trtq.exporter.trace`."""

__all__ = ["DOMAIN", "LOW_BIT_OPERATORS"]

DOMAIN = "trtq"
LOW_BIT_OPERATORS = ("LowBitLinear", "LowBitConv2d", "LowBitMatMul")
