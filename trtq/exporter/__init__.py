"""torch to ONNX and engines: tracing, export, build and the checks of both."""
