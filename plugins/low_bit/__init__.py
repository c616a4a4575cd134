"""Linear layers and convolutions of whole-number codes: `LowBitLinear` and `LowBitConv2d`."""
