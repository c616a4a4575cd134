"""Gates: conditions on the metrics of an evaluation."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from trtq.documents import shown
from trtq.errors import UsageError
from trtq.evaluation.reference import ReferenceSet

__all__ = ["METRICS", "PIXEL_METRICS", "Gate", "check_gates", "parse_gate"]

METRICS = {
    "fd": "Fréchet distance to real images (to the float model's, where there are none)",
    "fd_ratio": "the same over the float model's own",
    "sfd": "Fréchet distance of spatial features to the float model's images",
    "class_accuracy": "share of images recognised as the class asked for",
    "faithfulness": "share of images that show everything the prompt says",
    "inception_score": "exp of the mean divergence of single answers from all",
    "precision": "share of images within the float model's manifold",
    "recall": "share of the float model's images within these images' manifold",
    "psnr_db": "against the float model's images from the same noise",
    "ssim": "against the float model's images from the same noise",
    "snr_db_min": "minimum signal-to-noise ratio of the noise prediction over the steps",
}
_GATE = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Gate:
    """A condition such as `fd<=1.5`.

    Attributes:
        metric: one of `METRICS`.
        operator: `<=`, `>=`, `<` or `>`.
        bound: limit that the metric is compared with.
    """

    metric: str
    operator: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether the metric's value satisfies the condition; NaN never does."""
        return bool(_OPERATORS[self.operator](value, self.bound))

    def __str__(self) -> str:
        """The condition as text, e.g. `fd<=1.5`."""
        return f"{self.metric}{self.operator}{self.bound:g}"


def parse_gate(text: str) -> Gate:
    """Parse a gate such as `fd<=1.5`.

    Raises:
        UsageError: the text is malformed, or the metric is unknown.
    """
    match = _GATE.fullmatch(text)
    try:
        bound = float(match[3]) if match else float("nan")
    except ValueError:
        bound = float("nan")
    if match is None or bound != bound:
        raise UsageError(
            f"gate {shown(text)} is not understood; write METRIC<=NUMBER, e.g. fd<=1.5"
        )
    if match[1] not in METRICS:
        raise UsageError(
            f"unknown metric {shown(match[1])} in a gate; choose one of {', '.join(METRICS)}"
        )
    return Gate(match[1], match[2], bound)


PIXEL_METRICS = ("psnr_db", "ssim", "snr_db_min")
"""Metrics that compare pixels or predictions with the float model's and need no extractor."""


def check_gates(gates: tuple[Gate, ...], reference: ReferenceSet) -> None:
    """Refuse a gate on a metric that cannot be computed, before any image is generated.

    Args:
        gates: gates to check.
        reference: images and extractor of the float model.

    Raises:
        UsageError: a metric cannot be computed; the message names the gate.
    """
    if reference.scores is None or reference.extractor is None:
        missing = set(METRICS) - set(PIXEL_METRICS)
        advice = (
            "without a feature extractor there are only "
            f"{', '.join(PIXEL_METRICS)}; pass --features FOLDER with a CLIP vision model"
        )
    else:
        missing = {"class_accuracy", "faithfulness"}
        if reference.scores.accuracy is not None:
            missing.remove(reference.accuracy_name)
        if reference.scores.fd is None:
            missing.add("fd_ratio")
        if reference.scores.inception_score is None:
            missing.add("inception_score")
        advice = f"{reference.extractor.name} does not give it for this model"
    for gate in gates:
        if gate.metric in missing:
            raise UsageError(f"the gate {gate} cannot be checked: {advice}")
