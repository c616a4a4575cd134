"""Runs: making, storing, opening and changing them."""
