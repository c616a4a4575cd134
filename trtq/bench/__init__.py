"""Benchmarks: timings of artefacts, their comparison, and the device's peak performance."""
