"""Checkpoints: what their files and folders hold, checked and read into a pipeline of diffusers."""
