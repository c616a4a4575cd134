"""Whether a checkpoint is quantised with its weights in their files, for a limited memory."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from trtq.artefact.opened import Opened
from trtq.calib.recipe import Recipe
from trtq.checkpoint.resolve import resolve_model
from trtq.checkpoint.stored_models import float_bytes
from trtq.documents import shown
from trtq.errors import ArtefactError, UsageError
from trtq.resources import available_bytes

__all__ = ["parse_memory", "stores_weights"]

logger = logging.getLogger(__name__)

_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
_SHARE = 0.5
"""Share of the user's limit that float32 weights may take; the rest is for integers and activations."""
_SHARE_AVAILABLE = 0.8
"""The same for the available memory, where weights in their files are a last resort: the run is recorded
inside the pipeline's call, and its server answers by request."""


def parse_memory(text: str) -> int:
    """Parse an amount of memory, e.g. `24GB` or `16GiB`, to bytes.

    Raises:
        UsageError: the text is no amount of memory.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*([MG]I?B)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(
            f"--memory {shown(text)} is no amount of memory; write e.g. 24GB, 16GiB or 800MB"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def stores_weights(model: Any, recipe: Recipe, memory: int | None) -> bool:
    """Whether large weights stay in their files until a layer uses them.

    Args:
        model: a checkpoint, see `trtq.runs.quantize.quantize`.
        recipe: the recipe.
        memory: maximum memory in bytes; None: the memory that is available now.

    Raises:
        UsageError: the weights exceed the given memory, and the recipe needs all of them in memory.
    """
    limit = memory or available_bytes()
    place = model.place if isinstance(model, Opened) else model
    if not limit or not isinstance(place, str | Path):
        return False
    try:
        folder = resolve_model(place)
        needed = float_bytes(folder) if isinstance(folder, Path) and folder.is_dir() else 0
    except ArtefactError:
        # Loading reports it.
        return False
    if needed <= limit * (_SHARE_AVAILABLE if memory is None else _SHARE):
        return False
    obstacle = _obstacle(recipe)
    if obstacle is None:
        logger.log(
            logging.WARNING if memory is None else logging.INFO,
            "the weights take %s in float32, and %s of memory may be used: layers read their "
            "weights from the files, and the calibration runs inside the pipeline's call",
            _text(needed),
            _text(limit),
        )
        return True
    if memory is not None:
        raise UsageError(
            f"the weights of {place} take {_text(needed)} in float32, more than half of the "
            f"{_text(limit)} of --memory, and {obstacle}"
        )
    return False


def _text(number: int) -> str:
    """A number of bytes for a person."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _obstacle(recipe: Recipe) -> str | None:
    """What needs all weights in memory, as the end of an error message; None: nothing does."""
    if recipe.training is not None and recipe.blockwise is None:
        return (
            f"the method {recipe.method!r} fine-tunes all of them in memory; choose --method search, "
            "add --blockwise, or allow more memory"
        )
    if recipe.blockwise is not None and recipe.blockwise.whole_iterations:
        return (
            "blockwise.whole_iterations trains all of them in memory; leave it out, or allow more"
        )
    if recipe.training is not None and (recipe.training.rank == 0 or recipe.training.base == "int"):
        return (
            f"the method {recipe.method!r} without adapters on float weights keeps copies of them in "
            "memory; choose --method efficientdm or combined, or allow more memory"
        )
    if recipe.budget is not None:
        return "--budget changes them in memory; leave it out, or allow more memory"
    if recipe.split_skips:
        return "split_skips copies them in memory; leave it out, or allow more memory"
    return None
