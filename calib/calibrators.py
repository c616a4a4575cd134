"""Names of the methods that find activation ranges, and what they need from the recording."""

from __future__ import annotations

from dataclasses import dataclass

from trtq.documents import shown

__all__ = [
    "BY_OUTPUT",
    "CALIBRATORS",
    "EXTREMES",
    "Calibrator",
    "RangeData",
    "parse_calibrator",
    "range_data",
]

CALIBRATORS = ("entropy", "percentile", "mse")
"""Calibrators that need a histogram, see `trtq.calib.histogram`."""
BY_OUTPUT = "output"
"""Ranges by the error of the layer's output, see `trtq.calib.output_ranges`."""
_PERCENTILE = 99.99


@dataclass(frozen=True)
class Calibrator:
    """A histogram calibrator.

    Attributes:
        name: one of `CALIBRATORS`.
        percentile: share of the absolute values, in percent, that the range of `percentile` covers.
    """

    name: str
    percentile: float = _PERCENTILE


def parse_calibrator(text: str) -> Calibrator | None:
    """Parse a method of calibration: `entropy`, `mse`, `percentile` or e.g. `percentile:99.9`.

    Returns:
        The calibrator; None: the method uses no histogram.

    Raises:
        ValueError: the text names a histogram calibrator and has a wrong percentile.
    """
    name, colon, number = text.partition(":")
    if name not in CALIBRATORS:
        return None
    if not colon:
        return Calibrator(name)
    try:
        percentile = float(number)
    except ValueError:
        percentile = 0.0
    if name != "percentile" or not 50 < percentile <= 100:
        raise ValueError(
            f"{shown(text)} is not a calibrator; write e.g. percentile:99.9, with a number over 50 and "
            "up to 100"
        )
    return Calibrator(name, percentile)


@dataclass(frozen=True)
class RangeData:
    """What is recorded of each input besides its extremes and a sample of its values.

    Attributes:
        histograms: whether to count histograms of the absolute values.
        rows: whether to sample rows of the inputs of layers with weights.
        static: whether all steps share a range.
    """

    histograms: bool = False
    rows: bool = False
    static: bool = False


EXTREMES = RangeData()
"""Extremes and a sample of the values suffice."""


def range_data(method: str, *, static: bool) -> RangeData:
    """What a method of finding activation ranges needs.

    Args:
        method: `minmax`, `search`, `output` or a histogram calibrator.
        static: whether all steps share a range.
    """
    return RangeData(parse_calibrator(method) is not None, method == BY_OUTPUT, static)
