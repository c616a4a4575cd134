"""Opening of a run: its manifest, its tensors and the torch denoiser built from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trtq.artefact.manifest import Manifest
from trtq.artefact.opened import Opened, open_folder
from trtq.diffusion.folder import load_pipeline_parts, skeleton
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import ArtefactError
from trtq.quant import LayerPlan, QuantizedDenoiser, Structure, TimestepTable, apply_structure
from trtq.runs.weights import FILE_NAME, StoredDenoiser, load_stored

__all__ = ["OpenRun", "check_calibrated", "layer_plans", "open_run"]


@dataclass(frozen=True)
class OpenRun:
    """A verified run.

    Attributes:
        folder: folder of the run.
        manifest: manifest of the run.
        stored: tensors of the denoiser.
        table: the calibrated timesteps.
    """

    folder: Path
    manifest: Manifest
    stored: StoredDenoiser
    table: TimestepTable

    def float_skeleton(self) -> nn.Module:
        """The denoiser with its float tensors; the weights of its quantised layers have no memory."""
        model = _fresh(self.folder, self.manifest)
        self.stored.load_floats(model)
        return model

    def denoiser(self, *, kernels: bool = False) -> QuantizedDenoiser:
        """The low-bit denoiser in torch, on trtq's kernels if `kernels`, see `trtq.quant.deploy`."""
        skeleton = _fresh(self.folder, self.manifest)
        return self.stored.build(skeleton, self.table, kernels=kernels)

    def source(self, denoiser: nn.Module | None = None) -> LoadedPipeline:
        """A pipeline around the low-bit denoiser in torch, or around `denoiser` in its place."""
        pipeline: Any = load_pipeline_parts(
            self.folder, self.manifest.denoiser, denoiser or self.denoiser()
        )
        source = LoadedPipeline(str(self.folder), self.folder, pipeline, self.manifest.denoiser)
        recipe = self.manifest.recipe
        if recipe is not None and recipe.size is not None:
            source = source.sized(recipe.size)
        check_calibrated(source, self.manifest)
        return source


def check_calibrated(source: LoadedPipeline, manifest: Manifest) -> None:
    """Raise unless the scheduler uses as many timesteps as were calibrated.

    Args:
        source: the pipeline of the artefact.
        manifest: manifest of the artefact.

    Raises:
        ArtefactError: the numbers differ, so the manifest or the scheduler was edited.
    """
    recipe = manifest.recipe
    if recipe is None or manifest.timesteps is None or recipe.tables == "static":
        return
    steps = recipe.steps
    assert steps is not None  # Every recipe in a manifest gives its number of steps.
    calls = len(set(source.timesteps(steps)))
    if calls != len(manifest.timesteps):
        raise ArtefactError(
            f"{source.name}: {steps} steps of its scheduler call the denoiser at {calls} "
            f"timesteps, and it was calibrated at {len(manifest.timesteps)}; the manifest or the "
            "scheduler's configuration was edited"
        )


def _fresh(folder: Path, manifest: Manifest) -> nn.Module:
    """A model of the denoiser's class in the run's structure, without memory for its weights."""
    model = skeleton(folder, manifest.denoiser)
    structure = Structure(tuple(manifest.structure.attention), manifest.structure.splits)
    apply_structure(model, structure)
    return model


def layer_plans(manifest: Manifest) -> list[LayerPlan]:
    """The plans of the layers that a manifest lists."""
    return [
        LayerPlan(
            row.name,
            row.kind,
            row.weight_bits,
            row.activation_bits,
            row.reason,
            adapters=row.adapters,
            right_bits=row.right_bits,
            input_of=row.input_of,
        )
        for row in manifest.layers
    ]


def open_run(place: str | Path | Opened) -> OpenRun:
    """Read and verify a run.

    Args:
        place: folder of the run, or the opened run.

    Returns:
        The verified run.

    Raises:
        ArtefactError: the folder is not a run, or the run is damaged.
        IntegrityError: a file does not match the manifest.
    """
    opened = open_folder(place, "run")
    folder, manifest = opened.folder, opened.manifest
    fresh = _fresh(folder, manifest)
    timesteps = manifest.timesteps or []
    stored = load_stored(folder / FILE_NAME, fresh, layer_plans(manifest), timesteps)
    return OpenRun(folder, manifest, stored, TimestepTable(timesteps))
