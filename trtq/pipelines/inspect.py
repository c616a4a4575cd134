"""What is inside an artefact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from trtq.artefact.manifest import Manifest, artefact_kind, read_manifest
from trtq.diffusion.loading import open_pipeline
from trtq.engine.tensorrt.run import obstacle, open_tensorrt
from trtq.graph.file import MODEL_FILE, model_file
from trtq.graph.runtimes.prepare import load_graph
from trtq.quant import precision_text, quantizable_layers
from trtq.runs.folder import open_run

__all__ = ["inspect_artefact"]


def inspect_artefact(path: str | Path) -> dict[str, Any]:
    """Layers, bits, tables, sizes and origin.

    Args:
        path: a run, an ONNX or engine folder or a float checkpoint; it is verified first.

    Returns:
        `kind`, `source`, `bytes`, `precisions` (count by precision), `timesteps`, `layers` (one row
        each; for a run with `scale` (per step, by input) and `zero_points`), `options`,
        `metrics`; of engines also `engine_layers` (what the backend's inspector says of the
        denoiser's; None where there is no GPU to load it) and `engine_layers_missing` (why).

    Raises:
        ArtefactError: it cannot be read, or is not what its manifest says.
    """
    folder = Path(path)
    if not folder.is_dir() or artefact_kind(folder) is None:
        return _checkpoint(path)
    manifest = read_manifest(folder)
    result: dict[str, Any] = {
        "kind": manifest.kind,
        "source": manifest.source.name,
        "bytes": sum((folder / name).stat().st_size for name in manifest.files),
        "precisions": _precisions(manifest),
        "recipe": manifest.recipe,
        "timesteps": manifest.timesteps,
        "layers": [row.model_dump() for row in manifest.layers],
        "options": manifest.options,
        "metrics": manifest.metrics,
        "packages": manifest.packages,
    }
    graph = folder / manifest.denoiser / MODEL_FILE
    if manifest.kind == "onnx" and graph.is_file():
        manifest.check_graph(load_graph(graph).metadata_props)
    if manifest.kind == "engine":
        result |= _engine_layers(folder, manifest)
    if manifest.kind == "run":
        stored = open_run(folder).stored
        for row in result["layers"]:
            tensors = stored.layers.get(row["name"])
            if tensors is None:
                continue
            operands = tensors.operands
            row["scale"] = {name: one.scale.tolist() for name, one in operands.items()}
            row["zero_points"] = sorted({-int(z) for one in operands.values() for z in one.low})
    return result


def _engine_layers(folder: Path, manifest: Manifest) -> dict[str, Any]:
    backend = str(manifest.options["backend"])
    reason = obstacle(backend)
    if reason is not None:
        return {"engine_layers": None, "engine_layers_missing": reason}
    engine = open_tensorrt(model_file(folder / manifest.denoiser), backend)
    return {"engine_layers": engine.describe(), "engine_layers_missing": None}


def _precisions(manifest: Manifest) -> dict[str, int]:
    return dict(
        Counter(
            precision_text(row.weight_bits, row.activation_bits, row.right_bits)
            for row in manifest.layers
        )
    )


def _checkpoint(path: str | Path) -> dict[str, Any]:
    source = open_pipeline(path)
    layers = quantizable_layers(source.denoiser)
    return {
        "kind": "checkpoint",
        "source": source.name,
        "denoiser": type(source.denoiser).__name__,
        "parameters": sum(p.numel() for p in source.denoiser.parameters()),
        "scheduler": type(source.pipeline.scheduler).__name__,
        "precisions": {"float": len(layers)},
        "layers": [
            {"name": name, "shape": list(module.weight.shape)} for name, module in layers.items()
        ],
    }
