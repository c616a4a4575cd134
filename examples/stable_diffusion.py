"""Stable Diffusion from a local diffusers folder: quantise, export, draw.

    python examples/stable_diffusion.py stable-diffusion-v1-5 -o sd-example --prompt "a red bicycle"

The folder is the layout that `pipeline.save_pretrained` writes. trtq reads safetensors only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import trtq


def main() -> None:
    """Parse the arguments, show the plan, and do the work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="diffusers folder of a text-to-image pipeline")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all results")
    parser.add_argument("--prompt", default="a photo of a red bicycle", help="text to draw")
    parser.add_argument("--bits", default="w4a8", help="weight and activation bits (default: w4a8)")
    parser.add_argument("--steps", type=int, default=20, help="calibrated denoising steps")
    parser.add_argument("--calibration-images", type=int, default=4, help="images to record")
    parser.add_argument("--provider", default="cpu", help="cpu, openvino, cuda, tensorrt-rtx")
    options = parser.parse_args()
    run, onnx = options.output / "run", options.output / "onnx"
    options.output.mkdir(parents=True, exist_ok=True)

    # `search` does not fine-tune: at 8-bit activations it is often enough, and much faster.
    recipe = {
        "method": "search",
        "bits": options.bits,
        "steps": options.steps,
        "calibration": {"images": options.calibration_images},
    }
    quantized = trtq.quantize(options.model, recipe, run)
    print(f"{quantized.layers_quantized} low-bit layers, {quantized.layers_float} in float")
    print(f"{quantized.bytes_before:,} bytes before, {quantized.bytes_after:,} after")

    # All components become ONNX graphs: text encoder, denoiser, both halves of the autoencoder.
    trtq.export(run, onnx)

    # `load` returns a StableDiffusionPipeline. Call it as usual.
    pipeline = trtq.load(onnx, provider=options.provider)
    image = pipeline(options.prompt, num_inference_steps=options.steps).images[0]
    image.save(options.output / "image.png")
    print(f"wrote {options.output / 'image.png'}")


if __name__ == "__main__":
    main()
