"""A pipeline whose denoisers were recorded, with the user's call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtq.calls.user_call import UserCall
from trtq.diffusion.pipeline import LoadedPipeline

__all__ = ["RecordedPipeline"]


class RecordedPipeline(LoadedPipeline):
    """A loaded pipeline that is used through its own call only.

    Attributes:
        call: the user's call, as it was recorded.
    """

    def __init__(
        self, name: str, folder: Path | None, pipeline: Any, denoiser_name: str, call: UserCall
    ) -> None:
        super().__init__(name, folder, pipeline, denoiser_name)
        self.call = call
