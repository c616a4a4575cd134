"""Post-training quantisation with each calibrator, judged by the images and by the prediction.

    python benchmarks/calibrators.py [MODEL ...] [--bits BITS ...] [--only CALIBRATOR ...]

Weights are searched and inputs smoothed in every row; only the ranges of the activations differ. Rows
that are already in the output are skipped, so the script can be interrupted. It measures no time, so
other programs may run at the same time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from trtq.artefact.manifest_file import package_versions
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.progress import ProgressPrinter
from trtq.runs.quantize import quantize

RESULTS = Path(__file__).parent / "results" / "calibrators.json"
STEPS = 20
IMAGES = {"digits": 200, "digits-dit": 200, "shapes": 48}
BITS = ("w8a8", "w4a8", "w4a4")
CALIBRATORS = ("minmax", "search", "output", "entropy", "percentile", "mse")


def _measured(
    model: str,
    bits: str,
    calibration: dict[str, Any],
    reference: ReferenceSet,
    progress: ProgressPrinter,
) -> dict[str, Any]:
    """One row, for settings of the recipe's calibration."""
    recipe = {"method": "search", "bits": bits, "calibration": calibration}
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        quantize(model, recipe, run, progress=progress)
        result = evaluate(run, reference, progress=progress).to_json()
    return {
        "model": model,
        "bits": bits,
        "fd": result["fd"],
        "psnr_db": result["psnr_db"],
        "snr_db": mean(result["snr_db"]),
        "images": IMAGES[model],
        "date": datetime.now(UTC).date().isoformat(),
    }


def measure_missing(
    output: Path,
    models: Sequence[str],
    bits: Sequence[str],
    key: str,
    values: Sequence[Any],
    calibration: Callable[[Any], dict[str, Any]],
) -> None:
    """Measure the rows that the output lacks, and write the output after each row.

    Args:
        output: the result file.
        models: names of models; empty: all.
        bits: precisions.
        key: name of the row's field in which the rows of one model and one precision differ.
        values: values of this field.
        calibration: function that returns the settings of the recipe's calibration for a value.
    """
    progress = ProgressPrinter()
    rows = json.loads(output.read_text())["rows"] if output.is_file() else []
    known = {(row["model"], row["bits"], row[key]) for row in rows}
    for model in models or IMAGES:
        wanted = [
            (each, value)
            for each, value in itertools.product(bits, values)
            if (model, each, value) not in known
        ]
        if not wanted:
            continue
        reference = draw_reference(
            model, images=IMAGES[model], steps=STEPS, seed=1, progress=progress
        )
        for each, value in wanted:
            row = _measured(model, each, calibration(value), reference, progress)
            rows.append(row | {key: value})
            record = {"steps": STEPS, "packages": package_versions(), "rows": rows}
            output.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Measure the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--bits", nargs="*", choices=BITS, default=BITS)
    parser.add_argument("--only", nargs="*", choices=CALIBRATORS, default=CALIBRATORS)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    measure_missing(
        options.output,
        options.models,
        options.bits,
        "calibrator",
        options.only,
        lambda calibrator: {"activations": calibrator},
    )


if __name__ == "__main__":
    main()
