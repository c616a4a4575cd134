"""Compatibility of exported ONNX folders with optimum-onnx: same images as trtq?

    python benchmarks/optimum.py [--environment DIR]

The shapes model is quantised and exported. The pipeline class of optimum-onnx opens the unchanged
folder in a separate virtual environment in DIR (it needs a different version of transformers), which is
created if it does not exist. Both generate images of the same prompts from the same noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trtq
from trtq.artefact.manifest_file import package_versions
from trtq.diffusion.loading import open_pipeline
from trtq.exporter.export import export
from trtq.progress import ProgressPrinter
from trtq.runs.quantize import quantize

STEPS, GUIDANCE, IMAGES = 20, 3.0, 20
EQUAL = 1 / 255  # maximum difference below one level of a PNG
PACKAGES = ["optimum-onnx[onnxruntime]==0.1.0", "diffusers", "torch>=2.11,<2.14"]
RECIPES: dict[str, dict[str, Any]] = {
    "W4A4 search": {"method": "search", "bits": "w4a4"},
    "W8A8 search": {"method": "search", "bits": "w8a8"},
}
OPTIMUM_SCRIPT = """
import json, sys
import numpy as np, torch
from importlib.metadata import version
from optimum.onnxruntime import ORTDiffusionPipeline

task = json.loads(sys.argv[1])
pipeline = ORTDiffusionPipeline.from_pretrained(task["folder"])
pipeline.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(seed) for seed in range(len(task["prompts"]))]
images = pipeline(
    task["prompts"], num_inference_steps=task["steps"], guidance_scale=task["guidance"],
    height=task["size"], width=task["size"], generator=generators, output_type="np",
).images
np.save(task["output"], images)
names = ("optimum-onnx", "onnxruntime", "transformers", "diffusers")
print(json.dumps({"class": type(pipeline).__name__} | {name: version(name) for name in names}))
"""


def environment(folder: Path) -> Path:
    """Python of a virtual environment with optimum-onnx, which is created if it does not exist."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=Path(".venv-optimum"))
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/optimum.json")
    )
    arguments = parser.parse_args()
    python = environment(arguments.environment)
    source = open_pipeline("shapes")
    assert source.prompts is not None
    prompts = [judged.prompt for judged in source.prompts.evaluation[:IMAGES]]
    rows = []
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            run, onnx, theirs = (Path(scratch) / part for part in ("run", "onnx", "theirs.npy"))
            quantize("shapes", recipe, run, progress=ProgressPrinter())
            export(run, onnx, progress=ProgressPrinter())
            task = {
                "folder": str(onnx),
                "prompts": prompts,
                "steps": STEPS,
                "guidance": GUIDANCE,
                "size": source.image_size[0],
                "output": str(theirs),
            }
            done = subprocess.run(
                [python, "-c", OPTIMUM_SCRIPT, json.dumps(task)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            generators = [torch.Generator().manual_seed(seed) for seed in range(IMAGES)]
            ours = trtq.load(onnx)(
                prompts,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generators,
                output_type="np",
            ).images
            difference = np.abs(np.load(theirs) - ours).reshape(IMAGES, -1).max(1)
        row = {
            "name": name,
            "pictures": IMAGES,
            "pictures_equal": int((difference < EQUAL).sum()),
            "largest_difference": float(difference.max()),
            "median_largest_difference": float(np.median(difference)),
            "theirs": json.loads(done.stdout.splitlines()[-1]),
        }
        print(json.dumps(row), file=sys.stderr)
        rows.append(row)
    record = {
        "rows": rows,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "packages": package_versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
