"""Values as text: sizes, durations, decibels, lists and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "bytes_text",
    "counts_text",
    "decibel_text",
    "ends_text",
    "label_text",
    "list_text",
    "seconds_text",
    "value_text",
]

_UNITS = ("kB", "MB", "GB", "TB", "PB")
_MAX_LISTED = 8


def bytes_text(count: float) -> str:
    """Format a size in decimal units: `743744` -> `744 kB`, `4815492` -> `4.82 MB`."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in _UNITS:
        count /= 1000
        if count < 999.5 or unit == _UNITS[-1]:
            break
    return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"


def seconds_text(seconds: float) -> str:
    """Format a duration: `0.068` -> `0.068 s`, `75` -> `1 min 15 s`, `7500` -> `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def list_text(items: Sequence[Any], form: str = "") -> str:
    """Format the first eight items with `form`, and the number of further items."""
    shown = ", ".join(format(item, form) for item in items[:_MAX_LISTED])
    more = len(items) - _MAX_LISTED
    return f"{shown}, and {more} more" if more > 0 else shown


def counts_text(counts: Mapping[str, int]) -> str:
    """Format counts by name: `{"w4a8": 3}` -> `3 w4a8`."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def value_text(value: Any) -> str:
    """Format any JSON value without Python syntax: `None` -> `-`, `True` -> `yes`."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{label_text(key)} {value_text(item)}" for key, item in value.items()) or "-"
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "-"
    return str(value)


def label_text(key: Any) -> str:
    """Format a JSON key as a label: `peak_bytes` -> `peak bytes`."""
    return str(key).replace("_", " ")


_EXACT_DB = 200.0
"""SNR in dB that `trtq.exporter.parity` reports for equal values."""


def decibel_text(value: float) -> str:
    """Format an SNR in dB, or `exact` if the values are equal."""
    return "exact" if value >= _EXACT_DB else f"{value:.1f} dB"


def ends_text(points: Sequence[float]) -> str:
    """Format all of up to eight values, else the first, second and last value."""
    if len(points) <= _MAX_LISTED:
        return ", ".join(f"{point:g}" for point in points)
    return f"{points[0]:g}, {points[1]:g}, .. {points[-1]:g}"
