"""Names of the histogram calibrators; see `calib.histogram` for what they compute."""

from __future__ import annotations

from dataclasses import dataclass

from trtq.documents import shown

__all__ = ["CALIBRATORS", "Calibrator", "parse_calibrator"]

CALIBRATORS = ("entropy", "percentile", "mse")
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
