"""Quantised weights as ComfyUI stores them: formats, encoding and decoding of single layers."""
