"""Result of `trtq demo`."""

from __future__ import annotations

from dataclasses import dataclass

from trtq.results import Result

__all__ = ["DemoResult", "DemoRow"]


@dataclass(frozen=True, kw_only=True)
class DemoRow(Result):
    """Scores and size of one model.

    Attributes:
        name: name of the model in the report.
        fd: Fréchet distance to the real digits.
        fd_interval: 95 % interval of `fd`.
        class_accuracy: share of images that the classifier recognises as the requested digit.
        accuracy_interval: 95 % interval of `class_accuracy`.
        snr_db: SNR of the noise prediction per step, in dB; None for the float model.
        bytes: size of the denoiser, in bytes.
    """

    name: str
    fd: float
    fd_interval: tuple[float, float]
    class_accuracy: float
    accuracy_interval: tuple[float, float]
    snr_db: list[float] | None
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    """The result of `trtq demo`.

    Attributes:
        rows: scores of the float model, then of the low-bit models.
        seconds: duration of the demo, in seconds.
        report: path of the HTML report.
    """

    rows: list[DemoRow]
    seconds: float
    report: str
