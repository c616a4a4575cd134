"""Timings: how they are taken, what they are compared with, and what the device could do."""
