"""Memory and time of quantisation and export for models that do not fit into memory in float32.

    python benchmarks/real_size.py [NAME ...] [--memory 16GB] [--folder DIR] [--export-only]

The denoisers of diffusers' classes in the published sizes, with random weights in the dtype in which
they are published: the UNet of Stable Diffusion XL (2.6 billion parameters) and the transformer of Flux
(11.9 billion). Text encoders and autoencoders are small ones, since only the cost of the denoiser is
measured. One image of 256 x 256 pixels is calibrated at two steps, W4A8 with rotation. The weights are
random, so the quality is not measured. `quantize` and `export` run in processes of their own, for their
own peaks of memory; other programs may run at the same time, which makes the time longer. Rows of
another model, command or limit are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sd_size import stage, write_checkpoint
from torch import nn

from trtq.artefact.opened import open_folder
from trtq.bench.device import cpu_name
from trtq.resources import available_bytes

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "real_size.json"
SHARD_BYTES = 2_000_000_000
KEYS = ("model", "command", "memory")
"""What two rows differ in."""


def write_random_weights(folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
    """Write shards with random weights for a model on torch's meta device."""
    from safetensors.torch import save_file

    stem, suffix = "diffusion_pytorch_model", ".safetensors"
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    generator = torch.Generator().manual_seed(0)
    places = {}
    for index, names in enumerate(shards):
        file = f"{stem}-{index + 1:05}-of-{len(shards):05}{suffix}"
        tensors = {
            name: (torch.randn(shapes[name], generator=generator) * 0.02).to(dtype)
            for name in names
        }
        for name, tensor in tensors.items():
            if "norm" in name and name.endswith("weight") and tensor.ndim == 1:
                tensor.fill_(1)
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(map(math.prod, shapes.values()))
    index_file = folder / f"{stem}{suffix}.index.json"
    index_file.write_text(
        json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": places}), encoding="utf-8"
    )


def write_flux(folder: Path) -> None:
    """Write a Flux pipeline with a transformer of the published size in bfloat16."""
    from diffusers import FluxTransformer2DModel

    from tests.families.pipelines import build

    pipeline = build("flux")
    # Widths of the small text encoders.
    config = dict(pipeline.transformer.config)
    widths = {name: config[name] for name in ("joint_attention_dim", "pooled_projection_dim")}
    pipeline.save_pretrained(folder)
    place = folder / "transformer"
    for path in place.glob("*.safetensors*"):
        path.unlink()
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=config["in_channels"],
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
            **widths,
        )
    model.save_config(place)
    write_random_weights(place, model, torch.bfloat16)


def write_sd_xl(folder: Path) -> None:
    """Write a pipeline of Stable Diffusion XL's size in half precision."""
    write_checkpoint(folder, "sd_xl")


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "sd_xl": (write_sd_xl, 'prompt = "a red circle"\nheight = 256\nwidth = 256\n'),
    "flux": (
        write_flux,
        'prompt = "a red circle"\nheight = 64\nwidth = 64\nmax_sequence_length = 64\n',
    ),
}
"""Function that writes a checkpoint, and the arguments of the call, by name.

The small autoencoder of the Flux pipeline divides a side by 2 instead of 8, so 64 pixels have the 256
tokens of 256 pixels.
"""


def quantize(name: str, folder: Path, memory: str) -> dict[str, Any]:
    """Quantise one model; return the row."""
    write, call = MODELS[name]
    checkpoint = folder / name
    if not checkpoint.is_dir():
        # In a process of its own, whose memory is free afterwards.
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(checkpoint,))
        writer.start()
        writer.join()
    recipe, arguments = folder / "recipe.toml", folder / "call.toml"
    recipe.write_text('method = "minmax"\n[calibration]\nimages = 1\n')
    arguments.write_text(call + 'num_inference_steps = 2\noutput_type = "latent"\n')
    made = stage(
        *("quantize", str(checkpoint), "-o", str(folder / f"{name}_run"), "--overwrite"),
        *("--recipe", str(recipe), "--call", str(arguments), "--steps", "2"),
        *("--bits", "w4a8", "--rotate", "64", "--memory", memory),
    )
    parameters = made["bytes_before"] // 4
    details = {"layers": made["layers_quantized"]}
    return _row(name, "quantize", memory, parameters, made, made["bytes_after"]) | details


def export(name: str, folder: Path, memory: str) -> dict[str, Any]:
    """Export the run of one model; return the row."""
    run, onnx = folder / f"{name}_run", folder / f"{name}_onnx"
    made = stage("export", str(run), "-o", str(onnx), "--overwrite", "--memory", memory)
    metrics = open_folder(run, "run").manifest.metrics
    assert metrics is not None
    parameters = (metrics.bytes_before or 0) // 4
    details = {key: made[key] for key in ("parity_db_min", "parity_floor_db")}
    return _row(name, "export", memory, parameters, made, made["bytes"]) | details


def _row(
    name: str, command: str, memory: str, parameters: int, made: dict[str, Any], size: int
) -> dict[str, Any]:
    return {
        "model": name,
        "command": command,
        "parameters": parameters,
        "memory": memory,
        "seconds": made["seconds"],
        "peak_rss_bytes": made["peak_rss_bytes"],
        "bytes": size,
        "share": size / (2 * parameters),
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[2],
        "available_bytes": available_bytes(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    """Measure and write every row of the named models."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--memory", default="16GB", help="Memory that each command may use.")
    parser.add_argument("--folder", type=Path, help="Folder to keep the checkpoints in.")
    parser.add_argument(
        "--export-only", action="store_true", help="Export the existing runs in --folder."
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(ROOT.parent))
    rows = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        commands = (export,) if options.export_only else (quantize, export)
        for name, command in itertools.product(options.names or MODELS, commands):
            row = command(name, folder, options.memory)
            rows = [other for other in rows if any(other[key] != row[key] for key in KEYS)] + [row]
            options.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT.parent))
    main()
