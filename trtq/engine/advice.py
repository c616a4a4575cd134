"""Which format suits which card, and why.

Sources: "built" and "refused" are builds of TensorRT-RTX 1.7 for the architecture, without a card.
"NVRTC" is the machine code that NVIDIA's compiler makes of trtq's kernels. "Published" are other
projects' figures of 2026 for ERNIE-Image-Turbo and other models, whose INT8 form rotates the input. trtq
has measured no speed in TensorRT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trtq.documents import shown
from trtq.errors import UsageError
from trtq.results import Result

__all__ = ["ADVISED", "Advice", "FormatAdvice", "Suits", "advise"]

Suits = Literal["best", "good", "size", "no"]
"""`best`: try first. `good`: computes in this format. `size`: smaller files and less memory, computes in
another format. `no`: is refused, or has no advantage."""


@dataclass(frozen=True, kw_only=True)
class FormatAdvice(Result):
    """How one format suits one card.

    Attributes:
        option: options of `trtq quantize` for the format.
        suits: see `Suits`.
        why: reason, with its source.
    """

    option: str
    suits: Suits
    why: str


@dataclass(frozen=True, kw_only=True)
class Advice(Result):
    """How each format suits one card.

    Attributes:
        architecture: name of the architecture, or `cpu`.
        cards: examples of cards.
        formats: the formats, best first.
    """

    architecture: str
    cards: str
    formats: list[FormatAdvice]


_W8A8, _W4A8, _W4A4 = "--bits w8a8", "--bits w4a8", "--bits w4a4"
_W4A16, _FP8, _NVFP4 = "--bits w4a16", "--format fp8", "--format nvfp4"
_INT8_FIRST = (
    "INT8 products and convolutions are built; before Blackwell, INT8 with rotation was faster than FP8 "
    "with less error (published, RTX 3060 to L40S)"
)
_PLUGIN_4 = "INT4 tensor cores: the plugin multiplies 4-bit codes directly (NVRTC); --target plugin"
_EMULATED_4 = "no INT4 tensor cores: the plugin unpacks codes to 8 bits (NVRTC); --target plugin"
_UNPACKED_8 = "4-bit weights are unpacked to 8 bits, by the plugin in the kernel; --target plugin"
_INT4_WEIGHTS = "built with weights in 4 bits, without a plugin; products in half precision"
_NO_FP8 = "refused: FP8 needs sm89 or later"
_NO_NVFP4 = "refused: NVFP4 needs sm100 or later"
_FP8_BUILT = "FP8 products are built; E4M3 tolerates outliers without smoothing or rotation"

_NOT_RTX = "; TensorRT-RTX does not target this architecture, full TensorRT does"


def _ampere(cards: str) -> tuple[str, list[tuple[str, Suits, str]]]:
    return cards, [
        (_W8A8, "best", _INT8_FIRST),
        (_W4A4, "good", _PLUGIN_4),
        (_W4A8, "size", _UNPACKED_8),
        (_W4A16, "size", _INT4_WEIGHTS),
        (_FP8, "no", _NO_FP8),
        (_NVFP4, "no", _NO_NVFP4),
    ]


_ADVICE: dict[str, tuple[str, list[tuple[str, Suits, str]]]] = {
    "sm75": (
        "RTX 20, T4",
        [
            (
                _W8A8,
                "best",
                "INT8 products are built; convolutions run in half precision. Export fp16",
            ),
            (_W4A4, "good", _PLUGIN_4),
            (_W4A8, "size", _UNPACKED_8),
            (_W4A16, "no", "refused: INT4 weights need sm80 or later"),
            (_FP8, "no", _NO_FP8),
            (_NVFP4, "no", _NO_NVFP4),
        ],
    ),
    "sm80": _ampere("A100, A30"),
    "sm86": _ampere("RTX 30, A10"),
    "sm89": (
        "RTX 40, L4, L40S",
        [
            (_W8A8, "best", _INT8_FIRST),
            (_FP8, "good", _FP8_BUILT),
            (_W4A4, "good", _PLUGIN_4),
            (_W4A8, "size", _UNPACKED_8),
            (_W4A16, "size", _INT4_WEIGHTS),
            (_NVFP4, "no", _NO_NVFP4),
        ],
    ),
    "sm90": (
        "H100, H200",
        [
            (_FP8, "best", "FP8 tensor cores" + _NOT_RTX),
            (_W8A8, "good", "INT8 tensor cores" + _NOT_RTX),
            (_W4A16, "size", "INT4 weights, products in half precision" + _NOT_RTX),
            (_W4A8, "size", _UNPACKED_8),
            (_W4A4, "no", _EMULATED_4),
            (_NVFP4, "no", _NO_NVFP4),
        ],
    ),
    "sm100": (
        "B100, B200",
        [
            (_NVFP4, "best", "FP4 tensor cores" + _NOT_RTX),
            (_FP8, "good", "FP8 tensor cores" + _NOT_RTX),
            (_W8A8, "good", "INT8 tensor cores" + _NOT_RTX),
            (_W4A16, "size", "INT4 weights, products in half precision" + _NOT_RTX),
            (_W4A8, "size", _UNPACKED_8),
            (_W4A4, "no", _EMULATED_4),
        ],
    ),
    "sm120": (
        "RTX 50, RTX PRO Blackwell",
        [
            (
                _NVFP4,
                "best",
                "built; NVFP4 was the fastest format (published, RTX 5090: 1.8 x bf16)",
            ),
            (
                _W8A8,
                "good",
                "built; 1.6 x bf16, next after NVFP4 (published, RTX 5090)",
            ),
            (_FP8, "good", _FP8_BUILT + "; 1.5 x bf16 (published, RTX 5090)"),
            (_W4A16, "size", _INT4_WEIGHTS),
            (_W4A8, "size", _UNPACKED_8),
            (_W4A4, "no", _EMULATED_4),
        ],
    ),
    "cpu": (
        "processors, with --provider openvino or cpu",
        [
            (
                _W8A8,
                "best",
                "OpenVINO computes in INT8; without VNNI use w7a8, which cannot saturate",
            ),
            (_W4A8, "good", "as w8a8 with half the file; OpenVINO computes in INT8"),
            (_W4A4, "size", "computes in INT8 like w4a8, with more error"),
            (_W4A16, "size", "products in float, weights in 4 bits"),
            (_FP8, "no", "runs as a reference: processors have no FP8 products"),
            (_NVFP4, "no", "runs as a reference, from standard operators"),
        ],
    ),
}
ADVISED = tuple(_ADVICE)
"""Architectures that `advise` knows."""


def advise(architecture: str) -> Advice:
    """How each format suits a card.

    Args:
        architecture: one of `ADVISED`, in any spelling such as `SM_86`.

    Raises:
        UsageError: the architecture is unknown.
    """
    name = architecture.lower().replace("_", "")
    if name not in _ADVICE:
        raise UsageError(
            f"no advice for {shown(architecture)}; choose one of {', '.join(ADVISED)}: the compute "
            "capability of a card without its dot, e.g. sm86 for 8.6"
        )
    cards, rows = _ADVICE[name]
    return Advice(
        architecture=name,
        cards=cards,
        formats=[FormatAdvice(option=option, suits=suits, why=why) for option, suits, why in rows],
    )
