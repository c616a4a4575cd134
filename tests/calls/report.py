"""Write docs/pipelines.md: `python -m tests.calls.report [NAME ...]`.

The named pipelines of `tests.calls.zoo`, or all of them, go the whole way. The results replace their
rows in docs/pipelines.json, from which the page is written. `--page` writes the page only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.calls.zoo import ZOO

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "pipelines.json"
PAGE = DOCS / "pipelines.md"
PACKAGES = ("diffusers", "onnxruntime", "torch", "transformers")
ARCHITECTURES = ("sm86", "sm120")
"""GPUs of RTX 30 and RTX 50 cards."""
_EXACT_DB = 200.0
_HEAD = """# Supported pipelines

<!-- Written by `python -m tests.calls.report` from pipelines.json; edit the generator. -->

trtq records how a pipeline of diffusers calls its denoiser, so that it needs no code for a pipeline's
class. This page lists pipelines that the tests take the whole way, as random models of the true classes
with tiny layers: recorded, quantised to {bits}, exported, loaded, and called with the user's arguments.
Other pipelines work in the same way; `trtq quantize MODEL --call FILE.toml` records any of them.

For each row the tests check that the calibrated timesteps are those that the pipeline passes, that the
loaded pipeline has the same class, that its output agrees with the low-bit run in torch, and that the
rest of the pipeline is unchanged bit for bit.
"""
_NOTES = """
- *Low-bit layers* are counted over all denoisers. Float layers have their reason in the last column.
- *Free* are the properties of a call that may change without another export. A range of image sizes is
  free if the export gets `--size SMALLEST:LARGEST`.
- *Parity* is the minimum SNR of the graphs' outputs against the low-bit model in torch, over all calls
  of the denoiser and on the real inputs. *Exact* means equal in every bit. Where torch agrees with
  itself less well after a change in the last bit of its inputs, that limit is in parentheses.
- *Engines* are the GPU architectures for which TensorRT-RTX builds every graph of the row: `sm86` is
  RTX 30, `sm120` is RTX 50. The engines were built, not run.
- Text encoders, autoencoders and other components stay in torch for every row.
"""


def page(results: Mapping[str, Any]) -> str:
    """Text of the page for stored results."""
    rows = results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "| Pipeline | Denoiser | Low-bit layers | Graphs | Free | Parity (dB) | Engines "
        "| In torch or float |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in ZOO.items():
        lines.append(
            _line(rows[name]) if name in rows else f"| {case.title} |" + " not measured |" * 7
        )
    measured = sum(name in rows for name in ZOO)
    refused = sum(bool(rows[name]["refused"]) for name in ZOO if name in rows)
    summary = (
        f"Measured on {results['date']} with {versions}: {measured - refused} of {measured} pipelines "
        f"go the whole way, {refused} run low-bit in torch only."
    )
    head = _HEAD.replace("{bits}", "`w4a8`")
    return f"{head}\n{summary}\n\n" + "\n".join(lines) + f"\n{_NOTES}"


def _line(row: Mapping[str, Any]) -> str:
    denoisers = row["denoisers"]
    classes = list(dict.fromkeys(denoisers.values()))
    names = ", ".join(f"`{name}`" for name in classes)
    if len(denoisers) > len(classes):
        names = f"{len(denoisers)}x {names}"
    refused = row["refused"] is not None
    cells = [
        f"{row['title']}<br>`{row['pipeline']}`",
        names,
        f"{row['low_bit']} of {row['layers']}",
        "-" if refused else str(row["graphs"]),
        ", ".join(row["free"]) or "-",
        _parity(row),
        _engines(row),
        _in_torch(row),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _parity(row: Mapping[str, Any]) -> str:
    parity = row["parity_db"]
    if parity is None:
        return "-"
    if parity >= _EXACT_DB:
        return "exact"
    floor = row["floor_db"]
    # A parity that is high enough is compared with no floor.
    return (
        f"{parity:.0f} ({floor:.0f})" if floor is not None and floor < parity else f"{parity:.0f}"
    )


def _engines(row: Mapping[str, Any]) -> str:
    if row["refused"] is not None:
        return "-"
    engines = row.get("engines")
    return "not measured" if engines is None else ", ".join(engines)


def _in_torch(row: Mapping[str, Any]) -> str:
    reasons = [] if row["refused"] is None else [f"denoiser: {row['refused']}"]
    reasons += [f"{count} layers: {reason}" for reason, count in row["float_layers"].items()]
    reasons += [f"{what} fixed: {reason}" for what, reason in row["fixed"].items()]
    return "<br>".join(reasons) or "-"


def stored() -> dict[str, Any]:
    """The stored results."""
    if not RESULTS.exists():
        return {"date": "", "versions": {}, "rows": {}}
    return dict(json.loads(RESULTS.read_text(encoding="utf-8")))


def _measure(name: str) -> dict[str, Any] | None:
    """The row of a pipeline; None, with the reason on standard error, if a check fails."""
    from tests.calls.whole_way import measure

    folder, start = Path(tempfile.mkdtemp(prefix="trtq-zoo-")), time.process_time()
    try:
        row = measure(ZOO[name], folder, ARCHITECTURES).to_json()
    except Exception as err:
        sys.stderr.write(f"{name}: {type(err).__name__}: {err}\n")
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.process_time() - start
    outcome = "refused" if row["refused"] else f"parity {row['parity_db']} dB"
    sys.stderr.write(f"{name}: {outcome}, {seconds:.0f} s\n")
    return row


def _store(results: dict[str, Any]) -> None:
    results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    results["versions"] = {name: importlib.import_module(name).__version__ for name in PACKAGES}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


def main() -> int:
    """Measure, store and write; 1 if a pipeline fails a check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(ZOO)}")
    parser.add_argument("--page", action="store_true", help="write the page only")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ZOO]
    if unknown:
        parser.error(f"unknown pipeline {unknown[0]!r}; choose from {', '.join(ZOO)}")
    if options.page:
        PAGE.write_text(page(stored()), encoding="utf-8")
        return 0
    failed = False
    for name in options.names or ZOO:
        row, results = _measure(name), stored()
        if row is None:
            failed = True
            results["rows"].pop(name, None)
        else:
            results["rows"][name] = row
        _store(results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
