"""Serving images over HTTP, requests at different denoising steps in one call of the denoiser."""
