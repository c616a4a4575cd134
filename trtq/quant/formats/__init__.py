"""Formats of low-bit layers other than integers: weight-only codes, FP8 and NVFP4.

Each format has a training form (a subclass of `QuantLayer`), tensors in a file, and a deployed form.
"""

from trtq.precision import (
    FORMATS,
    GROUPS,
    HALF_BITS,
    Format,
    Precision,
    fitting_group,
    parse_precision,
    precision_text,
)
from trtq.quant.formats.registry import (
    DEPLOYED_FORMS,
    QUANTIZED_INPUTS,
    FormatTensors,
    deployed_form,
    format_range,
    layer_class,
    merged_tensors,
    stored_tensors,
)

__all__ = [
    "DEPLOYED_FORMS",
    "FORMATS",
    "GROUPS",
    "HALF_BITS",
    "QUANTIZED_INPUTS",
    "Format",
    "FormatTensors",
    "Precision",
    "deployed_form",
    "fitting_group",
    "format_range",
    "layer_class",
    "merged_tensors",
    "parse_precision",
    "precision_text",
    "stored_tensors",
]
