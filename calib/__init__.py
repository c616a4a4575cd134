"""Trajectories, recordings, ranges, policies, recipes."""
