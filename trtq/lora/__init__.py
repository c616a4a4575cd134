"""LoRAs: read files of all layouts, and merge them into float weights."""

from trtq.lora.merge import MergedLora, merge_loras
from trtq.lora.read import Lora, read_lora
from trtq.lora.request import LoraRequest, parse_lora

__all__ = ["Lora", "LoraRequest", "MergedLora", "merge_loras", "parse_lora", "read_lora"]
