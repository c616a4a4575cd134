"""The manifest of an artefact, `manifest.json`.

An artefact is a folder whose manifest lists the SHA-256 of each of its files; see
`trtq.artefact.manifest_file` for reading and writing one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trtq.artefact.graph_metadata import check_layers, check_timesteps
from trtq.artefact.options import (
    EngineOptions,
    ExportOptions,
    LoraRecord,
    Metrics,
    RecipeRecord,
    parsed_as,
)
from trtq.artefact.records import (
    Bits,
    Digest,
    FileName,
    Given,
    ModulePath,
    Number,
    Text,
)

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Kind",
    "LayerRow",
    "Manifest",
    "SourceRow",
    "StructureRow",
]

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
Kind = Literal["run", "onnx", "engine"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRow(_Strict):
    """The precision of one linear layer, convolution or product of activations.

    Attributes:
        name: module path in the denoiser.
        kind: `linear`, `conv1d`, `conv2d`, `conv3d`, `product`, or `conv_transpose`, which stays float.
        weight_bits: bits of the weight; None if there is no weight, or the layer runs in float.
        activation_bits: bits of the (first) input; None if the layer runs in float.
        right_bits: bits of a product's second input.
        adapters: whether the layer had QALoRA adapters during fine-tuning.
        reason: reason for the choice of bits.
        input_of: an earlier layer with the same input, whose quantiser this layer uses.
    """

    name: ModulePath
    kind: Literal["linear", "conv1d", "conv2d", "conv3d", "conv_transpose", "product"]
    weight_bits: Bits | None
    activation_bits: Bits | None
    right_bits: Bits | None = None
    adapters: Annotated[bool, Field(strict=True)] = False
    reason: Text
    input_of: ModulePath | None = None

    @model_validator(mode="after")
    def _possible(self) -> LayerRow:
        widths = (self.weight_bits, self.activation_bits, self.right_bits)
        quantized = tuple(bits is not None for bits in widths)
        whole = (False, True, True) if self.kind == "product" else (True, True, False)
        if quantized not in (whole, (False, False, False)):
            raise ValueError(
                f"{self.name!r} is of kind {self.kind!r}, which has bits of "
                + ("both inputs and of no weight" if self.kind == "product" else "weight and input")
                + f", or is float; got weight, input, second input {widths}"
            )
        if self.kind == "conv_transpose" and any(quantized):
            raise ValueError(f"{self.name!r} is a transposed convolution, which stays float")
        if self.input_of is not None and (self.kind == "product" or not quantized[1]):
            raise ValueError(f"{self.name!r} quantises no single input, so it has no input_of")
        return self


class StructureRow(_Strict):
    """Modules that were rewritten before quantisation.

    Attributes:
        attention: paths of attention modules that are decomposed into their products.
        splits: number of input channels of the first part, by path of a split convolution.
    """

    attention: list[ModulePath] = []
    splits: dict[ModulePath, Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]] = {}


class SourceRow(_Strict):
    """The checkpoint or artefact that an artefact was made from.

    Attributes:
        name: name or path as given by the user.
        files: SHA-256 of its files, by path inside the source.
    """

    name: Given
    files: dict[str, Digest]


class Manifest(_Strict):
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
        loras: LoRAs merged into the weights before quantising.
        options: options of the export and the build.
        metrics: measurements taken while the artefact was made.
        packages: versions of the packages that made the artefact.
    """

    format_version: Annotated[int, Field(strict=True)] = FORMAT_VERSION
    kind: Kind
    files: dict[FileName, Digest] = {}
    source: SourceRow
    denoiser: Annotated[str, Field(strict=True, pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    recipe: Annotated[RecipeRecord, BeforeValidator(parsed_as(RecipeRecord))] | None = None
    timesteps: Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=1)] | None = None
    layers: list[LayerRow] = []
    structure: StructureRow = StructureRow()
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
        for before, after in pairwise(timesteps or ()):
            if not before < after:
                raise ValueError(
                    f"timesteps rise from the cleanest to the noisiest, got {after:g} after {before:g}"
                )
        return timesteps

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[LayerRow]) -> list[LayerRow]:
        above: dict[str, LayerRow] = {}
        for row in layers:
            if row.name in above:
                raise ValueError(f"the layer {row.name!r} is listed twice")
            if row.input_of is not None:
                owner = above.get(row.input_of)
                if owner is None:
                    raise ValueError(
                        f"{row.name!r} has the input of {row.input_of!r}, which is no layer before it"
                    )
                if owner.activation_bits != row.activation_bits or owner.kind == "product":
                    raise ValueError(
                        f"{row.name!r} has the input of {row.input_of!r}, which is quantised otherwise"
                    )
            above[row.name] = row
        return layers

    def layer_kinds(self) -> dict[str, str]:
        """Kind and precision of every layer by its name, e.g. `conv2d w4a8`."""
        kinds = {}
        for row in self.layers:
            widths = (("w", row.weight_bits), ("a", row.activation_bits), ("a", row.right_bits))
            precision = "".join(f"{what}{bits}" for what, bits in widths if bits is not None)
            kinds[row.name] = f"{row.kind} {precision or 'float'}"
        return kinds

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
        missing = [key for key in needed[self.kind] if getattr(self.options, key) is None]
        if missing:
            raise ValueError(f"options.{missing[0]}: is missing")
