"""Post-training quantisation calibrated with fewer images, judged by the images and the prediction.

    python benchmarks/calibration_images.py [MODEL ...] [--bits BITS ...] [--images COUNT ...]

Only the number of images that are recorded differs between the rows of a model. Rows that are already in
the output are skipped, so the script can be interrupted. It measures no time, so other programs may run
at the same time.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from calibrators import IMAGES, STEPS, measured

from trtq.artefact.manifest_file import package_versions
from trtq.evaluation.reference import draw_reference
from trtq.progress import ProgressPrinter

RESULTS = Path(__file__).parent / "results" / "calibration_images.json"
BITS = ("w8a8", "w4a8", "w4a4")
COUNTS = (64, 16, 8, 4)


def main() -> None:
    """Measure the missing rows and write the output after each row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--bits", nargs="*", choices=BITS, default=BITS)
    parser.add_argument("--images", nargs="*", type=int, default=COUNTS, metavar="COUNT")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    progress = ProgressPrinter()
    rows = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    known = {(row["model"], row["bits"], row["calibration_images"]) for row in rows}
    for model in options.models or IMAGES:
        wanted = [
            (bits, count)
            for bits, count in itertools.product(options.bits, options.images)
            if (model, bits, count) not in known
        ]
        if not wanted:
            continue
        reference = draw_reference(
            model, images=IMAGES[model], steps=STEPS, seed=1, progress=progress
        )
        for bits, count in wanted:
            row = measured(model, bits, {"images": count}, reference, progress)
            rows.append(row | {"calibration_images": count})
            record = {"steps": STEPS, "packages": package_versions(), "rows": rows}
            options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
