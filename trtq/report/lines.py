"""Results as lines for people: labels, units, percent. The numbers of `--json` stay as they are.

Each function takes the dictionary that a verb returns and gives rows `(label, text)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "INTERVALS",
    "bytes_text",
    "doctor_rows",
    "evaluation_rows",
    "export_rows",
    "generate_rows",
    "inspect_rows",
    "plan_rows",
    "quantize_rows",
    "seconds_text",
]

Rows = list[tuple[str, str]]

_UNITS = ("kB", "MB", "GB", "TB", "PB")
_MAX_LISTED = 8


def bytes_text(count: float) -> str:
    """A size in decimal units: `743744` -> `744 kB`, `4815492` -> `4.82 MB`."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in _UNITS:
        count /= 1000
        if count < 999.5 or unit == _UNITS[-1]:
            break
    return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"


def seconds_text(seconds: float) -> str:
    """A duration: `0.068` -> `0.068 s`, `75` -> `1 min 15 s`, `7500` -> `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _listed(items: Sequence[Any], form: str = "") -> str:
    shown = ", ".join(format(item, form) for item in items[:_MAX_LISTED])
    more = len(items) - _MAX_LISTED
    return f"{shown}, and {more} more" if more > 0 else shown


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _value(value: Any) -> str:
    """Any other value: no Python literal is shown."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_label(key)} {_value(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "-"
    return str(value)


def _label(key: Any) -> str:
    return str(key).replace("_", " ")


def _rest(result: Mapping[str, Any], known: Sequence[str]) -> Rows:
    """What a result holds beyond the keys that have a line of their own."""
    return [(_label(key), _value(value)) for key, value in result.items() if key not in known]


def _cost(result: Mapping[str, Any]) -> Rows:
    rows = []
    if "seconds" in result:
        rows.append(("time", seconds_text(result["seconds"])))
    if "peak_rss_bytes" in result:
        rows.append(("peak memory", bytes_text(result["peak_rss_bytes"])))
    return rows


_DENOISER = ("layers_quantized", "layers_float", "bytes_before", "bytes_after")
_COST = ("seconds", "peak_rss_bytes")


def _denoiser(result: Mapping[str, Any]) -> Rows:
    before, after = result["bytes_before"], result["bytes_after"]
    return [
        ("layers", f"{result['layers_quantized']} low-bit, {result['layers_float']} in float"),
        ("denoiser", f"{bytes_text(before)} -> {bytes_text(after)} ({after / before:.1%})"),
    ]


def quantize_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq quantize`, also where LoRAs were exchanged."""
    rows = _denoiser(result)
    known = [*_DENOISER, *_COST]
    if "fine_tune_seconds" in result:
        known += ["fine_tune_seconds", "fine_tune_iterations"]
        spent = seconds_text(result["fine_tune_seconds"])
        rows.append(("fine-tuning", f"{result['fine_tune_iterations']} iterations in {spent}"))
    return rows + _rest(result, known) + _cost(result)


def plan_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq quantize --dry-run`."""
    rows = [
        ("model", f"{result['model']} ({result['denoiser']})"),
        ("method", result["method"]),
        *_denoiser(result),
        ("precisions", _counts(result["precisions"])),
    ]
    if result["float"]:
        rows.append(("layers in float", _listed(result["float"])))
    rows.append(("calibrated timesteps", str(result["timesteps"])))
    if result["iterations"]:
        parameters = f"{result['adapter_parameters']:,} adapter parameters"
        rows.append(("fine-tuning", f"{result['iterations']} iterations, {parameters}"))
    known = [
        "model",
        "denoiser",
        "method",
        *_DENOISER,
        "precisions",
        "float",
        "timesteps",
        "iterations",
        "adapter_parameters",
        "estimated_seconds",
        "estimated_peak_bytes",
    ]
    rows += _rest(result, known)
    if "estimated_seconds" in result:
        rows += [
            ("estimated time", f"about {seconds_text(result['estimated_seconds'])} on this CPU"),
            ("estimated peak memory", f"about {bytes_text(result['estimated_peak_bytes'])}"),
        ]
    return rows


def export_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq export`."""
    rows: Rows = []
    if result.get("parity_db_min") is not None:
        worst = _decibel(result["parity_db_min"])
        rows.append(("parity with torch", f"{worst} at the worst step"))
    pooled = result.get("parity_db_pooled_min")
    if pooled is not None:
        rows.append(("", f"{_decibel(pooled)} with values at rounding ties counted"))
    if result.get("parity_ties") is not None:
        rows.append(("images at rounding ties", f"{result['parity_ties']:.2%}"))
    if result.get("parity_largest_db") is not None:
        rows.append(("at the largest size", _decibel(result["parity_largest_db"])))
    rows += [
        (f"parity of {name}", _decibel(value))
        for name, value in (result.get("parity_parts_db") or {}).items()
    ]
    if "bytes" in result:
        rows.append(("files", bytes_text(result["bytes"])))
    known = [
        "parity_db",
        "parity_floor_db",
        "parity_db_min",
        "parity_db_pooled_min",
        "parity_ties",
        "parity_largest_db",
        "parity_parts_db",
        "bytes",
        *_COST,
    ]
    return rows + _rest(result, known) + _cost(result)


_EXACT_DB = 200.0
"""What `trtq.exporter.parity` gives for equal values."""


def _decibel(value: float) -> str:
    return "exact" if value >= _EXACT_DB else f"{value:.1f} dB"


def generate_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq generate`."""
    count = result["images"]
    rows = [("written", result["output"])]
    rows.append(("images", f"{count}, {result['steps']} steps, seed {result['seed']}"))
    if result.get("labels"):
        rows.append(("classes", _listed(result["labels"])))
    if result.get("prompts"):
        rows.append(("prompt", _listed(list(dict.fromkeys(result["prompts"])))))
    known = ["output", "files", "images", "steps", "seed", "labels", "prompts", *_COST]
    return rows + _rest(result, known) + _cost(result)


INTERVALS = {
    "fd": "fd_interval",
    "class_accuracy": "accuracy_interval",
    "faithfulness": "accuracy_interval",
    "psnr_db": "psnr_db_interval",
    "ssim": "ssim_interval",
}
_METRICS = {
    "fd": ("Fréchet distance (FD)", ".2f"),
    "fd_ratio": ("FD, ratio to float", ".3f"),
    "sfd": ("spatial FD to float", ".3f"),
    "class_accuracy": ("class accuracy", ".1%"),
    "faithfulness": ("faithfulness", ".1%"),
    "inception_score": ("inception score", ".3f"),
    "precision": ("precision", ".1%"),
    "recall": ("recall", ".1%"),
    "psnr_db": ("PSNR to float, dB", ".1f"),
    "ssim": ("SSIM to float", ".4f"),
    "snr_db_min": ("worst step's SNR, dB", ".1f"),
}


def evaluation_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of `trtq eval`: metric, this model, float model; 95 % intervals in brackets."""
    rows = []
    for key, (label, form) in _METRICS.items():
        if result.get(key) is not None:
            interval = INTERVALS.get(key, "")
            own = _with_interval(result[key], result.get(interval), form)
            other = result.get(f"{key}_reference")
            float_interval = result.get(f"{interval}_reference")
            theirs = "" if other is None else _with_interval(other, float_interval, form)
            rows.append((label, own, theirs))
    return rows


def _with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    text = format(value, form)
    if interval is None:
        return text
    return f"{text} ({format(interval[0], form)} .. {format(interval[1], form)})"


def inspect_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq inspect`, the layers left out."""
    rows: Rows = [("kind", result["kind"]), ("made from", result["source"])]
    if "bytes" in result:
        rows.append(("files", bytes_text(result["bytes"])))
    if "parameters" in result:
        rows.append(("parameters", f"{result['parameters']:,}"))
    if result.get("precisions"):
        rows.append(("layers", _counts(result["precisions"])))
    if result.get("timesteps"):
        points = result["timesteps"]
        rows.append((f"{len(points)} calibrated timesteps", _ends(points)))
    known = [
        "kind",
        "source",
        "bytes",
        "parameters",
        "precisions",
        "timesteps",
        "layers",
        "recipe",
        "packages",
        "metrics",
        "engine_layers",
        "options",
    ]
    rows += [
        (_label(key), _option(key, value)) for key, value in (result.get("options") or {}).items()
    ]
    return rows + [(label, text) for label, text in _rest(result, known) if text != "-"]


def _option(key: str, value: Any) -> str:
    if key == "batch" and isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[0]} to {value[1]} images"
    if key == "size" and isinstance(value, str):
        return f"{value} (HEIGHTxWIDTH in pixels)"
    return _value(value)


def _ends(points: Sequence[float]) -> str:
    """First, second and last of many values."""
    if len(points) <= _MAX_LISTED:
        return ", ".join(f"{point:g}" for point in points)
    return f"{points[0]:g}, {points[1]:g}, .. {points[-1]:g}"


def doctor_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq doctor`."""
    rows = [
        ("python", result["python"]),
        ("machine", result["machine"]),
        ("processor", _value(result.get("cpu_features") or ["-"])),
        ("VNNI (int8 products)", _value(result["vnni"])),
        ("NVIDIA driver", _value(result.get("driver") or "none")),
        ("CUDA device", result["cuda"] or "none"),
        ("providers", _value(result["providers"])),
        ("engine builders", _value(result["builders"])),
        ("shipped models", _value(result["models"])),
    ]
    known = [
        "ok",
        "problems",
        "hints",
        "packages",
        "python",
        "machine",
        "vnni",
        "cpu_features",
        "driver",
        "cuda",
        "providers",
        "builders",
        "models",
    ]
    rows += _rest(result, known)
    return rows + [
        (name, version or "not installed") for name, version in result["packages"].items()
    ]
