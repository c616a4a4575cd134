"""The digits model at 4 bits, end to end: quantise, export, draw, evaluate.

python examples/digits.py -o digits-example
python examples/digits.py -o quick --iterations 2 --steps 4 --images 20   # a minute, poor quality
"""

from __future__ import annotations

import argparse
from pathlib import Path

import trtq


def main() -> None:
    """Parse the arguments and take the path step by step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all results")
    parser.add_argument("--bits", default="w4a4", help="weight and activation bits (default: w4a4)")
    parser.add_argument("--steps", type=int, default=20, help="calibrated denoising steps")
    parser.add_argument("--iterations", type=int, default=350, help="fine-tuning iterations")
    parser.add_argument("--images", type=int, default=500, help="images to evaluate")
    options = parser.parse_args()
    run, onnx = options.output / "run", options.output / "onnx"
    options.output.mkdir(parents=True, exist_ok=True)

    # A recipe names a method and overrides any of its settings. EfficientDM fine-tunes without data.
    recipe = {
        "method": "efficientdm",
        "bits": options.bits,
        "steps": options.steps,
        "training": {"iterations": options.iterations},
    }
    quantized = trtq.quantize("digits", recipe, run)
    ratio = quantized.bytes_after / quantized.bytes_before
    print(f"quantised in {quantized.seconds:.0f} s; the denoiser has {ratio:.1%} of its size")

    # The export is compared with torch at every step. If the two disagree, it raises GateError.
    exported = trtq.export(run, onnx)
    print(f"exported in {exported.seconds:.0f} s; minimum parity {exported.parity_db_min:.0f} dB")

    # The result is a diffusers pipeline: classes in, images out.
    pipeline = trtq.load(onnx, provider="cpu")
    pipeline(7).images[0].save(options.output / "seven.png")

    # `generate` writes files: here one sheet with all classes.
    trtq.generate(onnx, options.output / "digits.png", images=20)

    # Same noise, same classes, same steps as the float model.
    scores = trtq.evaluate(onnx, reference="digits", images=options.images).scores
    print(f"Fréchet distance {scores['fd']:.2f}, float model {scores['fd_reference']:.2f}")
    accuracy = (
        f"{scores['class_accuracy']:.1%}, float model {scores['class_accuracy_reference']:.1%}"
    )
    print(f"class accuracy {accuracy}")


if __name__ == "__main__":
    main()
