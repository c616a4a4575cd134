"""What the processor can do, as far as graphs and kernels depend on it: one setting for everything."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from trtq.errors import UsageError

__all__ = ["FEATURES", "VARIABLE", "has_vnni", "processor_features"]

VARIABLE = "TRTQ_CPU"
"""Environment variable that changes what is assumed: `-vnni`, `+vnni,-bf16`, ..."""
FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "amx_bf16"),
    "amx": ("amx_int8",),
}
"""By our name, what `/proc/cpuinfo` calls it; `vnni` adds int8 products in int32, without loss."""


def processor_features() -> frozenset[str]:
    """Those of `FEATURES` that this processor is taken to have.

    The system says it; TRTQ_CPU changes it, a comma-separated list of `+name` and `-name`. It changes
    what trtq prepares, not what runtimes use, so `+` of what is not there may compute wrongly. Where the
    system does not tell, `vnni` is assumed.

    Raises:
        UsageError: TRTQ_CPU names something else.
    """
    found = set(_detected())
    for word in os.environ.get(VARIABLE, "").replace(",", " ").split():
        name = word.removeprefix("-") if word.startswith("-") else word.removeprefix("+")
        if name not in FEATURES:
            raise UsageError(
                f"{VARIABLE} holds {word[:40]!r}; write +NAME or -NAME, separated by commas, with NAME "
                f"one of {', '.join(FEATURES)}"
            )
        if word.startswith("-"):
            found.discard(name)
        else:
            found.add(name)
    return frozenset(found)


def has_vnni() -> bool:
    """Whether the processor is taken to add int8 products in int32, see `processor_features`."""
    return "vnni" in processor_features()


@functools.cache
def _detected() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset({"vnni"})
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((set(value.split()) for key, _, value in lines if key.strip() == "flags"), None)
    if flags is None:  # Not of x86, whose older processors are the only ones known to saturate.
        return frozenset({"vnni"})
    return frozenset(name for name, known in FEATURES.items() if flags & set(known))
