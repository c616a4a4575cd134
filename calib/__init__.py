"""Calibration: policies, recipes, recordings along trajectories, and sensitivities."""
