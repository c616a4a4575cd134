"""nvidia-modelopt compared with trtq: quality at equal bits, size, and what reaches the ONNX file.

    PYTHONPATH=DIR python benchmarks/modelopt.py [--models digits shapes digits-dit] [--only NAME ...]
        [--images 200] [--steps 20] [--calibration 64] [--no-export] [--tuned] [--check]

Both quantise the same float model, calibrate on the same images (noise, conditions, steps, guidance) and
are judged by the same evaluation against the same float images. A layer has the same bits in both: the
layers that trtq keeps at 8 bits are at 8 bits in modelopt, too, and layers in float are in float.
Modelopt runs as it does before an export, with integers simulated in float32. Its ONNX file is written
by `torch.onnx.export`, as in its examples. Rows that are already in the output are skipped. Time is not
measured, so other programs may run at the same time.

`--no-export` leaves trtq's exports out, which take longer than its quantisation; modelopt's stay.
`--tuned` adds fine-tuned rows of trtq, for information. The exit code is 1 if a row of modelopt has a
higher SNR of the noise prediction, or a smaller file, than the best post-training row of trtq at the
same bits. `--check` judges the rows in the output and measures nothing.

Modelopt need not be installed in the environment of trtq, only in a folder DIR:

    pip install --no-deps --target DIR nvidia-modelopt==0.47.0 omegaconf pulp nvidia-ml-py
    pip install --no-deps --target DIR antlr4-python3-runtime==4.9.3
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

import trtq
from trtq.artefact.manifest_file import package_versions
from trtq.calib.recipe import Recipe
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.sampling import predict, seeded_noise, walk
from trtq.evaluation.frechet import feature_statistics, frechet_distance
from trtq.evaluation.metrics import noise_prediction_snr, pixel_scores, score_images
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.pipelines.draw import draw
from trtq.pipelines.open import open_any
from trtq.seeds import seeded_generator

MODELS = ("digits", "shapes", "digits-dit")
OURS: dict[str, dict[str, Any]] = {
    "w8a8": {"method": "search", "bits": "w8a8"},
    "w4a8": {"method": "search", "bits": "w4a8"},
    "w4a4": {"method": "search", "bits": "w4a4"},
    "fp8": {"method": "search", "format": "fp8"},
}
"""Recipes of trtq without fine-tuning, by bits."""
BY_OUTPUT: dict[str, dict[str, Any]] = {
    f"trtq {bits}, ranges by output": {
        "method": "search",
        "bits": bits,
        "calibration": {"activations": "output"},
    }
    for bits in ("w8a8", "w4a8")
}
"""Recipes of trtq whose ranges are chosen by the layer's output, without fine-tuning."""
FURTHER: dict[str, dict[str, Any]] = {
    "trtq w8a8, min-max": {"method": "minmax", "bits": "w8a8"},
    "trtq w4a8, min-max": {"method": "minmax", "bits": "w4a8"},
    "trtq w4a8, search, rotated, row scales": {
        "method": "search",
        "bits": "w4a8",
        "rotate": 64,
        "scales": "row",
    },
    "trtq w4a4, search, rotated": {
        "method": "search",
        "bits": "w4a4",
        "rotate": 64,
        "scales": "auto",
    },
    "trtq w4a4, search, rotated, row scales": {
        "method": "search",
        "bits": "w4a4",
        "rotate": 64,
        "scales": "row",
    },
}
"""Further recipes of trtq without fine-tuning, for the transformer."""
TUNED: dict[str, dict[str, Any]] = {
    "digits": {"method": "combined", "bits": "w4a4"},
    "shapes": {"method": "combined", "bits": "w4a4", "training": {"iterations": 200, "batch": 20}},
    "digits-dit": {"method": "best", "bits": "w4a4", "training": {"iterations": 200, "batch": 20}},
}
"""Fine-tuned recipes of trtq, by model."""
THEIRS: dict[str, tuple[str, Any, str]] = {
    "INT8, max": ("w8a8", "max", "max"),
    "INT8, SmoothQuant": ("w8a8", "smoothquant", "max"),
    "W4A8, max": ("w4a8", "max", "max"),
    "W4A8, MSE": ("w4a8", "mse", "max"),
    "W4A8, AWQ": ("w4a8", "awq_lite", "max"),
    "W4A4, max": ("w4a4", "max", "max"),
    "W4A4, MSE": ("w4a4", "mse", "max"),
    "W4A4, entropy": ("w4a4", "max", "histogram"),
    "W4A4, SmoothQuant": ("w4a4", "smoothquant", "max"),
    "W4A4, SVDQuant": ("w4a4", {"method": "svdquant", "lowrank": 32}, "max"),
    "W4A4, SVDQuant of rank 2": ("w4a4", {"method": "svdquant", "lowrank": 2}, "max"),
    "FP8": ("fp8", "max", "max"),
}
"""Bits, algorithm of the weights, and calibrator of the activations of modelopt's rows."""
NOT_EXPORTED = "not exported"
TIE_DB = 0.05
"""Differences of the mean SNR below this count as equal."""


def modelopt() -> Any:
    """The package's quantisation module.

    Raises:
        SystemExit: it is not importable; the message says how to install it.
    """
    # This script has the package's name, and Python looks in the folder of the script first.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != folder]
    try:
        return importlib.import_module("modelopt.torch.quantization")
    except ImportError as err:
        raise SystemExit(
            f"nvidia-modelopt cannot be imported ({err}): pip install --no-deps --target DIR "
            "nvidia-modelopt==0.47.0 omegaconf antlr4-python3-runtime==4.9.3 pulp nvidia-ml-py, then "
            "PYTHONPATH=DIR python benchmarks/modelopt.py"
        ) from None


def configuration(
    layers: list[dict[str, Any]], bits: str, algorithm: Any, calibrator: str
) -> dict[str, Any]:
    """Settings of modelopt with the layers and bits of a run of trtq.

    Args:
        layers: layers of the run, see `trtq inspect`.
        bits: `fp8`, or other bits.
        algorithm: modelopt's algorithm.
        calibrator: modelopt's calibrator of activations.
    """
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for row in layers:
        weight: dict[str, Any] = {"num_bits": row["weight_bits"], "axis": 0}
        given: dict[str, Any] = {"num_bits": row["activation_bits"], "axis": None}
        if bits == "fp8" and row["format"] == "fp8":
            # As in modelopt's FP8_DEFAULT_CFG.
            weight, given = {"num_bits": (4, 3), "axis": None}, {"num_bits": (4, 3), "axis": None}
        if calibrator != "max":
            given["calibrator"] = calibrator
        rules.append({"quantizer_name": f"{row['name']}.weight_quantizer", "cfg": weight})
        rules.append({"quantizer_name": f"{row['name']}.input_quantizer", "cfg": given})
    return {"quant_cfg": rules, "algorithm": algorithm}


Loop = Callable[[nn.Module], None]


def calibrate_on(source: LoadedPipeline, reference: ReferenceSet, images: int) -> Loop:
    """A function that calls a model at every step of the images that trtq calibrates on."""
    recipe = Recipe(method="search", bits="w8a8")
    conditions = source.draw_conditions(
        images, seeded_generator(recipe.seed, "calibration conditions")
    )
    noise = seeded_noise(source.sample_shape, recipe.seed, 0, images, "calibration")
    schedule, guidance = source.schedule(reference.steps), reference.guidance
    points = [
        (point.x, point.timestep)
        for point in walk(source.denoiser, schedule, noise, conditions, guidance)
    ]

    def loop(model: nn.Module) -> None:
        for x, timestep in points:
            with torch.no_grad():
                predict(model, x, timestep, conditions, guidance)

    return loop


def quantised(
    model: str, layers: list[dict[str, Any]], row: tuple[str, Any, str], loop: Loop
) -> LoadedPipeline:
    """The pipeline of a model whose denoiser modelopt has quantised."""
    package, (bits, algorithm, calibrator) = modelopt(), row
    target = open_pipeline(model)
    settings = configuration(layers, bits, algorithm, calibrator)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if calibrator == "histogram":
            # modelopt leaves the choice of the range of a histogram to the caller.
            settings["algorithm"] = None
            package.quantize(target.denoiser, settings)
            _entropy(target.denoiser, loop)
        else:
            package.quantize(target.denoiser, settings, loop)
    return target


def _entropy(model: nn.Module, loop: Loop) -> None:
    """Calibrate activations by entropy, and weights by their maximum."""
    kind = importlib.import_module("modelopt.torch.quantization.nn").TensorQuantizer
    quantizers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, kind) and module.is_enabled
    ]
    for _, module in quantizers:
        module.disable_quant()
        module.enable_calib()
    loop(model)
    for name, module in quantizers:
        by = {} if name.endswith("weight_quantizer") else {"method": "entropy"}
        module.load_calib_amax(**by)
        module.disable_calib()
        module.enable_quant()


class _Positional(nn.Module):
    """A denoiser whose inputs are positional, for the export."""

    def __init__(self, denoiser: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *values: Tensor) -> Any:
        given = dict(zip(self.names, values, strict=True))
        return self.denoiser(**given, return_dict=False)[0]


def written(source: LoadedPipeline) -> dict[str, Any]:
    """What `torch.onnx.export` writes of a quantised denoiser: `bytes` and `reached`, in words."""
    denoiser = source.denoiser
    calls: list[dict[str, Any]] = []
    handle = denoiser.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    x = seeded_noise(source.sample_shape, 0, 0, 2)
    with torch.no_grad():
        predict(denoiser, x, 500.0, source.draw_conditions(2, seeded_generator(0, "export")))
    handle.remove()
    inputs = {name: value for name, value in calls[0].items() if isinstance(value, Tensor)}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        try:
            with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
                torch.onnx.export(
                    _Positional(denoiser, list(inputs)).eval(),
                    tuple(inputs.values()),
                    str(path),
                    dynamo=False,
                    opset_version=20,
                    input_names=list(inputs),
                )
        except Exception as err:  # Any exception of the exporter is a result.
            return {"reached": f"no file: {_line(err)}"}
        graph = onnx.load(str(path)).graph
        size = sum(file.stat().st_size for file in Path(scratch).iterdir())
        return {"bytes": size, "reached": reached(graph), "loads": _loads(path)}


def reached(graph: Any) -> str:
    """The form in which a graph's quantised weights and activations are stored."""
    stored = {value.name: value.data_type for value in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    forms: Counter[str] = Counter()
    for node in graph.node:
        if "DequantizeLinear" not in node.op_type:
            continue
        first = node.input[0]
        if first in stored:
            name = onnx.TensorProto.DataType.Name(stored[first])
            forms[f"weights in {name}"] += 1
        elif first in made and "QuantizeLinear" in made[first].op_type:
            origin = made[first].input[0]
            kind = "weights in FLOAT, with Q/DQ" if origin in stored else "activations with Q/DQ"
            forms[kind] += 1
        else:
            forms["activations with DQ only"] += 1
    return "; ".join(f"{count} {form}" for form, count in sorted(forms.items())) or "no Q/DQ"


def _loads(path: Path) -> bool:
    """Whether onnxruntime can load the file."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's exceptions share no base.
        return False
    return True


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:160]


def judged(source: LoadedPipeline, reference: ReferenceSet) -> dict[str, Any]:
    """The metrics of `trtq eval`, of a pipeline that may lie in memory only."""
    assert reference.extractor is not None
    assert reference.scores is not None
    with torch.no_grad():
        drawn = draw(source, reference.conditioning, **reference.sampling)
        snr = noise_prediction_snr(source, reference.source, **reference.sampling)
    scores = score_images(drawn, reference.conditioning.labels, reference.extractor)
    fd = scores.fd
    if fd is None:  # The model has no images to compare with but those of the float model.
        fd = frechet_distance(
            *map(feature_statistics, (scores.features, reference.scores.features))
        )
    return {
        "fd": fd,
        str(reference.accuracy_name): scores.accuracy,
        "psnr_db": pixel_scores(drawn, reference.images)["psnr_db"],
        "snr_db": snr,
    }


def our_row(
    model: str, recipe: dict[str, Any], reference: ReferenceSet, *, exported: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of trtq without its name, and its layers."""
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "onnx"
        result = trtq.quantize(model, recipe | {"steps": reference.steps}, run)
        assert result is not None
        made = result.to_json()
        layers = trtq.inspect(run).to_json()["layers"]
        row = judged(open_any(run), reference) | {"packed_bytes": made["bytes_after"]}
        if not exported:
            return row | {"reached": NOT_EXPORTED}, layers
        trtq.export(run, out)
        denoiser = out / open_pipeline(model).denoiser_name
        graph = onnx.load(str(denoiser / "model.onnx"), load_external_data=False).graph
        size = sum(file.stat().st_size for file in denoiser.iterdir())
    types: Counter[str] = Counter(
        onnx.TensorProto.DataType.Name(value.data_type)
        for value in graph.initializer
        if len(value.dims) > 1
    )
    codes = [f"{count} tensors in {name}" for name, count in types.items() if name[:3] != "FLO"]
    return row | {"bytes": size, "reached": "; ".join(codes), "loads": True}, layers


def shown(recipe: dict[str, Any]) -> str:
    """A recipe in words."""
    budget = recipe.get("training", {})
    words = [f"`{recipe['method']}`"]
    if budget:
        words.append(f"{budget['iterations']} iterations of {budget['batch']} images")
    return ", ".join(words)


def bits_per_weight(model: str, layers: list[dict[str, Any]], rank: int = 0) -> float:
    """Mean bits of a quantised weight; a float branch of a rank counts with 16 bits per value.

    Args:
        model: name of the model.
        layers: its quantised layers.
        rank: rank of the branch that SVDQuant adds to each linear layer.
    """
    denoiser = open_pipeline(model).denoiser
    bits = weights = 0
    for row in layers:
        weight = denoiser.get_submodule(row["name"]).get_parameter("weight")
        weights += weight.numel()
        bits += weight.numel() * row["weight_bits"]
        if weight.ndim == 2:
            bits += 16 * min(rank, *weight.shape) * sum(weight.shape)
    return bits / weights


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of modelopt that are better than the best row of trtq without fine-tuning."""
    worse = []
    for theirs in (row for row in rows if row["by"] == "modelopt" and "snr_db" in row):
        same = [
            row
            for row in rows
            if row["by"] == "trtq"
            and row["post_training"]
            and (row["model"], row["bits"]) == (theirs["model"], theirs["bits"])
        ]
        if not same:
            continue
        ours = max(same, key=lambda row: statistics.fmean(row["snr_db"]))
        names = f"{ours['model']}, {ours['name']} against {theirs['name']}"
        pair = statistics.fmean(ours["snr_db"]), statistics.fmean(theirs["snr_db"])
        if pair[0] < pair[1] - TIE_DB:
            worse.append(f"{names}: SNR {pair[0]:.2f} dB, not {pair[1]:.2f} dB")
        # Without an export, the size of the run's file counts.
        size = ours.get("bytes", ours["packed_bytes"])
        if size > theirs.get("bytes", size):
            worse.append(f"{names}: {size:,} bytes, not {theirs['bytes']:,}")
    return worse


def measured(
    model: str, record: dict[str, Any], keep: Callable[[], None], options: argparse.Namespace
) -> None:
    """Measure the missing rows of a model, and keep the record after each."""
    done = {
        (row["model"], row["name"])
        for row in record["rows"]
        if not options.export or row["reached"] != NOT_EXPORTED
    }
    plans: list[tuple[str, str, dict[str, Any], bool]] = [
        (f"trtq {bits}, search", bits, recipe, True) for bits, recipe in OURS.items()
    ]
    plans += [(name, recipe["bits"], recipe, True) for name, recipe in BY_OUTPUT.items()]
    if model == "digits-dit":
        plans += [(name, recipe["bits"], recipe, True) for name, recipe in FURTHER.items()]
    plans += [("trtq w4a4, fine-tuned", "w4a4", TUNED[model], False)] * options.tuned
    names = [name for name, *_ in plans] + list(THEIRS)
    missing = [
        n for n in names if (model, n) not in done and (not options.only or n in options.only)
    ]
    if not missing:
        return
    reference = draw_reference(model, images=options.images, steps=options.steps, seed=1)
    assert reference.scores is not None
    record["float"][model] = {
        "fd": reference.scores.fd,
        "accuracy": reference.scores.accuracy,
        "images": options.images,
        "steps": options.steps,
        "calibration": options.calibration,
    }

    def add(row: dict[str, Any]) -> None:
        row["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
        same = row["model"], row["name"]
        record["rows"] = [r for r in record["rows"] if (r["model"], r["name"]) != same]
        record["rows"].append(row)
        keep()
        snr = statistics.fmean(row.get("snr_db", [float("nan")]))
        print(f"{model:10} {row['name']:28} SNR {snr:5.2f} dB  {row.get('reached')}", flush=True)

    for name, bits, recipe, post in plans:
        if name in missing:
            images = {"images": options.calibration}
            recipe = recipe | {"calibration": recipe.get("calibration", {}) | images}
            row, layers = our_row(model, recipe, reference, exported=options.export)
            record["layers"].setdefault(model, {}).setdefault(
                bits,
                [
                    {
                        key: layer[key]
                        for key in ("name", "weight_bits", "activation_bits", "format")
                    }
                    for layer in layers
                ],
            )
            about = {
                "model": model,
                "by": "trtq",
                "name": name,
                "bits": bits,
                "post_training": post,
                "recipe": shown(recipe),
            }
            add(about | row | {"weight_bits": bits_per_weight(model, layers)})
    loop = calibrate_on(open_pipeline(model), reference, options.calibration)
    for name, plan in THEIRS.items():
        if name in missing:
            about = {"model": model, "by": "modelopt", "name": name, "bits": plan[0]}
            try:
                layers = record["layers"][model][plan[0]]
                target = quantised(model, layers, plan, loop)
                row = judged(target, reference)
            except Exception as err:  # What modelopt cannot do is a result.
                add(about | {"reached": f"fails: {_line(err)}"})
                continue
            rank = plan[1]["lowrank"] if isinstance(plan[1], dict) else 0
            row |= {"weight_bits": bits_per_weight(model, layers, rank)}
            add(about | row | written(target))


def main() -> int:
    """Measure the missing rows, compare them, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--export", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/modelopt.json")
    )
    options = parser.parse_args()
    record: dict[str, Any] = {"float": {}, "layers": {}, "rows": []}
    if options.output.is_file():
        record = json.loads(options.output.read_text(encoding="utf-8"))

    def keep() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    if not options.check:
        modelopt()
        record["packages"] = package_versions() | {
            "nvidia-modelopt": importlib.import_module("modelopt").__version__
        }
        for model in options.models:
            measured(model, record, keep, options)
    worse = compared(record["rows"])
    print("\n".join(worse) or "trtq is nowhere worse than modelopt at equal bits", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
