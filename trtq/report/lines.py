"""Results as readable lines with labels, units and percentages.

Each function takes the JSON object of a result and returns rows `(label, text)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtq.report.texts import (
    bytes_text,
    counts_text,
    decibel_text,
    ends_text,
    label_text,
    list_text,
    seconds_text,
    value_text,
)
from trtq.report.transforms import transform_rows

__all__ = [
    "INTERVALS",
    "bytes_text",
    "comfy_rows",
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


def _rest(result: Mapping[str, Any], known: Sequence[str]) -> Rows:
    """Lines of the remaining keys, for which there is no special format."""
    return [
        (label_text(key), value_text(value)) for key, value in result.items() if key not in known
    ]


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
    """Lines of `trtq quantize`, including the exchange of LoRAs."""
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
        ("precisions", counts_text(result["precisions"])),
    ]
    if result["float"]:
        rows.append(("layers in float", list_text(result["float"])))
    rows.append(("calibrated timesteps", str(result["timesteps"])))
    rows.append(("calibration images", str(result["calibration_images"])))
    if result["iterations"]:
        parameters = f"{result['adapter_parameters']:,} adapter parameters"
        each = f" of each of {result['blocks']} blocks" if "blocks" in result else ""
        rows.append(("fine-tuning", f"{result['iterations']} iterations{each}, {parameters}"))
    known = [
        "model",
        "denoiser",
        "method",
        *_DENOISER,
        "precisions",
        "float",
        "timesteps",
        "calibration_images",
        "iterations",
        "blocks",
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
        worst = decibel_text(result["parity_db_min"])
        rows.append(("parity with torch", f"{worst} at the worst step"))
    pooled = result.get("parity_db_pooled_min")
    if pooled is not None:
        rows.append(("", f"{decibel_text(pooled)} including values at rounding ties"))
    if result.get("parity_ties") is not None:
        rows.append(("images at rounding ties", f"{result['parity_ties']:.2%}"))
    if result.get("parity_largest_db") is not None:
        rows.append(("at the largest size", decibel_text(result["parity_largest_db"])))
    rows += [
        (f"parity of {name}", decibel_text(value))
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


def comfy_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq export --target comfy`."""
    rows: Rows = []
    for file in result["files"]:
        formats = counts_text(file["formats"]) or "none"
        rows += [
            ("file", f"{file['path']}, {bytes_text(file['bytes'])}"),
            ("quantised layers", formats),
            ("names", f"of {'the authors' if file['names'] == 'original' else 'diffusers'}"),
            *(("note", note) for note in file["notes"]),
        ]
    return rows + _cost(result)


def generate_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq generate`."""
    count, steps = result["images"], result["steps"]
    rows = [("written", result["output"])]
    what = {"video": "videos", "audio": "sounds"}.get(result.get("media") or "", "images")
    steps_text = "" if steps is None else f", {steps} steps"
    rows.append((what, f"{count}{steps_text}, seed {result['seed']}"))
    if result.get("labels"):
        rows.append(("classes", list_text(result["labels"])))
    if result.get("prompts"):
        rows.append(("prompt", list_text(list(dict.fromkeys(result["prompts"])))))
    known = ["output", "files", "images", "steps", "seed", "labels", "prompts", "media", *_COST]
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
    "fd_ratio": ("FD relative to float", ".3f"),
    "sfd": ("spatial FD, vs float", ".3f"),
    "class_accuracy": ("class accuracy", ".1%"),
    "faithfulness": ("faithfulness", ".1%"),
    "inception_score": ("inception score", ".3f"),
    "precision": ("precision", ".1%"),
    "recall": ("recall", ".1%"),
    "psnr_db": ("PSNR vs float, dB", ".1f"),
    "ssim": ("SSIM vs float", ".4f"),
    "snr_db_min": ("SNR of the worst step, dB", ".1f"),
}


def evaluation_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of `trtq eval`: metric, evaluated model, float model; 95 % intervals in brackets."""
    rows = []
    for key, (label, form) in _METRICS.items():
        if result.get(key) is not None:
            interval = INTERVALS.get(key, "")
            evaluated = _with_interval(result[key], result.get(interval), form)
            value = result.get(f"{key}_reference")
            float_interval = result.get(f"{interval}_reference")
            reference = "" if value is None else _with_interval(value, float_interval, form)
            rows.append((label, evaluated, reference))
    return rows


def _with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    text = format(value, form)
    if interval is None:
        return text
    return f"{text} ({format(interval[0], form)} .. {format(interval[1], form)})"


def inspect_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq inspect`, without the layers."""
    rows: Rows = [("kind", result["kind"]), ("source", result["source"])]
    if "bytes" in result:
        rows.append(("files", bytes_text(result["bytes"])))
    if "parameters" in result:
        rows.append(("parameters", f"{result['parameters']:,}"))
    if result.get("precisions"):
        rows.append(("layers", counts_text(result["precisions"])))
    rows += transform_rows(result.get("layers") or [])
    if result.get("timesteps"):
        points = result["timesteps"]
        rows.append((f"{len(points)} calibrated timesteps", ends_text(points)))
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
        "denoisers",
        "graphs",
    ]
    rows += [
        (label_text(key), _option(key, value))
        for key, value in (result.get("options") or {}).items()
    ]
    return rows + [(label, text) for label, text in _rest(result, known) if text != "-"]


def _option(key: str, value: Any) -> str:
    if key == "batch" and isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[0]} to {value[1]} images"
    if key == "size" and isinstance(value, str):
        return f"{value} (HEIGHTxWIDTH in pixels)"
    return value_text(value)


def doctor_rows(result: Mapping[str, Any]) -> Rows:
    """Lines of `trtq doctor`."""
    rows = [
        ("python", result["python"]),
        ("machine", result["machine"]),
        ("processor", value_text(result.get("cpu_features") or ["-"])),
        ("VNNI (int8 products)", value_text(result["vnni"])),
        ("NVIDIA driver", value_text(result.get("driver") or "none")),
        ("CUDA device", result["cuda"] or "none"),
        ("providers", value_text(result["providers"])),
        ("engine builders", value_text(result["builders"])),
        ("shipped models", value_text(result["models"])),
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
        "extras",
    ]
    rows += _rest(result, known)
    # The packages of extras are listed with them.
    optional = {name for extra in result["extras"] for name in extra["packages"]}
    return rows + [
        (name, version or "not installed")
        for name, version in result["packages"].items()
        if name not in optional
    ]
