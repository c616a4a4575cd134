"""The complete workflow on the digits model: quantise, export, evaluate, report."""

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
from trtq.demo.result import DemoResult, DemoRow
from trtq.engine.ort import available_providers
from trtq.errors import TrtqError, UsageError
from trtq.evaluation.evaluate import Evaluation, evaluate
from trtq.evaluation.page import FLOAT, grid_section, layer_sections, snr_section
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.exporter.export import export
from trtq.pipelines.sheet import contact_sheet, save_png
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
    """Plan for one low-bit model of the demo.

    Attributes:
        name: name in the report.
        folder: subfolder for run and ONNX folder.
        recipe: quantisation recipe.
    """

    name: str
    folder: str
    recipe: dict[str, Any]


@dataclass(frozen=True)
class _Model:
    """One low-bit model of the demo, quantised and evaluated.

    Attributes:
        name: name in the report.
        run: run folder.
        quantized: result of `quantize`.
        evaluation: result of `evaluate` on the ONNX folder.
    """

    name: str
    run: Path
    quantized: RunResult
    evaluation: Evaluation


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
) -> DemoResult:
    """Quantise the digits model to W4A4, export it, generate and evaluate images, write an HTML report.

    Args:
        out: output folder for runs, ONNX folders, `digits.png` and `report/index.html`.
        images: number of images per model.
        iterations: number of fine-tuning iterations.
        provider: runtime of the ONNX folders.
        seed: seed of quantisation and evaluation.
        overwrite: whether to replace existing output.
        progress: callback with the stage's name, the completed work and the total.

    Raises:
        TrtqError: see `trtq.errors`.
    """
    start = time.monotonic()
    folder = Path(out)
    entries = _entries(iterations, seed)
    _prepare_folder(folder, entries, provider, overwrite=overwrite)
    reference = draw_reference(MODEL, images=images, steps=STEPS, seed=seed + 1, progress=progress)
    models = []
    for entry in entries:
        run, onnx = folder / entry.folder / "run", folder / entry.folder / "onnx"
        quantized = _quantize(entry.recipe, run, overwrite=overwrite, progress=progress)
        export(run, onnx, overwrite=overwrite, progress=progress)
        evaluation = evaluate(onnx, reference, provider=provider, progress=progress)
        assert isinstance(evaluation, Evaluation)
        models.append(_Model(entry.name, run, quantized, evaluation))
    rows = _rows(reference, models)
    seconds = round(time.monotonic() - start, 1)
    index = str(folder / REPORT / "index.html")
    result = DemoResult(rows=rows, seconds=seconds, report=index)
    page = _page(reference, models, rows, provider=provider, seconds=seconds)
    sheet = contact_sheet(models[-1].evaluation.images[:100], 10, scale=6, gap=6)
    try:
        save_png(sheet, folder / SHEET, overwrite=overwrite)
        write_listing(folder, _KIND, [SHEET])
        numbers = result.to_json()
        write_report(folder / REPORT, page, numbers, kind=_REPORT_KIND, overwrite=overwrite)
    except (OSError, TrtqError):
        # The measurements take minutes, so log them even if the disk is full.
        for row in rows:
            logger.warning(
                "measured: %s: FD %.2f, class accuracy %.1f %%",
                row.name,
                row.fd,
                100 * row.class_accuracy,
            )
        raise
    return result


def _prepare_folder(
    folder: Path, entries: tuple[_Entry, ...], provider: str, *, overwrite: bool
) -> None:
    """Check provider and output folder before any long work, and create the folder.

    Raises:
        UsageError: the provider is not available, or existing files must not be replaced.
    """
    if provider not in available_providers():
        raise UsageError(
            f"the demo cannot run on {provider!r}; available providers: "
            f"{', '.join(available_providers())}"
        )
    _check_folder(folder, overwrite=overwrite)
    check_report_folder(folder / REPORT, kind=_REPORT_KIND, overwrite=overwrite)
    for entry in entries:
        for part in ("run", "onnx"):
            check_output(folder / entry.folder / part, overwrite=overwrite, kind=part)
    folder.mkdir(exist_ok=True)
    if owned_by_trtq(folder) is None:
        write_listing(folder, _KIND, [])


def _quantize(
    recipe: dict[str, Any], run: Path, *, overwrite: bool, progress: ProgressCallback
) -> RunResult:
    try:
        result = quantize(MODEL, recipe, run, overwrite=overwrite, progress=progress)
    except BaseException:
        # The demo cannot be resumed, so delete its checkpoints.
        with suppress(UsageError), claimed(run.resolve()):
            remove_partial(run.resolve())
        raise
    assert result is not None  # This is the first process.
    return result


def _page(
    reference: ReferenceSet,
    models: list[_Model],
    rows: list[DemoRow],
    *,
    provider: str,
    seconds: float,
) -> Page:
    """The report of the demo."""
    colours = model_colours(row.name for row in rows)
    images = {model.name: model.evaluation.images for model in models}
    sections = (
        _numbers(rows, colours),
        grid_section({FLOAT: reference.images} | images, colours),
        snr_section(
            {model.name: model.evaluation.snr_db for model in models},
            sorted(reference.source.timesteps(STEPS)),
            colours,
        ),
        *layer_sections(models[-1].run),
    )
    tuned = models[-1].quantized
    lead = (
        f"{len(reference.images)} images per model, {STEPS} DDIM steps, low-bit models on onnxruntime "
        f"({provider}). Total time {seconds:.0f} s, of which fine-tuning took "
        f"{tuned.fine_tune_seconds:.0f} s ({tuned.fine_tune_iterations} iterations, no training "
        "data)."
    )
    return Page("Handwritten digits in four bits", lead, sections)


_ROW_KEYS = ("fd", "fd_interval", "class_accuracy", "accuracy_interval", "snr_db")


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise unless the folder is new or was created by the demo.

    Raises:
        UsageError: the folder, or a file that would be replaced, was not created by trtq.
    """
    check_output(folder, overwrite=overwrite, kind=_KIND)
    owned = owned_by_trtq(folder)
    if (folder / SHEET).exists() and (owned is None or not owned.holds(SHEET)):
        raise UsageError(f"{folder / SHEET} was not created by trtq; move it first")


def _rows(reference: ReferenceSet, models: list[_Model]) -> list[DemoRow]:
    scores = reference.scores
    # The model ships with a classifier and its statistics.
    assert scores is not None
    assert scores.fd is not None
    assert scores.fd_interval is not None
    assert scores.accuracy is not None
    assert scores.accuracy_interval is not None
    row = DemoRow(
        name=FLOAT,
        fd=scores.fd,
        fd_interval=scores.fd_interval,
        class_accuracy=scores.accuracy,
        accuracy_interval=scores.accuracy_interval,
        snr_db=None,
        bytes=models[0].quantized.bytes_before,
    )
    rows = [row]
    for model in models:
        result = model.evaluation.to_json()
        values = {key: result[key] for key in _ROW_KEYS}
        rows.append(DemoRow(name=model.name, bytes=model.quantized.bytes_after, **values))
    return rows


def _numbers(rows: list[DemoRow], colours: Mapping[str, str]) -> Section:
    shown = tuple(
        (
            row.name,
            f"{row.fd:.2f} ({row.fd_interval[0]:.2f} .. {row.fd_interval[1]:.2f})",
            f"{row.class_accuracy:.1%} ({row.accuracy_interval[0]:.1%} .. "
            f"{row.accuracy_interval[1]:.1%})",
            f"{row.bytes / 1e6:.2f} MB",
        )
        for row in rows
    )
    header = ("model", "Fréchet distance", "class accuracy", "denoiser")
    text = (
        "Fréchet distance to the real digits, in the feature space of the shipped classifier; lower is "
        "better. Brackets: 95 % intervals."
    )
    table = Table(header, shown, best=len(shown) - 1, colours=colours)
    return Section("Numbers", text, table)
