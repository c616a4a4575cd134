"""Launches per step of a UNet with Stable Diffusion 1.5's layers, counted from its graph.

    python benchmarks/launches.py [--folder DIR]

The UNet has the published number and kinds of layers with fewer channels, since the count depends on
the layers only, and random weights. It is calibrated at W4A8 by minimum and maximum, on one image at two
steps, and traced in half precision as a `plugin` graph. The rules of the count are in
`trtq.graph.launches`; each row of the result adds one rewrite to those before it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sd_size import SCHEDULER, VAE, _text_config, _tokenizer, stage

from trtq.artefact.opened import open_folder
from trtq.exporter.graph import write_graph
from trtq.graph.launches import count_launches
from trtq.graph.runtimes.fuse_plugins import FUSIONS
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.runs.folder import open_run

RESULTS = Path(__file__).parent / "results" / "launches.json"
PLAIN = "layers alone"
RECIPE = 'method = "minmax"\n[calibration]\nimages = 1\nsamples_per_step = 64\n'


def write_checkpoint(folder: Path) -> None:
    """Write a pipeline with the layers of Stable Diffusion 1.5, and fewer channels."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    vae = VAE | {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "sample_size": 128}
    StableDiffusionPipeline(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 32, 2, 1)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            cross_attention_dim=32,
            block_out_channels=(32, 64, 64, 64),
            attention_head_dim=8,
        ),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def plugin_graph(folder: Path) -> Path:
    """The file of the `plugin` graph in half precision; made if it does not exist."""
    checkpoint, run, place = folder / "checkpoint", folder / "run", folder / "unet"
    path = place / "model.onnx"
    if path.is_file():
        return path
    write_checkpoint(checkpoint)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    options = ("--bits", "w4a8", "--steps", "2", "--recipe", str(recipe))
    stage("quantize", str(checkpoint), "-o", str(run), *options)
    opened = open_run(open_folder(run, "run"))
    source = opened.source(packed=False)
    size = "x".join(map(str, source.image_size))
    skeleton = opened.float_skeleton()
    write_graph(place, skeleton, source, opened, size, half=True, target="plugin")
    return path


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The launches of the graph with one more rewrite in each row."""
    model = prepare(load_graph(path), "tensorrt")
    names = [PLAIN, *(fusion.__name__ for fusion in FUSIONS)]
    for name, fusion in zip(names, [None, *FUSIONS], strict=True):
        if fusion is not None:
            fusion()(model)
        separate = count_launches(model)
        fused = count_launches(model, fused_attention=True)
        yield {
            "rewrite": name,
            "launches": separate.total(),
            "launches_fused_attention": fused.total(),
            "kinds": dict(sorted(separate.items())),
        }


def main() -> None:
    """Count and write every row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="Folder to keep the graph in.")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "bits": "w4a8",
            "rows": list(rows(plugin_graph(folder))),
        }
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print(row["rewrite"], row["launches"], row["launches_fused_attention"])


if __name__ == "__main__":
    main()
