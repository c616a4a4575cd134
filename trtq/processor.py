"""Number of processors, and the processor features on which graphs and kernels depend."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from trtq.errors import UsageError

__all__ = ["FEATURES", "VARIABLE", "has_vnni", "processor_features", "processors"]

VARIABLE = "TRTQ_CPU"
"""Environment variable that overrides the detected features: `-vnni`, `+vnni,-bf16`, ..."""
FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "amx_bf16"),
    "amx": ("amx_int8",),
}
"""Flags of `/proc/cpuinfo` by feature; one flag suffices. With `vnni`, int8 products are added in int32,
which cannot saturate."""


def processors() -> int:
    """Number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows.
        return os.cpu_count() or 1


def processor_features() -> frozenset[str]:
    """The names in `FEATURES` that this processor is assumed to have.

    The operating system reports the features, and TRTQ_CPU, a comma-separated list of `+name` and
    `-name`, overrides them. TRTQ_CPU changes how trtq prepares graphs, not which instructions runtimes
    use, so `+` of a missing feature may compute wrong results. If the system reports nothing, `vnni` is
    assumed.

    Raises:
        UsageError: TRTQ_CPU names an unknown feature.
    """
    features = set(_detected())
    for word in os.environ.get(VARIABLE, "").replace(",", " ").split():
        name = word.removeprefix("-") if word.startswith("-") else word.removeprefix("+")
        if name not in FEATURES:
            raise UsageError(
                f"{VARIABLE} holds {word[:40]!r}; write +NAME or -NAME, separated by commas, with NAME "
                f"one of {', '.join(FEATURES)}"
            )
        if word.startswith("-"):
            features.discard(name)
        else:
            features.add(name)
    return frozenset(features)


def has_vnni() -> bool:
    """Whether the processor is assumed to add int8 products in int32, see `processor_features`."""
    return "vnni" in processor_features()


@functools.cache
def _detected() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset({"vnni"})
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((set(value.split()) for key, _, value in lines if key.strip() == "flags"), None)
    if flags is None:  # Not x86; only old x86 processors are known to saturate.
        return frozenset({"vnni"})
    return frozenset(name for name, known in FEATURES.items() if flags & set(known))
