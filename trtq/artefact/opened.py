"""Opened artefacts: path resolved, manifest read, files verified once.

Every public function accepts a path or an opened artefact and passes the opened artefact on, so that no
file is hashed twice and each default is defined once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from trtq.artefact.manifest import Kind, Manifest
from trtq.artefact.manifest_file import check_kind, has_manifest, parse_manifest, verify_files
from trtq.artefact.options import EngineOptions
from trtq.errors import UsageError

__all__ = [
    "DEFAULT_STEPS",
    "Checkpoint",
    "EngineFolder",
    "GraphFolder",
    "OnnxFolder",
    "Opened",
    "Run",
    "StoredArtefact",
    "open_artefact",
    "open_folder",
    "open_onnx",
    "stored",
]

DEFAULT_STEPS = 20
"""Number of denoising steps if neither the caller nor a calibration gives one."""


@dataclass(frozen=True, eq=False)
class Opened:
    """Base class of the objects that `open_artefact` returns.

    Attributes:
        place: folder, file, name, hub id or pipeline object, as given by the caller.
        config: folder or hub id that configures a single-file checkpoint; None: the model is of another
            kind, or diffusers infers the hub id.
    """

    place: Any
    config: str | Path | None = field(default=None, kw_only=True)

    kind: ClassVar[str]

    @property
    def low_bit(self) -> bool:
        """Whether the model is quantised."""
        return False

    @property
    def steps(self) -> int | None:
        """Number of denoising steps of the calibration; None for a float model."""
        return None

    @property
    def guidance(self) -> float | None:
        """Guidance scale of the calibration; None for a float model."""
        return None

    @property
    def bits(self) -> str:
        """Bits of weights and activations, e.g. `w4a8`; the precision of a float model."""
        return self.precision

    @property
    def precision(self) -> str:
        """Precision of everything that is not an integer: `fp32` or `fp16`."""
        return "fp32"

    @property
    def size(self) -> str | None:
        """Image size `HEIGHTxWIDTH` in pixels, or a range `SMALLEST:LARGEST`; None: the default."""
        return None

    @property
    def smallest_size(self) -> str | None:
        """Smallest image size `HEIGHTxWIDTH` in pixels; None: the model's default."""
        return None if self.size is None else self.size.partition(":")[0]

    def verified(self) -> Self:
        """Compare the files with the manifest, at most once, and return the verified artefact.

        Raises:
            IntegrityError: a file is missing, changed or damaged, or a loader would read a file that is
                not listed.
        """
        return self


@dataclass(frozen=True, eq=False)
class Checkpoint(Opened):
    """A float model: a diffusers folder or file, a shipped model, a hub id or a pipeline object."""

    kind: ClassVar[str] = "checkpoint"


@dataclass(frozen=True, eq=False)
class StoredArtefact(Opened):
    """Base class of artefacts with a manifest.

    Attributes:
        folder: folder of the artefact.
        manifest: manifest of the artefact.
        is_verified: whether the files were compared with the manifest.
    """

    folder: Path
    manifest: Manifest
    is_verified: bool = False

    @property
    def denoiser(self) -> str:
        """Name of the denoiser component, e.g. `unet`."""
        return self.manifest.denoiser

    @property
    def low_bit(self) -> bool:
        """Whether the model is quantised."""
        return self.manifest.recipe is not None

    @property
    def steps(self) -> int | None:
        """Number of denoising steps of the calibration; None for a float model."""
        recipe = self.manifest.recipe
        return None if recipe is None else recipe.steps

    @property
    def guidance(self) -> float | None:
        """Guidance scale of the calibration; None for a float model."""
        recipe = self.manifest.recipe
        return None if recipe is None else recipe.guidance

    @property
    def bits(self) -> str:
        """Bits of weights and activations, e.g. `w4a8`; the precision of a float model."""
        recipe = self.manifest.recipe
        return self.precision if recipe is None else str(recipe.bits)

    @property
    def precision(self) -> str:
        """Precision of everything that is not an integer: `fp32` or `fp16`."""
        return self.manifest.options.precision

    @property
    def size(self) -> str | None:
        """Image size `HEIGHTxWIDTH` in pixels, or a range `SMALLEST:LARGEST`; None: the default."""
        recipe = self.manifest.recipe
        return self.manifest.options.size or (None if recipe is None else recipe.size)

    def verified(self) -> Self:
        """Compare the files with the manifest, at most once, and return the verified artefact.

        Raises:
            IntegrityError: a file is missing, changed or damaged, or a loader would read a file that is
                not listed.
        """
        if self.is_verified:
            return self
        verify_files(self.folder, self.manifest)
        return replace(self, is_verified=True)


@dataclass(frozen=True, eq=False)
class Run(StoredArtefact):
    """A low-bit model in torch."""

    kind: ClassVar[str] = "run"


@dataclass(frozen=True, eq=False)
class GraphFolder(StoredArtefact):
    """Base class of ONNX and engine folders."""

    @property
    def batch(self) -> tuple[int, int]:
        """Minimum and maximum batch size, in images, of engines of these graphs."""
        return self.manifest.options.batch

    @property
    def graph_metadata(self) -> Mapping[str, str]:
        """Metadata of the denoiser's graph; empty if the graph's own file holds it."""
        return {}

    @property
    def target(self) -> str | None:
        """Form of the low-bit layers: `qdq` or `plugin`; None if it was not recorded."""
        return self.manifest.options.target


@dataclass(frozen=True, eq=False)
class OnnxFolder(GraphFolder):
    """Graphs for onnxruntime."""

    kind: ClassVar[str] = "onnx"


@dataclass(frozen=True, eq=False)
class EngineFolder(GraphFolder):
    """Engines of TensorRT, built from an ONNX folder."""

    kind: ClassVar[str] = "engine"

    @property
    def options(self) -> EngineOptions:
        """Options of the build."""
        options = self.manifest.options
        assert isinstance(options, EngineOptions)
        return options

    @property
    def backend(self) -> str:
        """Backend that built the engines and runs them: `tensorrt-rtx` or `tensorrt`."""
        return str(self.options.backend)

    @property
    def graph_metadata(self) -> Mapping[str, str]:
        """Metadata of the denoiser's graph, which an engine does not keep."""
        return self.options.graph_metadata


_CLASSES: dict[Kind, type[StoredArtefact]] = {
    "run": Run,
    "onnx": OnnxFolder,
    "engine": EngineFolder,
}


def open_artefact(
    place: str | Path | Any, *, verify: bool = True, config: str | Path | None = None
) -> Opened:
    """Open an artefact or a checkpoint.

    Args:
        place: a folder, the name of a shipped model, a hub id or a pipeline object; an opened artefact
            is returned unchanged.
        verify: compare every file with the manifest now; otherwise `Opened.verified` does it later.
        config: folder or hub id that configures a single-file checkpoint; None: see `Opened.config`.

    Returns:
        A `Checkpoint`, `Run`, `OnnxFolder` or `EngineFolder`. A checkpoint may not exist.

    Raises:
        ArtefactError: the folder has a manifest that cannot be read.
        IntegrityError: a file does not match the manifest.
        UsageError: `config` is given for an artefact.
    """
    if isinstance(place, Opened):
        opened = place
    elif isinstance(place, str | Path) and Path(place).is_dir() and has_manifest(Path(place)):
        opened = open_folder(place, verify=False)
    else:
        return Checkpoint(place, config=config)
    if config is not None:
        raise UsageError(
            f"--config (config=...) configures a single-file checkpoint (.safetensors), but "
            f"{opened.place} is of kind {opened.kind!r}; leave it out"
        )
    return opened.verified() if verify else opened


def stored(opened: Opened) -> StoredArtefact:
    """The same artefact.

    Raises:
        UsageError: a checkpoint, not an artefact, was opened.
    """
    if not isinstance(opened, StoredArtefact):
        raise UsageError(
            f"{opened.place} is no artefact of trtq; give a run, an ONNX folder or engines"
        )
    return opened


def open_onnx(place: str | Path | Opened, *, verify: bool = True) -> StoredArtefact:
    """Open an ONNX folder.

    Args:
        place: the folder, or an opened artefact.
        verify: see `open_artefact`.

    Raises:
        UsageError: there is no artefact in the folder.
        ArtefactError: the artefact is of another kind, or its manifest cannot be read.
        IntegrityError: a file does not match the manifest.
    """
    if not isinstance(place, Opened) and not has_manifest(Path(place)):
        raise UsageError(f"{place} is not an ONNX folder; make one first: trtq export RUN -o ONNX")
    return open_folder(place, "onnx", verify=verify)


def open_folder(place: str | Path | Opened, *kinds: Kind, verify: bool = True) -> StoredArtefact:
    """Open a folder that must hold an artefact.

    Args:
        place: the folder, or an opened artefact.
        kinds: permitted kinds; every kind if none is given.
        verify: see `open_artefact`.

    Returns:
        A `Run`, `OnnxFolder` or `EngineFolder`.

    Raises:
        ArtefactError: there is no artefact in the folder, or it is of another kind.
        IntegrityError: a file does not match the manifest.
    """
    if isinstance(place, StoredArtefact):
        opened = place
    else:
        folder = Path(place.place if isinstance(place, Opened) else place)
        manifest = parse_manifest(folder)
        opened = _CLASSES[manifest.kind](place, folder, manifest)
    check_kind(opened.folder, opened.manifest, *kinds)
    return opened.verified() if verify else opened
