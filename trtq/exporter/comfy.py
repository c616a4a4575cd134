"""Export of a run as a file for ComfyUI, whose kernels (comfy-kitchen) run the integers."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from trtq.artefact.folder import check_outside_artefacts
from trtq.artefact.opened import Opened, Run, open_artefact
from trtq.artefact.outputs import check_file, check_place, new_file
from trtq.checkpoint.layout import CONFIG_NAME, read_json
from trtq.checkpoint.wording import list_names
from trtq.errors import ArtefactError, UsageError
from trtq.exporter.comfy_weights import ComfyWeights, comfy_weights
from trtq.exporter.memory import keeps_packed
from trtq.exporter.result import ComfyFile, ComfyResult
from trtq.progress import ProgressCallback, silent
from trtq.resources import peak_rss_bytes
from trtq.runs.folder import RunDenoiser, open_run
from trtq.torch_settings import with_own_settings

__all__ = ["export_comfy"]

_SUFFIXES = (".safetensors", ".sft")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_STEP_SCALES = (
    "the activation scales per denoising step are not in the file: ComfyUI computes one scale per row "
    "of each layer's input while it runs"
)


@with_own_settings
def export_comfy(
    artefact: str | Path | Opened,
    out: str | Path,
    *,
    precision: str = "fp32",
    memory: int | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> ComfyResult:
    """Write the denoisers of a run as `.safetensors` files with ComfyUI's quantised layers.

    Args:
        artefact: the run, or its folder.
        out: the file; or a folder, where the file gets the run's name, and the denoiser's if the run has
            several. An existing folder keeps its other files.
        precision: `fp32` or `fp16`, for everything except integers and scales.
        memory: maximum memory in bytes, see `trtq.exporter.memory`; None: what is available.
        overwrite: replace an existing file.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        Sizes of the files, what they hold and what of the run they do not.

    Raises:
        UsageError: the artefact is not a run, the precision is unknown, or a file must not be written.
        ArtefactError: the run is damaged, or a value does not fit the precision.
    """
    start = time.monotonic()
    if precision not in _DTYPES:
        raise UsageError(f"unknown precision {precision!r}; choose one of {', '.join(_DTYPES)}")
    opened = open_artefact(artefact, verify=False)
    if not isinstance(opened, Run):
        raise UsageError(
            f"{opened.place} is of kind {opened.kind!r}; a file for ComfyUI is made of a run: quantise "
            "the model first (trtq quantize), and give the run"
        )
    names = [row.denoiser for row in opened.manifest.denoisers] or [opened.denoiser]
    places = _places(Path(out), opened, names, overwrite=overwrite)
    keeps_packed(opened, places[0].absolute(), memory, target="comfy", precision=precision)
    run = open_run(opened)
    files = []
    with _made_folder(places[0].parent), ExitStack() as stack:
        # All files are complete before the first one is moved to its place.
        partials = [stack.enter_context(new_file(p, overwrite=overwrite)) for p in places]
        for index, (part, partial) in enumerate(zip(run.denoisers, partials, strict=True)):
            progress("export", index + 1, len(places) + 1)
            files.append(_write(part, partial, places[index], precision))
    progress("export", len(places) + 1, len(places) + 1)
    return ComfyResult(
        files=files,
        seconds=round(time.monotonic() - start, 2),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _places(out: Path, run: Run, names: list[str], *, overwrite: bool) -> list[Path]:
    """The paths of the files, one per denoiser, checked before the run is read.

    Raises:
        UsageError: one file is given for several denoisers, or a file must not be written.
    """
    if out.suffix.lower() in _SUFFIXES and not out.is_dir():
        if len(names) > 1:
            raise UsageError(
                f"{run.place} has the denoisers {', '.join(names)}, one file each; give a folder as "
                "--output"
            )
        return [check_file(out, overwrite=overwrite, source=run)]
    folder = check_place(out, source=run)
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"{out} is not a folder; give a folder, or a file that ends in .safetensors"
        )
    check_outside_artefacts(folder / "file")
    stem = run.folder.resolve().name
    files = [
        folder / f"{stem if len(names) == 1 else f'{stem}-{name}'}.safetensors" for name in names
    ]
    for file in files:
        if folder.is_dir():
            check_file(file, overwrite=overwrite, source=run)
    return files


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """Create a missing folder; remove it again if the block fails.

    Raises:
        UsageError: the folder cannot be created.
    """
    if folder.is_dir():
        yield
        return
    try:
        folder.mkdir(parents=True)
    except OSError as err:
        raise UsageError(
            f"cannot write to {folder}: {err.strerror}; choose another --output"
        ) from err
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def _write(part: RunDenoiser, partial: Path, place: Path, precision: str) -> ComfyFile:
    """Write the file of one denoiser to `partial`, which is moved to `place` later."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = read_json(part.folder / part.name / CONFIG_NAME)
    weights = comfy_weights(
        str(config.get("_class_name")),
        config,
        part.stored.layers,
        part.stored.floats,
        part.structure.splits,
    )
    notes = _notes(weights, str(config.get("_class_name")))
    tensors = {
        name: _cast(name, tensor, precision, part.folder) for name, tensor in weights.floats.items()
    }
    for name, stored in weights.layers.items():
        entries = stored.entries(name)
        if stored.format.name == "awq_w4a16":
            # comfy-kitchen computes such a layer in the type of its scales.
            for leaf in ("weight_scale", "weight_zeros"):
                entries[f"{name}.{leaf}"] = entries[f"{name}.{leaf}"].to(_DTYPES[precision])
        tensors |= entries
    # One key only: safetensors writes several keys in any order, and equal runs give equal files.
    metadata = {"trtq": json.dumps({"run": part.folder.resolve().name, "notes": notes})}
    try:
        save_file(tensors, partial, metadata)
    except SafetensorError as err:
        raise ArtefactError(f"writing {place} failed, nothing of it is left: {err}") from err
    return ComfyFile(
        path=str(place),
        names="original" if weights.is_original else "diffusers",
        formats=dict(Counter(layer.format.name for layer in weights.layers.values())),
        layers_quantized=len(weights.layers),
        bytes=partial.stat().st_size,
        notes=notes,
    )


def _cast(name: str, tensor: Tensor, precision: str, folder: Path) -> Tensor:
    """A tensor in the chosen precision.

    Raises:
        ArtefactError: a value is outside the range of the precision.
    """
    if not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(_DTYPES[precision]).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise ArtefactError(
            f"{folder}: {name!r} holds values that {precision} cannot represent; export it with "
            "--precision fp32"
        )
    return cast


def _notes(weights: ComfyWeights, model_class: str) -> list[str]:
    """What of the run the file does not hold, one sentence each."""
    notes = [_STEP_SCALES]
    if weights.convolutions:
        notes.append(
            f"{weights.convolutions} low-bit convolutions are in float with the values of their "
            "integers, because ComfyUI quantises linear layers only"
        )
    if weights.products:
        notes.append(f"{weights.products} low-bit products of attention run in float in ComfyUI")
    if weights.joined:
        notes.append(
            f"{len(weights.joined)} tensors are in float, because they join low-bit layers with others: "
            f"{list_names(weights.joined)}"
        )
    if weights.requantized:
        notes.append(
            f"{len(weights.requantized)} layers are quantised again to 8 bits, because ComfyUI has no "
            "smoothing of their inputs and computes attention in float: "
            f"{list_names(weights.requantized)}"
        )
    if weights.problem is not None:
        notes.append(
            f"the tensors have diffusers' names: for a {model_class}, {weights.problem}; ComfyUI may "
            "not recognise the file"
        )
    return notes
