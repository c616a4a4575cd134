"""Quality and size of each format on a small transformer and the shipped digits, against float.

    python benchmarks/formats.py dit            # a DiT with random weights, with and without outliers
    python benchmarks/formats.py digits
    python benchmarks/formats.py dit --precisions w4a16:32 w4a16:64 fp8

The transformer is a `DiTTransformer2DModel` of 3 blocks, width 128, 64 tokens, random weights. With
outliers, 3 of the 128 input channels of q, k, v and of the feed-forward layer are 50 times as large and
the weights that read them 50 times as small, which leaves the float function unchanged. SNR is the mean
over the steps of the low-bit prediction against the float one, in dB, on 16 images of fresh noise.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.sampling import predict, seeded_noise, walk
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize
from trtq.seeds import seeded_generator

WIDTH, BLOCKS, STEPS, IMAGES = 128, 3, 20, 16
OUTLIERS, FACTOR = (5, 40, 77), 50.0
PRECISIONS = [
    "w8a8",
    "w4a8",
    "w4a4",
    "w8a16",
    "w4a16:32",
    "w4a16:64",
    "w4a16:128",
    "w4a16:0",
    "fp8",
    "nvfp4",
]


def transformer(outliers: bool) -> Any:
    """The pipeline with the small transformer."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    for block in model.transformer_blocks:
        with torch.no_grad():
            # Gates near 1, so that the blocks matter.
            block.norm1.linear.bias[2 * WIDTH : 3 * WIDTH] += 1
            block.norm1.linear.bias[5 * WIDTH :] += 1
            if outliers:
                plant(block)
    vae = AutoencoderKL(
        block_out_channels=(4,) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    )
    return DiTPipeline(model, vae, DDIMScheduler())


def plant(block: Any) -> None:
    """Scale three input channels of a block's products, and the weights that read them inversely."""
    norm = block.norm1.linear
    channels = torch.tensor(OUTLIERS)
    for first, readers in (
        (0, (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)),
        (3, (block.ff.net[0].proj,)),
    ):
        shift, scale = first * WIDTH + channels, (first + 1) * WIDTH + channels
        # The norm's output is `x (1 + scale) + shift`.
        norm.weight[scale] *= FACTOR
        norm.bias[scale] = (norm.bias[scale] + 1) * FACTOR - 1
        norm.weight[shift] *= FACTOR
        norm.bias[shift] *= FACTOR
        for reader in readers:
            reader.weight[:, channels] /= FACTOR


@torch.no_grad()
def snr_per_step(pipeline: Any, run: Path) -> list[float]:
    """SNR of a run's prediction at every step of the float trajectories, noisiest first, in dB."""
    source = open_pipeline(pipeline)
    conditions = source.draw_conditions(IMAGES, seeded_generator(1, "formats"))
    noise = seeded_noise(source.sample_shape, 1, 0, IMAGES)
    low_bit = open_run(run).denoiser()
    rows = []
    for point in walk(source.denoiser, source.schedule(STEPS), noise, conditions):
        other = predict(low_bit, point.x, point.timestep, conditions)
        error = (other - point.predicted).square().mean() / point.predicted.square().mean()
        rows.append(-10 * math.log10(max(float(error), 1e-20)))
    return rows


def measure(name: str, pipeline: Any, precision: str, method: str, *, smooth: bool) -> None:
    """Quantise with one precision and print one row of the table."""
    bits, _, group = precision.partition(":")
    recipe: dict[str, Any] = {"method": method, "steps": STEPS, "smooth": smooth}
    recipe |= {"format": bits} if bits in ("fp8", "nvfp4") else {"bits": bits}
    recipe |= {"group": int(group)} if group else {}
    recipe["calibration"] = {"images": 32}
    with tempfile.TemporaryDirectory() as scratch:
        result = quantize(copy.deepcopy(pipeline), recipe, Path(scratch) / "run")
        rows = snr_per_step(pipeline, Path(scratch) / "run")
    assert result is not None
    share = result.bytes_after / (result.bytes_before / 2)
    mean = sum(rows) / len(rows)
    print(
        f"{name:16} {precision:10} SNR {mean:5.1f} dB, worst step {min(rows):5.1f} dB, "
        f"file {share:.3f} x half precision",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("dit", "digits"))
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--method", default="search")
    parser.add_argument("--smooth", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    models: dict[str, Any] = {}
    if options.model == "digits":
        models["digits"] = open_pipeline("digits").pipeline
    else:
        models = {"dit": transformer(False), "dit, outliers": transformer(True)}
    for name, pipeline in models.items():
        for precision in options.precisions:
            measure(name, pipeline, precision, options.method, smooth=options.smooth)


if __name__ == "__main__":
    main()
