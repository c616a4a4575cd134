"""Post-training quantisation calibrated with fewer images, judged by the images and the prediction.

    python benchmarks/calibration_images.py [MODEL ...] [--bits BITS ...] [--images COUNT ...]

Only the number of images that are recorded differs between the rows of a model. Rows that are already in
the output are skipped, so the script can be interrupted. It measures no time, so other programs may run
at the same time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calibrators import BITS, IMAGES, measure_missing

RESULTS = Path(__file__).parent / "results" / "calibration_images.json"
COUNTS = (64, 16, 8, 4)


def main() -> None:
    """Measure the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--bits", nargs="*", choices=BITS, default=BITS)
    parser.add_argument("--images", nargs="*", type=int, default=COUNTS, metavar="COUNT")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    measure_missing(
        options.output,
        options.models,
        options.bits,
        "calibration_images",
        options.images,
        lambda count: {"images": count},
    )


if __name__ == "__main__":
    main()
