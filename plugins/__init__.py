"""Custom kernels, one folder each; none so far."""
