"""Quantise a model with a LoRA, then exchange the LoRA in the finished run.

    python examples/swap_lora.py MODEL first.safetensors second.safetensors:0.8 -o lora-example

The exchange keeps the scales and computes the integer codes again, so it needs no fine-tuning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import trtq
from trtq.lora import parse_lora
from trtq.runs.exchange_loras import requantize


def main() -> None:
    """Parse the arguments, quantise with the first LoRA, exchange it, draw with both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="diffusers folder, hub id, digits or shapes")
    parser.add_argument("first", type=parse_lora, help="FILE[:STRENGTH] of the first LoRA")
    parser.add_argument("second", type=parse_lora, help="FILE[:STRENGTH] of the LoRA to change to")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all results")
    parser.add_argument("--bits", default="w4a8", help="weight and activation bits (default: w4a8)")
    parser.add_argument("--steps", type=int, default=20, help="calibrated denoising steps")
    parser.add_argument("--calibration-images", type=int, default=4, help="images to record")
    options = parser.parse_args()
    first, second = options.output / "first", options.output / "second"
    options.output.mkdir(parents=True, exist_ok=True)

    # The LoRA is merged into the float weights before they are quantised.
    recipe = {
        "method": "search",
        "bits": options.bits,
        "steps": options.steps,
        "calibration": {"images": options.calibration_images},
    }
    trtq.quantize(options.model, recipe, first, loras=[options.first])

    # On the command line: trtq quantize first -o second --lora FILE:STRENGTH --base MODEL
    exchanged = requantize(first, [options.second], second, base=options.model)
    print(f"exchanged in {exchanged.seconds:.1f} s")

    # Same seed, same noise: the pictures differ by the LoRA alone.
    for run in (first, second):
        trtq.generate(run, options.output / f"{run.name}.png", steps=options.steps)
        print(f"wrote {options.output / run.name}.png")


if __name__ == "__main__":
    main()
