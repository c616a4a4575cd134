"""Imported by every Python process with this folder on its path: kernels run as PTX on the CPU."""

from tests.plugins.recording_driver.runner import run_ptx

run_ptx()
