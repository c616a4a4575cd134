"""Export of a run's text encoders and autoencoder in a second process while the denoiser is traced.

Tracing keeps only one processor busy, so on a second processor text encoders and autoencoder add almost
nothing to the time of the denoiser.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.child import error_record, write_answer
from trtq.diffusion.folder import denoiser_in, has_parts, load_pipeline_parts, skeleton
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import ArtefactError, TrtqError
from trtq.exporter.component_graphs import export_components
from trtq.processes import Child, ChildDiedError
from trtq.processor import processors
from trtq.progress import silent
from trtq.resources import peak_rss_bytes
from trtq.runs.weights import FILE_NAME

__all__ = ["Parts", "exporting_parts"]

_WORTH_BYTES = 64 << 20
"""Minimum size of a run's denoiser, in bytes, whose export takes longer than starting a process."""


@dataclass(frozen=True)
class Parts:
    """Result of the second process.

    Attributes:
        parity: SNR of each graph in dB, by folder.
        peak_rss_bytes: peak resident memory of the process, in bytes.
    """

    parity: dict[str, float]
    peak_rss_bytes: int


@contextmanager
def exporting_parts(run: Path, folder: Path) -> Iterator[Callable[[], Parts] | None]:
    """Export text encoders and autoencoder of a run in the background, inside the block.

    Args:
        run: folder of the run.
        folder: folder of the exported pipeline; must exist until the block ends.

    Yields:
        A function that waits for the process and returns the result; None if a process would save no
        time: a small denoiser, no such components, or a single processor. The function raises the errors
        of `trtq.exporter.component_graphs.export_components`, or ArtefactError if the process died.
    """
    stored = run / FILE_NAME
    large = stored.is_file() and stored.stat().st_size >= _WORTH_BYTES
    if not large or processors() < 2 or not has_parts(run):
        yield None
        return
    with Child(__name__, run.resolve(), folder.resolve()) as child:
        yield lambda: _outcome(child)


def _outcome(child: Child) -> Parts:
    try:
        return Parts(**child.answer())
    except ChildDiedError as err:
        process = "the process that exports text encoders and autoencoder"
        raise ArtefactError(err.exit.explain(process)) from err


def _export(run: Path, folder: Path) -> dict[str, Any]:
    """Export the components; errors of trtq and of the file system are part of the answer."""
    try:
        name = denoiser_in(run)
        pipeline = load_pipeline_parts(run, {name: skeleton(run, name)})
        parity = export_components(LoadedPipeline(str(run), run, pipeline, name), folder, silent)
    except (TrtqError, OSError) as err:
        return error_record(err)
    return {"parity": parity, "peak_rss_bytes": peak_rss_bytes()}


def main() -> int:
    """Run in the process; arguments: the run's and the pipeline's folder, and the answer's file."""
    run, folder, answer_file = map(Path, sys.argv[1:4])
    answer = _export(run, folder)
    write_answer(answer_file, answer)
    return 1 if "raised" in answer else 0
