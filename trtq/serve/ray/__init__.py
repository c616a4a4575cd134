"""The server on Ray Serve; `trtq.serve.ray:app` is the public import path."""

from __future__ import annotations

from trtq.serve.ray.deployment import app

__all__ = ["app"]
