"""Runs: how a run is made, stored, opened and changed."""
