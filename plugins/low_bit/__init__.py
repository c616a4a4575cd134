"""Linear layers and convolutions of integer codes: `LowBitLinear` and `LowBitConv2d`."""
