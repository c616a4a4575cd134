"""Threads of a CUDA block as fibers: the part that both ways to run kernels on a CPU share."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Folder with fibers.h, for the compiler's include path."""
