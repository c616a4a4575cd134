"""For child processes with the recording driver: kernels that run as PTX."""

from __future__ import annotations

import os
from pathlib import Path

from tests.plugins.ptx import Builder
from tests.plugins.recording_driver import image
from trtq.plugins import device as devices
from trtq.plugins.compile import ptx
from trtq.plugins.variants import Variant

__all__ = ["run_ptx"]


def run_ptx() -> None:
    """The process loads images that name translated PTX in place of cubins.

    The variable `RECORDING_BUILDS` names the folder for builds.
    """
    builder = Builder(Path(os.environ["RECORDING_BUILDS"]))

    def cubin(variant: Variant, architecture: str) -> bytes:
        library = builder.library(ptx(variant, architecture).decode())
        return image(variant.kernel, architecture, library)

    devices.cubin = cubin  # type: ignore[attr-defined]
