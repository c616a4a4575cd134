"""Rewrites and rules for individual runtimes, applied when a graph is opened or built."""
