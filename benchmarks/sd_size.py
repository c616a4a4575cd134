"""Time, memory and file sizes of the path at the size of Stable Diffusion, with random weights.

    python benchmarks/sd_size.py [--model sd_1 --method search --bits w4a8 --steps 4 --images 4]
    python benchmarks/sd_size.py --method efficientdm --bits w4a4 --iterations 2   (its memory)
    python benchmarks/sd_size.py --model sd_xl --method minmax --steps 1 --images 1

The diffusers classes in the published configurations: UNet of 1.5 (859.5 M parameters, 64 x 64 latents)
or of XL (2,567 M, 128 x 128), VAE, and CLIP text encoders (for XL with one layer each, because the UNet
depends only on their width). The weights are random: only the cost is measured, not the quality. Each
stage runs in a separate process, for a separate peak memory. Rows with other options are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trtq.artefact.manifest_file import package_versions
from trtq.artefact.opened import open_folder
from trtq.demo.shapes_model import build_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import CLIPTextConfig, PreTrainedTokenizerBase

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
UNET_XL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _text_config(
    tokenizer: PreTrainedTokenizerBase, width: int, heads: int, layers: int
) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
    )


def build_sd_1() -> DiffusionPipeline:
    """Build a pipeline of Stable Diffusion 1.5's size, in float32."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

    tokenizer = _tokenizer()
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 768, 12, 12)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sd_xl() -> DiffusionPipeline:
    """Build a pipeline of Stable Diffusion XL's size, in float16 (as published)."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first, second = _tokenizer(), _tokenizer()
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE).half(),
        text_encoder=CLIPTextModel(_text_config(first, 768, 12, 1)).half(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 1280, 20, 1)).half(),
        tokenizer=first,
        tokenizer_2=second,
        unet=UNet2DConditionModel(**UNET_XL).half(),
        scheduler=DDIMScheduler(**SCHEDULER),
        add_watermarker=False,
    )


MODELS: dict[str, Callable[[], DiffusionPipeline]] = {"sd_1": build_sd_1, "sd_xl": build_sd_xl}


def write_checkpoint(folder: Path, model: str = "sd_1") -> int:
    """Write the pipeline; return the number of parameters of the UNet."""
    torch.manual_seed(0)
    pipeline = MODELS[model]()
    pipeline.save_pretrained(folder)
    return sum(parameter.numel() for parameter in pipeline.unet.parameters())


def stage(*arguments: str, program: tuple[str, ...] = ("-m", "trtq.cli")) -> dict[str, Any]:
    """Run one command in a separate process; return its JSON output.

    Args:
        arguments: arguments of the command.
        program: arguments of Python that start trtq.
    """
    command = [sys.executable, *program, *arguments, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantise and export once; return the results of both."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, run, onnx = folder / "checkpoint", folder / "run", folder / "onnx"
    if not checkpoint.is_dir():
        print(f"{write_checkpoint(checkpoint, arguments.model):,} parameters", file=sys.stderr)
    if arguments.export_only:
        recipe = open_folder(run, "run").manifest.recipe
        assert recipe is not None
        for key in ("method", "bits", "steps"):
            setattr(arguments, key, getattr(recipe, key))
        arguments.images = recipe.calibration.images
        return {"export": stage("export", str(run), "-o", str(onnx), "--overwrite")}
    settings = folder / "recipe.toml"
    text = f"[calibration]\nimages = {arguments.images}\n"
    if arguments.iterations is not None:
        text += f"[training]\niterations = {arguments.iterations}\nbatch = {arguments.batch}\n"
    settings.write_text(text)
    made = stage(
        *("quantize", str(checkpoint), "-o", str(run), "--overwrite"),
        *("--method", arguments.method, "--bits", arguments.bits),
        *("--steps", str(arguments.steps), "--recipe", str(settings)),
    )
    row = {"quantize": made}
    if arguments.iterations is None:
        row["export"] = stage("export", str(run), "-o", str(onnx), "--overwrite")
    return row


def main() -> None:
    """Measure and write one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="sd_1")
    parser.add_argument("--method", default="search")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument(
        "--iterations", type=int, help="Fine-tuning iterations; disables the export."
    )
    parser.add_argument("--batch", type=int, default=1, help="Fine-tuning batch size.")
    parser.add_argument(
        "--folder", type=Path, help="Folder to keep checkpoint, run and ONNX files in."
    )
    parser.add_argument(
        "--export-only", action="store_true", help="Export the existing run in --folder."
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/sd_size.json")
    )
    arguments = parser.parse_args()
    keys = ("model", "method", "bits", "steps", "images", "iterations", "batch", "export_only")
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(arguments.folder or Path(scratch), arguments)
    options = {key: getattr(arguments, key) for key in keys}
    row |= {
        "options": options,
        "threads": torch.get_num_threads(),
        "packages": package_versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.is_file() else []
    rows = [other for other in rows if other["options"] != options] + [row]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    for name in ("quantize", "export"):
        if name in row:
            seconds, peak = row[name]["seconds"], row[name]["peak_rss_bytes"] / 1e9
            print(f"{name}: {seconds:.0f} s, peak {peak:.1f} GB")
    if "quantize" in row:
        made = row["quantize"]
        print(f"run: {made['bytes_after'] / made['bytes_before']:.3f} x of float32")


if __name__ == "__main__":
    main()
