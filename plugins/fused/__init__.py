"""The layer with the operators before and after it, as one plugin of TensorRT."""
