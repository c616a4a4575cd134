"""NVIDIA Triton Inference Server: packaging, and the Python backend that serves a package."""
