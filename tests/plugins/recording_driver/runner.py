"""For child processes with the recording driver: kernels that run as PTX."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.plugins.ptx import Builder
from tests.plugins.recording_driver import image
from trtq.plugins import device as devices
from trtq.plugins.compile import ptx
from trtq.plugins.variants import Variant
from trtq.selftest.loading import Listed, listed

__all__ = ["run_ptx"]


def run_ptx() -> None:
    """The process loads images that name translated PTX in place of cubins.

    The variable `RECORDING_BUILDS` names the folder for builds. Stage 1 of `trtq selftest` only loads,
    so its images name no PTX. All images have the properties of the table in `trtq.selftest`, changed by
    the variable `RECORDING_PROPERTIES`, e.g. `1,0,0,0` for a register more.
    """
    builder = Builder(Path(os.environ["RECORDING_BUILDS"]))
    changes = [int(text) for text in os.environ.get("RECORDING_PROPERTIES", "0,0,0,0").split(",")]

    def cubin(variant: Variant, architecture: str) -> bytes:
        row = listed()[1].get(architecture, {}).get(str(variant), Listed(32, 0, 0, 1))
        static = row.shared_bytes - variant.shared_bytes
        taken = (row.registers, row.local_bytes, static, row.blocks)
        properties = [value + change for value, change in zip(taken, changes, strict=True)]
        if len(sys.argv) > 1 and '"stage": 1,' in sys.argv[1]:
            return image(variant.kernel, architecture, properties=properties)
        library = builder.library(ptx(variant, architecture).decode())
        return image(variant.kernel, architecture, library, properties)

    devices.cubin = cubin  # type: ignore[attr-defined]
