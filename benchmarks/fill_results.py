"""Write the tables of README.md and docs/ from the files in benchmarks/results.

    python benchmarks/fill_results.py [--check]

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. `--check` writes nothing and
exits with 1 if a table differs from its results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockwise_tables import blockwise
from modelopt_tables import modelopt
from quality_tables import ablation, digits, digits_dit, digits_dit_outliers, digits_summary, shapes
from serving_tables import serve, serve_hostile, serve_ray, serve_start
from speed_tables import build, cpu_path, format_engines, launches, real_size, sd_size
from transform_tables import (
    calibration_images,
    calibrators,
    transforms_planted,
    transforms_policies,
    transforms_tuned,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "digits_summary": ("digits", digits_summary),
    "digits": ("digits", digits),
    "ablation": ("ablation", ablation),
    "best": ("best", ablation),
    "in_call": ("in_call", ablation),
    "digits_dit": ("digits_dit", digits_dit),
    "digits_dit_plain": ("digits_dit_plain", digits_dit),
    "digits_dit_outliers": ("digits_dit", digits_dit_outliers),
    "blockwise": ("blockwise", blockwise),
    "shapes": ("shapes", shapes),
    "calibration_images": ("calibration_images", calibration_images),
    "calibrators": ("calibrators", calibrators),
    "modelopt": ("modelopt", modelopt),
    "sd_size": ("sd_size", sd_size),
    "real_size": ("real_size", real_size),
    "cpu_path": ("cpu_path", cpu_path),
    "build": ("build", build),
    "format_engines": ("format_engines", format_engines),
    "launches": ("launches", launches),
    "serve": ("serve", serve),
    "serve_side_by_side": ("serve_side_by_side", serve),
    "serve_hostile": ("serve_hostile", serve_hostile),
    "serve_start": ("serve_start", serve_start),
    "serve_ray": ("serve_ray", serve_ray),
    "transforms_planted": ("transforms", transforms_planted),
    "transforms_policies": ("transforms", transforms_policies),
    "transforms_tuned": ("transforms", transforms_tuned),
}
"""Result file and function by the name of the table."""


def filled(text: str) -> str:
    """A page with its tables replaced by those that the result files give."""
    for name, (results, make) in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        path = RESULTS / f"{results}.json"
        if begin not in text or not path.is_file():
            continue
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        table = make(json.loads(path.read_text(encoding="utf-8")))
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


def main() -> int:
    """Fill every page that holds a table."""
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv[1:]:
                page.write_text(new, encoding="utf-8")
    print("\n".join(stale) or "every table is up to date")
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
