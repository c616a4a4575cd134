"""ONNX graphs: files, node names and rewrites."""
