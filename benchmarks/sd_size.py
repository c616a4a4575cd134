"""Time, memory and file sizes of the path at the size of Stable Diffusion 1.5, with random weights.

    python benchmarks/sd_size.py [--method search --bits w4a8 --steps 4 --images 4]

diffusers' true classes in the published configuration (UNet 859.5 M parameters, 64 x 64 latents; VAE;
CLIP text encoder). Weights are random: no quality is measured, only what the path costs. Each stage runs
in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trtq.demo.train_shapes import build_tokenizer
from trtq.manifest import package_versions

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_checkpoint(folder: Path) -> int:
    """Write the pipeline; returns the number of the UNet's parameters."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TEXT["max_position_embeddings"]
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **marks, **TEXT))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in unet.parameters())


def stage(*arguments: str) -> dict[str, Any]:
    """One command of trtq in a process of its own; what it says as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "trtq.cli", *arguments, "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="search")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="Keep checkpoint, run and ONNX here.")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/sd_size.json")
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, run, onnx = folder / "checkpoint", folder / "run", folder / "onnx"
        if not checkpoint.is_dir():
            print(f"{write_checkpoint(checkpoint):,} parameters", file=sys.stderr)
        recipe = folder / "recipe.toml"
        recipe.write_text(f"[calibration]\nimages = {arguments.images}\n")
        made = stage(
            *("quantize", str(checkpoint), "-o", str(run), "--overwrite"),
            *("--method", arguments.method, "--bits", arguments.bits),
            *("--steps", str(arguments.steps), "--recipe", str(recipe)),
        )
        exported = stage("export", str(run), "-o", str(onnx), "--overwrite")
        record = {
            "quantize": made,
            "export": exported,
            "options": {
                key: getattr(arguments, key) for key in ("method", "bits", "steps", "images")
            },
            "threads": torch.get_num_threads(),
            "packages": package_versions(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    for name in ("quantize", "export"):
        seconds, peak = record[name]["seconds"], record[name]["peak_rss_bytes"] / 1e9
        print(f"{name}: {seconds:.0f} s, peak {peak:.1f} GB")
    print(f"run: {made['bytes_after'] / made['bytes_before']:.3f} x of float32")


if __name__ == "__main__":
    main()
