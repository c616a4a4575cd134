"""Cache of the kernels that TensorRT-RTX compiles for the GPU on first use."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from trtq.artefact.files import sha256
from trtq.resources import cache_folder

__all__ = ["RuntimeCache"]

logger = logging.getLogger(__name__)


class RuntimeCache:
    """The compiled kernels of one engine; without a usable cache, kernels are compiled again.

    Args:
        config: runtime configuration of the engine; changed to use the cache.
        engine_file: file of the engine.
    """

    def __init__(self, config: Any, engine_file: Path) -> None:
        self._cache: Any = None
        self._file: Path | None = None
        try:
            self._cache = config.create_runtime_cache()
            self._file = cache_folder("runtime") / f"{sha256(engine_file)}.bin"
            if self._file.is_file():
                self._cache.deserialize(self._file.read_bytes())
            config.set_runtime_cache(self._cache)
        except (OSError, RuntimeError) as err:
            logger.warning("the runtime cache is not used: %s", err)

    def save(self) -> None:
        """Write the kernels to the user's cache if possible, after the first run of new shapes."""
        if self._cache is None or self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Another process may write the same file at this moment.
            handle, name = tempfile.mkstemp(prefix=".partial-", dir=self._file.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(bytes(self._cache.serialize()))
                Path(name).replace(self._file)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as err:
            logger.warning("the runtime cache cannot be kept: %s", err)
            self._file = None
