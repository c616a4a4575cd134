"""Graphs and engines as polygraphy's inspector shows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from trtq._optional import require
from trtq.errors import ArtefactError
from trtq.graph.file import ENGINE_FILE

__all__ = ["graph_view"]

_MAIN = "import sys; from polygraphy.tools import main; sys.exit(main())"
_PREFIX = re.compile(r"^\[[A-Z!]\] ")
_SECONDS = 300


def graph_view(file: Path, backend: str | None = None) -> str:
    """What `polygraphy inspect model FILE` prints: inputs, outputs and numbers of nodes.

    Args:
        file: file of a graph or an engine.
        backend: builder of an engine; None for a graph.

    Returns:
        Polygraphy's text without its log prefixes.

    Raises:
        MissingDependencyError: polygraphy is not installed.
        ArtefactError: polygraphy cannot read the file.
    """
    require("polygraphy")
    words = [sys.executable, "-c", _MAIN, "inspect", "model", str(file)]
    environment = dict(os.environ)
    if file.name == ENGINE_FILE:
        words += ["--model-type", "engine"]
        # Polygraphy takes the bindings of TensorRT-RTX only by this variable.
        environment["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(backend == "tensorrt-rtx"))
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise ArtefactError(f"polygraphy took more than {_SECONDS} s to read {file}") from err
    output = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        lines = (output + done.stderr.decode("utf-8", "replace")).split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), "it gave no reason")
        raise ArtefactError(f"polygraphy cannot read {file}: {' '.join(reason.split())[:400]}")
    kept = [
        _PREFIX.sub("", line)
        for line in output.splitlines()
        if not line.startswith(("[W]", "[I] Loading"))
    ]
    return "\n".join(kept).strip()
