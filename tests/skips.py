"""Which tests may be skipped where all that `make test` installs is installed, and why.

`TRTQ_STRICT_SKIPS=1`, which CI sets, makes every other skip an error; see `tests/conftest.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["ALLOWED", "Skip", "unexpected"]


@dataclass(frozen=True)
class Skip:
    """One kind of test that may be skipped.

    Attributes:
        tests: pattern for the node id of the test or of the file.
        reason: pattern for the reason that pytest gives.
        why: why no machine of the project's CI can run it.
    """

    tests: str
    reason: str
    why: str


ALLOWED = (
    Skip(
        r"tests/bench/test_kernels\.py.*",
        r".*needs an NVIDIA GPU.*",
        "CI has no GPU; the kernels run on the emulator in tests/plugins instead",
    ),
    Skip(
        r"tests/serve/http/test_page\.py.*",
        r".*no Chromium is installed.*",
        "a browser can be installed neither by apt-get nor by playwright",
    ),
)


def unexpected(node: str, reason: str) -> bool:
    """Whether a test that was skipped is on no row of `ALLOWED`."""
    return not any(
        re.fullmatch(row.tests, node) and re.fullmatch(row.reason, reason, re.DOTALL)
        for row in ALLOWED
    )
