"""TensorRT-RTX engines of every form of low-bit layer at real sizes, built without a GPU.

    python benchmarks/format_engines.py [NAME ...] [--folder DIR]

The models: a UNet of Stable Diffusion 1.5's size (859.5 M parameters) and a DiT of 1.15 B
parameters, both with random weights, and the shipped transformer. Each run is calibrated on one
image at one step, since only its size counts. Rotation is applied to every layer that it fits
(`trtq quantize` rotates a layer only where that lowers its error, which random weights do not
show). Each graph is exported in half precision, built for the architectures that have the format,
and its engine compared with that of the float graph for the same architectures. Every stage runs in
a separate process. Rows are written as they are measured; rows of other names are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd_size import stage, write_checkpoint

from trtq.artefact.opened import open_folder
from trtq.bench.device import cpu_name
from trtq.engine.tensorrt.backends import BACKENDS

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "format_engines.json"
ALL, FP8, FP4 = ("sm86", "sm89", "sm120"), ("sm89", "sm120"), ("sm120",)
_ROTATED = ("--bits", "w8a8", "--rotate", "64", "--scales", "row", "--no-smooth")


@dataclass(frozen=True)
class Form:
    """A form of the low-bit layers.

    Attributes:
        architectures: GPU architectures that have the form.
        options: options of `trtq quantize`; none: the float model.
        rotated: whether every layer is rotated.
    """

    architectures: tuple[str, ...] = ALL
    options: tuple[str, ...] = ()
    rotated: bool = field(default=False, kw_only=True)


FORMS = {
    "float": Form(),
    "W8A8": Form(ALL, ("--bits", "w8a8", "--no-smooth")),
    "W8A8, rotated, row scales": Form(ALL, _ROTATED, rotated=True),
    "FP8": Form(FP8, ("--format", "fp8", "--no-smooth")),
    "NVFP4": Form(FP4, ("--format", "nvfp4", "--no-smooth")),
    "W4A16": Form(ALL, ("--bits", "w4a16", "--group", "64", "--no-smooth")),
}
MODELS = {
    "digits-dit": tuple(FORMS),
    "sd_1": ("float", "W8A8", "W8A8, rotated, row scales", "FP8", "NVFP4"),
    "dit_1b": ("float", "W4A16"),
}


def write_dit(folder: Path) -> None:
    """A class-conditional DiT of 1.15 B parameters with random weights, in half precision."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=28,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=18,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=256,
    )
    DiTPipeline(model.half(), vae, DDIMScheduler()).save_pretrained(folder)


def checkpoint(model: str, folder: Path) -> str:
    """Name or folder of a float model."""
    if model == "digits-dit":
        return model
    place = folder / model
    if not place.is_dir():
        if model == "sd_1":
            write_checkpoint(place, model)
        else:
            write_dit(place)
    return str(place)


def quantize_rotated(arguments: list[str]) -> None:
    """`trtq quantize` with a rotation of every layer, regardless of its error."""
    import math

    from trtq.calib import transforms
    from trtq.cli import app

    transforms._GAIN_OF_ROTATION = math.inf
    app(arguments)


def graph_of(model: str, name: str, folder: Path) -> dict[str, Any]:
    """Make and export one form; return the result of the export. `folder/onnx` holds the graphs."""
    form, onnx, run = FORMS[name], folder / "onnx", folder / "run"
    for place in (onnx, run):
        shutil.rmtree(place, ignore_errors=True)
    source = checkpoint(model, folder)
    if form.options:
        recipe = folder / "recipe.toml"
        recipe.write_text('method = "minmax"\n[calibration]\nimages = 1\nsamples_per_step = 64\n')
        options = ("--recipe", str(recipe), "--steps", "1", *form.options)
        program = (__file__, "--rotated") if form.rotated else ("-m", "trtq.cli")
        stage("quantize", source, "-o", str(run), *options, program=program)
        source = str(run)
    return stage("export", source, "-o", str(onnx), "--precision", "fp16", "--batch", "1:4")


def measure(model: str, name: str, folder: Path) -> list[dict[str, Any]]:
    """Export one form, and build it for each of its architectures and for all of them together."""
    exported, onnx, engine = graph_of(model, name, folder), folder / "onnx", folder / "engine"
    manifest = open_folder(onnx).manifest
    form, rows = FORMS[name], []
    wanted = {(arch,) for arch in ALL} | {ALL, FP8} if name == "float" else set()
    wanted |= {(arch,) for arch in form.architectures} | {form.architectures}
    for architectures in sorted(wanted, key=lambda names: (len(names), names)):
        chosen = [part for architecture in architectures for part in ("--arch", architecture)]
        result = stage("build", str(onnx), "-o", str(engine), *chosen, "--no-cache", "--overwrite")
        (row,) = [row for row in result["engines"] if row["name"] == manifest.denoiser]
        rows.append(
            {
                "model": model,
                "form": name,
                "architectures": list(architectures),
                "engine_bytes": row["engine_bytes"],
                "seconds": round(row["parse_seconds"] + row["build_seconds"], 1),
                "peak_rss_bytes": row["peak_rss_bytes"],
                "parity_db_min": exported["parity_db_min"],
                "rotated": sum(layer.rotate > 0 for layer in manifest.layers),
                "low_bit": sum(layer.weight_bits is not None for layer in manifest.layers),
                "layers": len(manifest.layers),
                "date": datetime.now(UTC).date().isoformat(),
            }
        )
    shutil.rmtree(engine, ignore_errors=True)
    return rows


def main() -> None:
    """Measure and write every row of the named models."""
    if sys.argv[1:2] == ["--rotated"]:
        quantize_rotated(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--folder", type=Path, help="Folder to keep the checkpoints in.")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), help="Only these forms.")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(ROOT.parent))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for model in options.names or MODELS:
            for name in MODELS[model]:
                if name not in options.forms:
                    continue
                rows = measure(model, name, folder)
                write(options.output, model, name, rows)
                for row in rows:
                    print(json.dumps(row), flush=True)


def write(output: Path, model: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of one form in the results."""
    stored = json.loads(output.read_text())["rows"] if output.is_file() else []
    stored = [row for row in stored if (row["model"], row["form"]) != (model, name)] + rows
    record = {
        "device": cpu_name(),
        "builder": f"tensorrt-rtx {BACKENDS['tensorrt-rtx'].version}",
        "rows": stored,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
