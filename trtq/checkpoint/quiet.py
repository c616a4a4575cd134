"""Suppress the output of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_diffusers"]


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Suppress progress bars and warnings of diffusers and transformers inside the block."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    libraries = (diffusers_log, transformers_log)
    with_bar = [log for log in libraries if log.is_progress_bar_enabled()]
    levels = [log.get_verbosity() for log in libraries]
    for log in libraries:
        log.set_verbosity_error()
    for log in with_bar:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(libraries, levels, strict=True):
            log.set_verbosity(level)
        for log in with_bar:
            log.enable_progress_bar()
