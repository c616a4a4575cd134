"""Tiny random pipelines of diffusers' true classes, with a user's call each."""

from __future__ import annotations

from tests.calls.zoo import images, recent, stable_diffusion, videos
from tests.calls.zoo.case import Case

__all__ = ["ZOO", "Case"]

ZOO: dict[str, Case] = {
    **stable_diffusion.CASES,
    **images.CASES,
    **recent.CASES,
    **videos.CASES,
}
