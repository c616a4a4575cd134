"""Refusal of artefacts that were recorded inside their pipeline's call."""

from __future__ import annotations

from trtq.artefact.opened import Opened, StoredArtefact
from trtq.errors import UsageError

__all__ = ["is_recorded", "refuse_recorded"]


def is_recorded(opened: Opened) -> bool:
    """Whether an artefact was recorded inside its pipeline's call, and is used through it only."""
    return isinstance(opened, StoredArtefact) and opened.manifest.recorded is not None


def refuse_recorded(opened: Opened, what: str, instead: str) -> None:
    """Raise for an artefact that was recorded inside its pipeline's call.

    Args:
        opened: the artefact.
        what: command or function that does not support such an artefact.
        instead: what the user can do.

    Raises:
        UsageError: the artefact was recorded.
    """
    if is_recorded(opened):
        raise UsageError(
            f"{opened.place} was recorded inside its pipeline's call, which {what} does not support "
            f"yet; {instead}"
        )
