"""LoRAs: read files of all layouts, and merge them into float weights.

Each name is imported at its first use: reading a request loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtq.lora.merge import MergedLora, merge_loras
    from trtq.lora.read import Lora, read_lora
    from trtq.lora.request import LoraRequest, parse_lora

__all__ = ["Lora", "LoraRequest", "MergedLora", "merge_loras", "parse_lora", "read_lora"]

_MODULES = {
    "Lora": "read",
    "LoraRequest": "request",
    "MergedLora": "merge",
    "merge_loras": "merge",
    "parse_lora": "request",
    "read_lora": "read",
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
