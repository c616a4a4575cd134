"""Keeping diffusers and transformers off standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_diffusers"]


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Inside the block there are no progress bars and no warnings of diffusers and transformers."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    libraries = (ours, theirs)
    shown = [log for log in libraries if log.is_progress_bar_enabled()]
    levels = [log.get_verbosity() for log in libraries]
    for log in libraries:
        log.set_verbosity_error()
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(libraries, levels, strict=True):
            log.set_verbosity(level)
        for log in shown:
            log.enable_progress_bar()
