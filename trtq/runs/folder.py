"""Opening of a run: its manifest, its tensors and the torch denoiser built from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import FurtherRow, StructureRow
from trtq.artefact.opened import Opened, open_folder
from trtq.calls.pipeline import RecordedPipeline
from trtq.calls.stored import CALL_FOLDER, load_call
from trtq.diffusion.folder import load_pipeline_parts, skeleton
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import ArtefactError
from trtq.quant import LayerPlan, QuantizedDenoiser, Structure, TimestepTable, apply_structure
from trtq.runs.weights import FILE_NAME, StoredDenoiser, load_stored

__all__ = ["OpenRun", "RunDenoiser", "check_calibrated", "layer_plans", "open_run"]


@dataclass(frozen=True)
class RunDenoiser:
    """A low-bit denoiser of a verified run.

    Attributes:
        folder: folder of the run.
        name: name of the component.
        structure: rewritten modules.
        stored: tensors of the denoiser.
        table: the calibrated timesteps.
        argument: name of the denoiser's argument that holds the timestep.
        per_item: whether each batch item has its own step, see `trtq.quant.QuantizedDenoiser`.
    """

    folder: Path
    name: str
    structure: StructureRow
    stored: StoredDenoiser
    table: TimestepTable
    argument: str = "timestep"
    per_item: bool = True

    def float_skeleton(self) -> nn.Module:
        """The denoiser with its float tensors; the weights of its quantised layers have no memory."""
        model = _fresh(self.folder, self.name, self.structure)
        self.stored.load_floats(model)
        return model

    def build(self, *, kernels: bool = False, packed: bool = False) -> QuantizedDenoiser:
        """The low-bit denoiser in torch.

        Args:
            kernels: whether its layers run on trtq's kernels, see `trtq.quant.deploy`.
            packed: whether its layers unpack their codes in each call, see `trtq.quant.deploy`.
        """
        skeleton = _fresh(self.folder, self.name, self.structure)
        return self.stored.build(
            skeleton,
            self.table,
            kernels=kernels,
            packed=packed,
            timestep=self.argument,
            per_item=self.per_item,
        )


@dataclass(frozen=True)
class OpenRun:
    """A verified run.

    Attributes:
        folder: folder of the run.
        manifest: manifest of the run.
        denoisers: the low-bit denoisers, in the order of the manifest.
    """

    folder: Path
    manifest: Manifest
    denoisers: tuple[RunDenoiser, ...]

    @property
    def stored(self) -> StoredDenoiser:
        """Tensors of the first denoiser."""
        return self.denoisers[0].stored

    @property
    def table(self) -> TimestepTable:
        """The calibrated timesteps of the first denoiser."""
        return self.denoisers[0].table

    def float_skeleton(self) -> nn.Module:
        """See `RunDenoiser.float_skeleton`, for the first denoiser."""
        return self.denoisers[0].float_skeleton()

    def denoiser(self, *, kernels: bool = False) -> QuantizedDenoiser:
        """See `RunDenoiser.build`, for the first denoiser."""
        return self.denoisers[0].build(kernels=kernels)

    def source(self, denoiser: nn.Module | None = None, *, packed: bool = False) -> LoadedPipeline:
        """A pipeline around the low-bit denoisers in torch, or around `denoiser` as the first one.

        Args:
            denoiser: replaces the first denoiser; None: all are those of the run.
            packed: see `RunDenoiser.build`; the weights of other components stay in their files, too.
        """
        modules: dict[str, nn.Module] = {
            part.name: denoiser
            if denoiser is not None and index == 0
            else part.build(packed=packed)
            for index, part in enumerate(self.denoisers)
        }
        pipeline: Any = load_pipeline_parts(self.folder, modules, stored=packed)
        if self.manifest.recorded is not None:
            call = load_call(self.folder / CALL_FOLDER)
            return RecordedPipeline(
                str(self.folder), self.folder, pipeline, self.manifest.denoiser, call
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


def _fresh(folder: Path, name: str, row: StructureRow) -> nn.Module:
    """A model of a denoiser's class in the run's structure, without memory for its weights."""
    model = skeleton(folder, name, row.ip_adapter, row.ip_adapter_scales)
    apply_structure(model, Structure(tuple(row.attention), row.splits))
    return model


def layer_plans(manifest: Manifest | FurtherRow) -> list[LayerPlan]:
    """The plans of the layers that a manifest, or its row of a denoiser, lists."""
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
            smooth=row.smooth,
            rotate=row.rotate,
            scales=row.scales,
            outlier_ratio=row.outlier_ratio,
            format=row.format,
            group=row.group,
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
    rows = manifest.denoisers
    if not rows:
        return OpenRun(folder, manifest, (_open_denoiser(folder, manifest.denoiser, manifest),))
    parts = []
    for index, row in enumerate(rows):
        file = "" if index == 0 else f"{row.denoiser}/"
        part = _open_denoiser(folder, row.denoiser, row, file)
        parts.append(replace(part, argument=row.recorded.timestep, per_item=False))
    return OpenRun(folder, manifest, tuple(parts))


def _open_denoiser(
    folder: Path, name: str, row: Manifest | FurtherRow, place: str = ""
) -> RunDenoiser:
    """Read the tensors of one denoiser and compare them with its entries in the manifest."""
    timesteps = row.timesteps or []
    fresh = _fresh(folder, name, row.structure)
    stored = load_stored(folder / f"{place}{FILE_NAME}", fresh, layer_plans(row), timesteps)
    return RunDenoiser(folder, name, row.structure, stored, TimestepTable(timesteps))
