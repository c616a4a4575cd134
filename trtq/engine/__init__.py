"""Engines: one interface to run a graph on every runtime."""
