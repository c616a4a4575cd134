"""A former result, and what has become faster or slower since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtq.bench.summary import compare_medians
from trtq.errors import UsageError

__all__ = ["FORMAT_VERSION", "compare", "read_former"]

FORMAT_VERSION = 1
"""Of the result of `trtq.stages.bench.bench`."""


def read_former(path: Path, device: dict[str, Any]) -> dict[str, Any]:
    """A result to compare with.

    Raises:
        UsageError: it is none, or of another device.
    """
    what = "give what `trtq bench --json` printed, or the report.json of a report"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as err:
        raise UsageError(f"--against: cannot read {path} ({err}); {what}") from err
    if not isinstance(found, dict) or not {"format_version", "rows", "device"} <= set(found):
        raise UsageError(f"--against: {path} is no result of trtq bench; {what}")
    if found["format_version"] != FORMAT_VERSION:
        raise UsageError(
            f"--against: {path} has format version {found['format_version']}, this trtq reads "
            f"{FORMAT_VERSION}; measure again"
        )
    for key, value in device.items():
        if found["device"].get(key) != value:
            raise UsageError(
                f"--against: {path} was measured with {key} {found['device'].get(key)!r}, here it is "
                f"{value!r}; only the same device compares"
            )
    return found


def compare(former: dict[str, Any], result: dict[str, Any], name: str) -> dict[str, Any]:
    """Every part of every row and batch size that both have."""
    before = {(row["path"], row["provider"]): row for row in former["rows"]}
    rows, missing = [], []
    for row in result["rows"]:
        label = f"{row['path']}@{row['provider']}"
        old = before.get((row["path"], row["provider"]))
        if old is None or not (old["measured"] and row["measured"]):
            missing.append(label)
            continue
        batches = {one["batch"]: one for one in old["batches"]}
        for now in row["batches"]:
            then = batches.get(now["batch"], {"parts": {}})
            for part in now["parts"].keys() & then["parts"].keys():
                found = compare_medians(then["parts"][part]["turns"], now["parts"][part]["turns"])
                rows.append({"row": label, "batch": now["batch"], "part": part} | found)
    return {"file": name, "date": former.get("date"), "rows": rows, "missing": missing}
