"""Engines: one interface for running graphs on every runtime."""
