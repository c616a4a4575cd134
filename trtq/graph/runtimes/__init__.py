"""Rewrites and rules for single runtimes, applied when a graph is opened or built."""
