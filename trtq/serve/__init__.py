"""An HTTP server for images; requests at different denoising steps share denoiser calls."""
