"""From torch to ONNX and engines: tracing, export, build, and checks of the results."""
