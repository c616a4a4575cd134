"""The shapes model at several bit widths, and the exchange of a LoRA in a quantised run.

    python benchmarks/shapes.py [--only NAME ...] [--images 1000]

Faithfulness is the share of images in which the shipped classifier detects everything in the prompt:
arrangement, colours and shapes. Rows that are already in the output are skipped. The LoRA is trained by
this script on pictures in which every shape is purple, independent of the caption; its effect is the
share of images whose first shape is purple.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from trtq.artefact.manifest_file import package_versions
from trtq.demo.shapes import COLOURS, Scene, draw_scenes, random_scene
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.extractor import Extractor
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.exporter.export import export
from trtq.lora import LoraRequest
from trtq.pipelines.draw import Conditioning, draw
from trtq.pipelines.open import open_any
from trtq.progress import ProgressPrinter
from trtq.runs.exchange_loras import requantize
from trtq.runs.quantize import quantize

STEPS = 20
STYLE = list(COLOURS).index("purple")
ROWS: dict[str, dict[str, Any]] = {
    "W8A8 search": {"method": "search", "bits": "w8a8"},
    "W4A8 search": {"method": "search", "bits": "w4a8"},
    "W4A8 EfficientDM": {"method": "efficientdm", "bits": "w4a8"},
    "W4A8 combined": {"method": "combined", "bits": "w4a8"},
    "W4A8 combined, attention": {
        "method": "combined",
        "bits": "w4a8",
        "attention": {"quantize": True},
    },
    "W4A4 search": {"method": "search", "bits": "w4a4"},
    "W4A4 EfficientDM": {"method": "efficientdm", "bits": "w4a4"},
    "W4A4 QuEST": {"method": "quest", "bits": "w4a4"},
    "W4A4 QuEST, rounding off": {
        "method": "quest",
        "bits": "w4a4",
        "quest": {"adaround": 0},
    },
    "W4A4 combined": {"method": "combined", "bits": "w4a4"},
    "W4A4 best": {"method": "best", "bits": "w4a4"},
}
SWAPPED = "W4A8 search"


class _Adapted(nn.Module):
    """A linear layer with a trainable low-rank update: `down[R, K]`, `up[N, R]`."""

    def __init__(self, source: nn.Linear, rank: int) -> None:
        super().__init__()
        self.source = source
        self.down = nn.Parameter(torch.randn(rank, source.in_features) / source.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(source.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.source(x) + x @ self.down.T @ self.up.T
        return out


def train_style(path: Path, iterations: int = 300, batch: int = 48, rank: int = 4) -> None:
    """Train a LoRA of the attention and feed-forward layers, and write it in PEFT's layout."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    source = open_pipeline("shapes")
    pipeline: Any = source.pipeline
    unet = pipeline.unet.requires_grad_(False)
    adapted: dict[str, _Adapted] = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and ("attn" in name or ".ff." in name):
            parent, _, leaf = name.rpartition(".")
            owner: Any = unet.get_submodule(parent)
            adapted[name] = _Adapted(module, rank)
            if isinstance(owner, nn.ModuleList):
                owner[int(leaf)] = adapted[name]
            else:
                setattr(owner, leaf, adapted[name])
    parameters = [p for layer in adapted.values() for p in (layer.down, layer.up)]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    shown = [random_scene(generator) for _ in range(1500)]
    with torch.no_grad():
        latents = pipeline.vae.encode(
            draw_scenes([_purple(s) for s in shown], generator)
        ).latent_dist
        latents = latents.mode() * pipeline.vae.config.scaling_factor
    states = source.encode([scene.caption for scene in shown]).conditional["encoder_hidden_states"]
    for iteration in range(iterations):
        chosen = torch.randint(len(shown), (batch,), generator=generator)
        timestep = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        noisy = pipeline.scheduler.add_noise(latents[chosen], noise, timestep)
        loss = functional.mse_loss(unet(noisy, timestep, states[chosen]).sample, noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if iteration % 50 == 49:
            print(f"style {iteration + 1}/{iterations}  loss {loss.item():.4f}", file=sys.stderr)
    tensors = {}
    for name, layer in adapted.items():
        tensors[f"unet.{name}.lora_A.weight"] = layer.down.detach().half()
        tensors[f"unet.{name}.lora_B.weight"] = layer.up.detach().half()
    save_file(tensors, path)


def _purple(scene: Scene) -> Scene:
    second = None if scene.second is None else (STYLE, scene.second[1])
    return replace(scene, first=(STYLE, scene.first[1]), second=second)


def _style_share(
    source: LoadedPipeline, extractor: Extractor, conditioning: Conditioning, guidance: float
) -> float:
    images = draw(source, conditioning, steps=STEPS, seed=1, guidance=guidance)
    answers = extractor.answers(extractor.features(images))
    return float((answers["first_colour"].argmax(1) == STYLE).float().mean())


def swap(reference: ReferenceSet, run: Path, scratch: Path) -> dict[str, Any]:
    """Exchange the LoRA of a run; compare its effect with that in the float model."""
    from trtq.lora import merge_loras

    lora = LoraRequest(scratch / "purple.safetensors")
    train_style(lora.path)
    result = requantize(run, [lora], scratch / "styled")
    count = min(200, reference.conditioning.count)
    assert reference.conditioning.prompts is not None
    conditioning = Conditioning(count, prompts=reference.conditioning.prompts[:count])
    styled = open_pipeline("shapes")
    plain = _style_share(styled, reference.extractor, conditioning, reference.guidance)
    merge_loras({"unet": styled.pipeline.unet}, [lora])
    return {
        "seconds": result["seconds"],
        "snr_db_before": result["snr_db_before"],
        "snr_db_after": result["snr_db_after"],
        "images": count,
        "style_without": plain,
        "style_float": _style_share(styled, reference.extractor, conditioning, reference.guidance),
        "style_low_bit": _style_share(
            open_any(scratch / "styled"), reference.extractor, conditioning, reference.guidance
        ),
    }


def main() -> None:
    """Measure the missing rows and write the output after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/shapes.json"))
    arguments = parser.parse_args()
    progress = ProgressPrinter()
    record: dict[str, Any] = {"rows": []}
    if arguments.output.is_file():
        record = json.loads(arguments.output.read_text())
    reference = draw_reference(
        "shapes", images=arguments.images, steps=STEPS, seed=1, progress=progress
    )
    record |= {
        "images": arguments.images,
        "steps": STEPS,
        "guidance": reference.guidance,
        "fd_float": reference.scores.fd,
        "faithfulness_float": reference.scores.accuracy,
        "faithfulness_float_interval": reference.scores.accuracy_interval,
        "packages": package_versions(),
    }
    known = {row["name"] for row in record["rows"]}
    for name in arguments.only:
        if name in known:
            continue
        print(f"== {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            made = quantize("shapes", ROWS[name], scratch / "run", progress=progress)
            exported = export(scratch / "run", scratch / "onnx", progress=progress)
            result = evaluate(scratch / "onnx", reference, progress=progress).to_json()
            if name == SWAPPED and "lora" not in record:
                start = time.monotonic()
                record["lora"] = swap(reference, scratch / "run", scratch)
                print(f"LoRA in {time.monotonic() - start:.0f} s: {record['lora']}")
        kept = ("fd", "faithfulness", "accuracy_interval", "psnr_db", "snr_db", "provider")
        row = {"name": name} | {key: result[key] for key in kept}
        row |= {key: made.get(key) for key in ("bytes_after", "fine_tune_seconds", "tuned_share")}
        row |= {key: exported[key] for key in ("parity_db_min", "parity_ties")}
        row |= {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "threads": torch.get_num_threads(),
        }
        record["rows"].append(row)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")
        print(
            f"{name:26s} faithfulness {row['faithfulness']:.1%} (float "
            f"{reference.scores.accuracy:.1%})  FD {row['fd']:.2f}  parity {row['parity_db_min']:.0f} dB"
        )


if __name__ == "__main__":
    main()
