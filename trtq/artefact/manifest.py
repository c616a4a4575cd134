"""The manifest of an artefact, `manifest.json`.

An artefact is a folder whose manifest lists the SHA-256 of each of its files; see
`trtq.artefact.manifest_file` for reading and writing one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
)

from trtq.artefact.graph_metadata import check_layers, check_timesteps
from trtq.artefact.manifest_rows import (
    FurtherRow,
    LayerRow,
    RecordedRow,
    SourceRow,
    StructureRow,
    check_layer_rows,
    check_order,
    layer_kinds,
)
from trtq.artefact.options import (
    EngineOptions,
    ExportOptions,
    LoraRecord,
    Metrics,
    RecipeRecord,
    parsed_as,
)
from trtq.artefact.records import (
    Digest,
    FileName,
    Number,
    Text,
)

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "Kind", "Manifest"]

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
Kind = Literal["run", "onnx", "engine"]


class Manifest(BaseModel):
    """Contents of `manifest.json`.

    Attributes:
        format_version: version of this record.
        kind: `run`, `onnx` or `engine`.
        files: SHA-256 of every file in the folder, by relative POSIX path.
        source: the checkpoint or artefact that this artefact was made from.
        denoiser: name of the denoiser component, e.g. `unet`.
        recipe: recipe of the quantisation; None for a float model.
        timesteps: the calibrated timesteps, cleanest first; None for a float model.
        layers: one row per linear, convolution and product of activations of the denoiser.
        structure: rewritten modules, see `trtq.quant.structure`.
        recorded: how the pipeline calls the denoiser; None for an artefact that was made from noise
            levels in closed form.
        further: the pipeline's other denoisers, if it has several.
        loras: LoRAs merged into the weights before quantising.
        options: options of the export and the build.
        metrics: measurements taken while the artefact was made.
        packages: versions of the packages that made the artefact.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Annotated[int, Field(strict=True)] = FORMAT_VERSION
    kind: Kind
    files: dict[FileName, Digest] = {}
    source: SourceRow
    denoiser: Annotated[str, Field(strict=True, pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    recipe: Annotated[RecipeRecord, BeforeValidator(parsed_as(RecipeRecord))] | None = None
    timesteps: Annotated[list[Number], Field(min_length=1)] | None = None
    layers: list[LayerRow] = []
    structure: StructureRow = StructureRow()
    recorded: RecordedRow | None = None
    further: list[FurtherRow] = []
    loras: list[Annotated[LoraRecord, BeforeValidator(parsed_as(LoraRecord))]] = []
    options: Annotated[SerializeAsAny[ExportOptions], Field(validate_default=True)] = (
        ExportOptions()
    )
    metrics: Annotated[Metrics, BeforeValidator(parsed_as(Metrics))] = Metrics()
    packages: dict[Text, Text] = {}

    @field_validator("options", mode="before")
    @classmethod
    def _options_of_kind(cls, options: Any, info: ValidationInfo) -> ExportOptions:
        if info.data.get("kind") == "engine":
            return parsed_as(EngineOptions)(options)
        return parsed_as(ExportOptions)(options)

    @field_validator("files")
    @classmethod
    def _not_itself(cls, files: dict[str, str]) -> dict[str, str]:
        if MANIFEST_NAME in files:
            raise ValueError(f"{MANIFEST_NAME} cannot hold its own SHA-256")
        return files

    @field_validator("timesteps")
    @classmethod
    def _cleanest_first(cls, timesteps: list[float] | None) -> list[float] | None:
        return check_order(timesteps)

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[LayerRow]) -> list[LayerRow]:
        return check_layer_rows(layers)

    @property
    def denoisers(self) -> list[FurtherRow]:
        """Every recorded denoiser, the first one included; empty unless `recorded` is given."""
        if self.recorded is None:
            return []
        first = FurtherRow(
            denoiser=self.denoiser,
            timesteps=self.timesteps,
            layers=self.layers,
            structure=self.structure,
            recorded=self.recorded,
        )
        return [first, *self.further]

    def layer_kinds(self) -> dict[str, str]:
        """Kind and precision of every layer by its name, e.g. `conv2d w4a8`."""
        return layer_kinds(self.layers)

    def check_graph(self, metadata: Mapping[str, str]) -> None:
        """Raise unless the denoiser's graph is the one that this manifest describes.

        Args:
            metadata: metadata of the graph.

        Raises:
            ArtefactError: the graph was calibrated at other timesteps, or holds other layers or bits.
        """
        check_timesteps(metadata, self.timesteps)
        check_layers(metadata, self.layer_kinds())

    def check_whole(self) -> None:
        """Raise unless the manifest holds every entry that its kind requires.

        Raises:
            ValueError: an entry is missing; the message names it.
        """
        quantized = [row.name for row in self.layers if row.activation_bits is not None]
        if self.kind == "run" and self.recipe is None:
            raise ValueError("recipe: is missing, a run has one")
        if self.recorded is None and self.timesteps is not None and self.timesteps[0] < 0:
            raise ValueError(f"timesteps.0: must be 0 or more, got {self.timesteps[0]:g}")
        if (self.recipe is None) != (self.timesteps is None):
            raise ValueError("timesteps: must be there if there is a recipe, and only then")
        if self.recipe is None and quantized:
            raise ValueError(f"layers: {quantized[0]!r} is low-bit, though there is no recipe")
        if self.recipe is not None:
            missing = [
                key for key in ("method", "bits", "steps") if getattr(self.recipe, key) is None
            ]
            if missing:
                raise ValueError(f"recipe.{missing[0]}: is missing")
            if not quantized:
                raise ValueError("layers: none is low-bit, though there is a recipe")
            if self.recipe.tables == "static" and len(self.timesteps or ()) != 1:
                raise ValueError(
                    f"timesteps: static tables have one, got {len(self.timesteps or ())}"
                )
        needed = {"run": (), "onnx": ("size",), "engine": ("size", "backend", "architectures")}
        missing = [
            key
            for key in needed[self.kind]
            if getattr(self.options, key) is None
            # A recorded call need not have a size in pixels.
            and not (key == "size" and self.recorded is not None)
        ]
        if missing:
            raise ValueError(f"options.{missing[0]}: is missing")
