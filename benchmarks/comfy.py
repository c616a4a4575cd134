"""Files for ComfyUI, run by comfy-kitchen's reference backend on the CPU.

    python benchmarks/comfy.py

The shapes model is quantised and exported with `--target comfy`. comfy-kitchen computes the layers with
one activation scale per row, as ComfyUI does. Its predictions are compared with those of the same
formula in torch, and with the float model. The run itself, with its scales per step, is measured too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import comfy_kitchen as ck
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors.torch import load_file
from torch import Tensor, nn

from trtq.artefact.manifest_file import package_versions
from trtq.checkpoint.original_names import original_tensors
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.sampling import predict, seeded_noise, spread
from trtq.exporter.export import export
from trtq.progress import ProgressPrinter
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize
from trtq.seeds import seeded_generator
from trtq.snr import snr_db

STEPS, IMAGES = 20, 16
LAYOUT = "TensorWiseINT8Layout"
RECIPES: dict[str, dict[str, Any]] = {
    "W8A8 minmax": {"method": "minmax", "bits": "w8a8"},
    "W4A8 search": {"method": "search", "bits": "w4a8"},
    "W4A4 search": {"method": "search", "bits": "w4a4"},
}


class RowScaled(nn.Module):
    """An integer layer in torch: `(q_x q_w) (s_x s_w) + b` with `s_x = max|x| / 127` per row."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.codes, self.scale, self.bias = codes.float(), scale, bias

    def forward(self, x: Tensor) -> Tensor:
        """x[..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        out: Tensor = ((rows / scale).round() @ self.codes.T) * (scale * self.scale.T)
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], -1)


def comfy_layer(layer: nn.Linear, codes: Tensor, scale: Tensor) -> nn.Module:
    """The layer with a weight that comfy-kitchen computes with."""
    params = get_layout_class(LAYOUT).Params(
        scale=scale, orig_dtype=torch.float32, orig_shape=tuple(codes.shape)
    )
    layer.weight = nn.Parameter(QuantizedTensor(codes, LAYOUT, params), requires_grad=False)
    return layer


def torch_layer(layer: nn.Linear, codes: Tensor, scale: Tensor) -> nn.Module:
    """The layer in torch, see `RowScaled`."""
    return RowScaled(codes, scale, layer.bias)


def with_layers(file: Path, make: Callable[[nn.Linear, Tensor, Tensor], nn.Module]) -> nn.Module:
    """The denoiser in a file, with its quantised layers made by a function of layer, codes and scale."""
    model = open_pipeline(file, "shapes").denoiser
    tensors = load_file(file)
    originals = original_tensors(type(model).__name__, model.config, list(model.state_dict()))
    for name, original in originals.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.comfy_quant" in tensors:
            path = original.sources[0].name.removesuffix(".weight")
            parent, _, leaf = path.rpartition(".")
            made = make(model.get_submodule(path), tensors[name], tensors[f"{layer}.weight_scale"])
            setattr(model.get_submodule(parent), leaf, made)
    return model.eval()


@torch.no_grad()
def measured(name: str, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One row of the table."""
    run, file = folder / "run", folder / "model.safetensors"
    quantize("shapes", recipe | {"steps": STEPS, "smooth": False}, run, progress=ProgressPrinter())
    (written,) = export(run, file, target="comfy", precision="fp32").files
    source = open_pipeline("shapes")
    schedule = source.schedule(STEPS)
    conditions = source.draw_conditions(IMAGES, seeded_generator(0, "comfy"))
    noise = seeded_noise(source.sample_shape, 0, 0, IMAGES)
    x, timestep = spread(source.denoiser, schedule, noise, conditions)
    expected = predict(source.denoiser, x, timestep, conditions)
    with ck.registry.use_backend("eager"):
        theirs = predict(with_layers(file, comfy_layer), x, timestep, conditions)
    ours = predict(with_layers(file, torch_layer), x, timestep, conditions)
    per_step = predict(open_run(run).denoiser(), x, timestep, conditions)
    return {
        "recipe": name,
        "layers": written.layers_quantized,
        "bytes": written.bytes,
        "max_difference": float((theirs - ours).abs().max()),
        "snr_db_comfy": snr_db(expected, theirs),
        "snr_db_run": snr_db(expected, per_step),
        "notes": written.notes,
    }


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/comfy.json"))
    arguments = parser.parse_args()
    rows = []
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(name, recipe, Path(folder)))
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": "shapes",
        "images": IMAGES,
        "versions": package_versions(),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print({key: value for key, value in row.items() if key != "notes"})


if __name__ == "__main__":
    main()
