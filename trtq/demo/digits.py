"""The whole path on the digits model, and a report of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.artefact.folder import check_output, claimed, claims_output, owned_by_trtq
from trtq.artefact.listing import write_listing
from trtq.artefact.partial import remove_partial
from trtq.engine.ort import available_providers
from trtq.errors import TrtqError, UsageError
from trtq.evaluation.evaluate import Evaluation, ReferenceSet, draw_reference, evaluate
from trtq.evaluation.page import FLOAT, grid_section, layer_sections, snr_section
from trtq.exporter.export import export
from trtq.pipelines.draw import contact_sheet, save_png
from trtq.progress import ProgressCallback, silent
from trtq.report.folder import check_report_folder, write_report
from trtq.report.page import Page, Section, Table
from trtq.report.plots import model_colours
from trtq.runs.quantize import quantize
from trtq.runs.result import RunResult

__all__ = ["demo"]

MODEL = "digits"
STEPS = 20
REPORT = "report"
SHEET = "digits.png"
_KIND, _REPORT_KIND = "demo", "demo report"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """One low-bit model of the demonstration."""

    name: str
    folder: str
    recipe: dict[str, Any]


def _entries(iterations: int, seed: int) -> tuple[_Entry, ...]:
    static = {"method": "search", "bits": "w4a4", "tables": "static", "seed": seed}
    tuned = {"method": "efficientdm", "bits": "w4a4", "seed": seed}
    return (
        _Entry("W4A4 post-training, one scale", "static", static),
        _Entry(
            "W4A4 fine-tuned, a scale per step",
            "efficientdm",
            tuned | {"training": {"iterations": iterations}},
        ),
    )


@claims_output
def demo(
    out: str | Path,
    *,
    images: int = 500,
    iterations: int = 350,
    provider: str = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> dict[str, Any]:
    """Quantise to W4A4, export, draw, evaluate, and write an HTML report.

    Args:
        out: folder for runs, ONNX folders, `digits.png` and `report/index.html`.
        images: drawn with each model.
        iterations: of the fine-tuning.
        provider: what runs the ONNX folders.
        seed: of everything.
        overwrite: replace what is there.
        progress: called with the stage's name, the work done and the total.

    Returns:
        `rows` (one per model: `name`, `fd`, `fd_interval`, `class_accuracy`, `accuracy_interval`,
        `snr_db`, `bytes`), `seconds`, `report`.

    Raises:
        TrtqError: see `trtq.errors`.
    """
    start = time.monotonic()
    folder = Path(out)
    if provider not in available_providers():
        raise UsageError(
            f"the demonstration cannot run on {provider!r}; here there are "
            f"{', '.join(available_providers())}"
        )
    _check_folder(folder, overwrite=overwrite)
    check_report_folder(folder / REPORT, kind=_REPORT_KIND, overwrite=overwrite)
    for entry in _entries(iterations, seed):
        for part in ("run", "onnx"):
            check_output(folder / entry.folder / part, overwrite=overwrite, kind=part)
    folder.mkdir(exist_ok=True)
    if owned_by_trtq(folder) is None:
        write_listing(folder, _KIND, [])
    reference = draw_reference(MODEL, images=images, steps=STEPS, seed=seed + 1, progress=progress)
    results: dict[str, Evaluation] = {}
    sizes: dict[str, RunResult] = {}
    for entry in _entries(iterations, seed):
        run, onnx = folder / entry.folder / "run", folder / entry.folder / "onnx"
        try:
            made = quantize(MODEL, entry.recipe, run, overwrite=overwrite, progress=progress)
        except BaseException:
            # The demonstration cannot be gone on with, so its checkpoints are of no use.
            with suppress(UsageError), claimed(run.resolve()):
                remove_partial(run.resolve())
            raise
        assert made is not None  # This is the first process.
        sizes[entry.name] = made
        export(run, onnx, overwrite=overwrite, progress=progress)
        results[entry.name] = evaluate(onnx, reference, provider=provider, progress=progress)
    last = results[entry.name]
    sheet = contact_sheet(last.images[:100], 10, scale=6, gap=6)
    rows = _rows(reference, results, sizes)
    colours = model_colours(row["name"] for row in rows)
    sections = (
        _numbers(rows, colours),
        grid_section(
            {FLOAT: reference.images} | {n: e.images for n, e in results.items()}, colours
        ),
        snr_section(
            {name: e.snr_db for name, e in results.items()},
            sorted(reference.source.timesteps(STEPS)),
            colours,
        ),
        *layer_sections(folder / entry.folder / "run"),
    )
    seconds = round(time.monotonic() - start, 1)
    tuned = sizes[entry.name]
    lead = (
        f"{images} images with each model, {STEPS} DDIM steps, the low-bit models on onnxruntime "
        f"({provider}). Everything took {seconds:.0f} s, {tuned.fine_tune_seconds:.0f} s of it "
        f"fine-tuning ({tuned.fine_tune_iterations} iterations, no training data)."
    )
    result = {"rows": rows, "seconds": seconds, "report": str(folder / REPORT / "index.html")}
    page = Page("Handwritten digits in four bits", lead, sections)
    try:
        save_png(sheet, folder / SHEET, overwrite=overwrite)
        write_listing(folder, _KIND, [SHEET])
        write_report(folder / REPORT, page, result, kind=_REPORT_KIND, overwrite=overwrite)
    except (OSError, TrtqError):
        # A full disk must not cost what took so long to measure.
        for row in rows:
            logger.warning(
                "measured: %s: FD %.2f, class accuracy %.1f %%",
                row["name"],
                row["fd"],
                100 * row["class_accuracy"],
            )
        raise
    return result


_ROW_KEYS = ("fd", "fd_interval", "class_accuracy", "accuracy_interval", "snr_db")


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is not the demonstration's.

    Raises:
        UsageError: it is the user's, or holds a file of his where one is to be written.
    """
    check_output(folder, overwrite=overwrite, kind=_KIND)
    owned = owned_by_trtq(folder)
    if (folder / SHEET).exists() and (owned is None or not owned.holds(SHEET)):
        raise UsageError(f"{folder / SHEET} is not what trtq made; move it away first")


def _rows(
    reference: ReferenceSet, results: dict[str, Evaluation], sizes: dict[str, RunResult]
) -> list[dict[str, Any]]:
    first = next(iter(sizes.values()))
    scores = reference.scores
    assert scores is not None  # The model ships with its classifier.
    rows: list[dict[str, Any]] = [
        {
            "name": FLOAT,
            "fd": scores.fd,
            "fd_interval": scores.fd_interval,
            "class_accuracy": scores.accuracy,
            "accuracy_interval": scores.accuracy_interval,
            "snr_db": None,
            "bytes": first.bytes_before,
        }
    ]
    for name, evaluation in results.items():
        result = evaluation.to_json()
        rows.append(
            {"name": name, "bytes": sizes[name].bytes_after}
            | {key: result[key] for key in _ROW_KEYS}
        )
    return rows


def _numbers(rows: list[dict[str, Any]], colours: Mapping[str, str]) -> Section:
    shown = tuple(
        (
            row["name"],
            f"{row['fd']:.2f} ({row['fd_interval'][0]:.2f} .. {row['fd_interval'][1]:.2f})",
            f"{row['class_accuracy']:.1%} ({row['accuracy_interval'][0]:.1%} .. "
            f"{row['accuracy_interval'][1]:.1%})",
            f"{row['bytes'] / 1e6:.2f} MB",
        )
        for row in rows
    )
    header = ("model", "Fréchet distance", "class accuracy", "denoiser")
    text = (
        "Fréchet distance to the real digits in the features of the classifier that ships with the "
        "model; lower is better. In brackets: 95 % intervals."
    )
    table = Table(header, shown, best=len(shown) - 1, colours=colours)
    return Section("Numbers", text, table)
