"""Post-training quantisation with each calibrator, judged by the images and by the prediction.

    python benchmarks/calibrators.py [MODEL ...] [--bits BITS ...] [--only CALIBRATOR ...]

Weights are searched and inputs smoothed in every row; only the ranges of the activations differ. Rows
that are already in the output are skipped, so the script can be interrupted. It measures no time, so
other programs may run at the same time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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


def measured(
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


def main() -> None:
    """Measure the missing rows and write the output after each row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--bits", nargs="*", choices=BITS, default=BITS)
    parser.add_argument("--only", nargs="*", choices=CALIBRATORS, default=CALIBRATORS)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    progress = ProgressPrinter()
    rows = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    known = {(row["model"], row["bits"], row["calibrator"]) for row in rows}
    for model in options.models or IMAGES:
        wanted = [
            (bits, calibrator)
            for bits in options.bits
            for calibrator in options.only
            if (model, bits, calibrator) not in known
        ]
        if not wanted:
            continue
        reference = draw_reference(
            model, images=IMAGES[model], steps=STEPS, seed=1, progress=progress
        )
        for bits, calibrator in wanted:
            row = measured(model, bits, {"activations": calibrator}, reference, progress)
            rows.append(row | {"calibrator": calibrator})
            record = {"steps": STEPS, "packages": package_versions(), "rows": rows}
            options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
