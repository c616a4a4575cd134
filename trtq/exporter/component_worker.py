"""The parts of a run's pipeline as graphs, made by a process of their own while its denoiser is traced.

Tracing keeps one processor busy, whatever the size of what is traced, so text encoders and autoencoder
cost next to nothing beside the denoiser where there is a second one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq import errors
from trtq.diffusion.folder import denoiser_in, has_parts, load_pipeline_parts, skeleton
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import ArtefactError, TrtqError
from trtq.exporter.component_graphs import export_components
from trtq.processes import last_words, lifeline, processors, was_killed, worker_command
from trtq.progress import silent
from trtq.resources import peak_rss_bytes
from trtq.runs.weights import FILE_NAME

__all__ = ["Parts", "exporting_parts"]

_WORTH_BYTES = 64 << 20
"""Size of a run's denoiser from which on its export takes longer than starting a process."""
_LAST_LINES = 5


@dataclass(frozen=True)
class Parts:
    """What the process did.

    Attributes:
        parity: the SNR of each graph in dB, by folder.
        peak_rss_bytes: its largest resident memory.
    """

    parity: dict[str, float]
    peak_rss_bytes: int


@contextmanager
def exporting_parts(run: Path, folder: Path) -> Iterator[Callable[[], Parts] | None]:
    """Export the parts of a run in the background, inside the block.

    Args:
        run: its folder.
        folder: of the whole pipeline; there until the block ends.

    Yields:
        What waits for the end and gives the outcome; None where that would not pay: a small denoiser, no
        parts, or a single processor. It raises what
        `trtq.exporter.component_graphs.export_components` does, or ArtefactError where the process died.
    """
    stored = run / FILE_NAME
    large = stored.is_file() and stored.stat().st_size >= _WORTH_BYTES
    if not large or processors() < 2 or not has_parts(run):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="trtq-parts-") as scratch:
        answer, said = Path(scratch) / "answer.json", Path(scratch) / "stderr"
        command = worker_command(__name__, run.resolve(), folder.resolve(), answer)
        with lifeline() as stdin:
            with said.open("wb") as stderr:
                process = subprocess.Popen(
                    command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=stderr
                )
            try:
                yield lambda: _outcome(process, answer, said)
            finally:
                process.kill()
                process.wait()


def _outcome(process: subprocess.Popen[bytes], answer: Path, said: Path) -> Parts:
    code = process.wait()
    try:
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ArtefactError(_why_it_died(code, said.read_text(errors="replace"))) from err
    if "error" not in found:
        return Parts(**found)
    if found["error"] == "OSError":
        raise OSError(found["message"])
    raise getattr(errors, found["error"])(found["message"])


def _why_it_died(code: int, said: str) -> str:
    if was_killed(code):
        return (
            "the process that exports text encoders and autoencoder was killed, most likely for want of "
            "memory"
        )
    last = last_words(said, _LAST_LINES)
    return f"exporting text encoders and autoencoder ended with code {code}: {last or 'no message'}"


def _export(run: Path, folder: Path) -> dict[str, Any]:
    """Export the parts; errors that are the user's to know are part of the answer."""
    try:
        name = denoiser_in(run)
        pipeline = load_pipeline_parts(run, name, skeleton(run, name))
        parity = export_components(LoadedPipeline(str(run), run, pipeline, name), folder, silent)
    except TrtqError as err:
        return {"error": type(err).__name__, "message": str(err)}
    except OSError as err:
        return {"error": "OSError", "message": str(err)}
    return {"parity": parity, "peak_rss_bytes": peak_rss_bytes()}


def main() -> int:
    """In the process: a run's folder, the pipeline's and the answer's file; 0 if all is well."""
    run, folder, answer = map(Path, sys.argv[1:4])
    found = _export(run, folder)
    answer.write_text(json.dumps(found), encoding="utf-8")
    return 1 if "error" in found else 0
