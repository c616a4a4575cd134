"""Comparison of any two artefacts by polygraphy, at the real inputs of every denoising step."""
