"""Trajectories, recordings, policies and recipes: what is calibrated, and how."""
