"""Memory and disk that an export needs, and whether codes stay packed while it runs.

The graph is written one weight at a time in any case. What takes memory is the comparison with torch:

    in memory    the integers of the torch reference, one byte per weight, and the weights that
                 onnxruntime folds and packs, `_SESSION_BYTES` per weight
    packed       the packed codes of the run and of the graph, which are read from their files, and one
                 layer, whose codes are unpacked when it is computed
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import FurtherRow
from trtq.artefact.opened import Opened, Run
from trtq.checkpoint.component_classes import is_component
from trtq.checkpoint.layout import read_index
from trtq.checkpoint.stored_models import float_bytes
from trtq.checkpoint.weight_files import find_weights, has_weights
from trtq.checkpoint.weights import read_header
from trtq.errors import ArtefactError, UsageError
from trtq.report.texts import bytes_text
from trtq.resources import available_bytes
from trtq.runs.weights import FILE_NAME

__all__ = ["ExportNeeds", "keeps_packed", "needs_of"]

logger = logging.getLogger(__name__)

_BASE = 900 << 20
"""Memory of the interpreter with torch, diffusers and onnxruntime, and of a trace, in bytes."""
_SESSION_BYTES = 3
"""Memory of onnxruntime per weight of a graph whose weights it folds and packs, in bytes."""
_LAYER_BYTES = 16
"""Memory per weight of the layer that is computed: integers and floats of torch and onnxruntime."""
_COPIES = 3
"""Number of times that the weights of a rewritten graph are in memory, packed."""
_MAX_REWRITTEN = (1 << 31) - 1
"""Maximum size of a graph in memory, in bytes, a limit of protobuf."""
_COMFY_BYTES = 2
"""Memory per weight of a file for ComfyUI, which is written as a whole."""
_SHARE_AVAILABLE = 0.8
"""Share of the available memory that an export may take; other programs use the rest."""


@dataclass(frozen=True)
class ExportNeeds:
    """What the export of a run needs, in bytes; activations are not counted.

    Attributes:
        in_memory: peak memory with unpacked codes.
        packed: peak memory with packed codes.
        disk: minimum size of the output.
        rewritten: size of the weights of a graph that onnxruntime computes in another form.
    """

    in_memory: int
    packed: int
    disk: int
    rewritten: int = 0


def needs_of(run: Run, *, target: str, precision: str) -> ExportNeeds:
    """What the export of a run needs, from the headers of its files.

    Args:
        run: the run.
        target: see `trtq.exporter.export.export`.
        precision: see `trtq.exporter.export.export`.

    Raises:
        ArtefactError: a header cannot be read.
    """
    weights = largest = codes = floats = 0
    for file, bits in _files(run.folder, run.manifest):
        for key, info in read_header(file).items():
            kind, _, rest = key.partition(":")
            name, _, leaf = rest.rpartition(":")
            if kind == "float":
                floats += math.prod(info.shape)
            elif leaf == "weight.codes" and name in bits:
                numbers = info.nbytes * 8 // bits[name]
                weights, largest = weights + numbers, max(largest, numbers)
                codes += info.nbytes
    # The run's tensors, and the float ones once more in the graph.
    base = _BASE + codes + 8 * floats
    if target == "comfy":
        needed = base + _COMFY_BYTES * weights
        return ExportNeeds(needed, needed, codes)
    parts = _part_bytes(run.folder)
    rows: Sequence[Manifest | FurtherRow] = run.manifest.denoisers or [run.manifest]
    other = target == "plugin" or any(
        layer.format == "nvfp4" for row in rows for layer in row.layers
    )
    rewritten = codes if other else 0
    base += _COPIES * rewritten
    return ExportNeeds(
        in_memory=base + float_bytes(run.folder) + (1 + _SESSION_BYTES) * weights,
        packed=base + parts + codes + _LAYER_BYTES * largest,
        disk=codes + (2 if precision == "fp16" else 4) * floats + parts,
        rewritten=rewritten,
    )


def _files(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, dict[str, int]]]:
    """The file of each denoiser, and the bits of its weights by layer."""
    rows: Sequence[Manifest | FurtherRow] = manifest.denoisers or [manifest]
    for index, row in enumerate(rows):
        place = folder if index == 0 else folder / row.denoiser
        bits = {layer.name: layer.weight_bits for layer in row.layers if layer.weight_bits}
        yield place / FILE_NAME, bits


def _part_bytes(folder: Path) -> int:
    """Size of the weights of a pipeline's other components in their files, in bytes."""
    names = [name for name, entry in read_index(folder).items() if is_component(name, entry)]
    return sum(find_weights(folder / name).nbytes for name in names if has_weights(folder / name))


def keeps_packed(
    opened: Opened, out: Path, memory: int | None, *, target: str, precision: str
) -> bool:
    """Whether codes stay packed in the comparison with torch; checks memory and disk before any work.

    Args:
        opened: a run, or a checkpoint, whose weights are always in memory.
        out: path of the output.
        memory: maximum memory in bytes; None: the memory that is available now.
        target: see `trtq.exporter.export.export`.
        precision: see `trtq.exporter.export.export`.

    Raises:
        UsageError: the export needs more memory than is given, or the graph is too large for the
            comparison with torch.
        ArtefactError: the output does not fit on the disk.
    """
    if not isinstance(opened, Run):
        if memory is not None:
            raise UsageError(
                f"--memory limits the export of a run, and {opened.place} is of kind {opened.kind!r}: "
                "leave it out, or quantise the model first (trtq quantize)"
            )
        return False
    try:
        needs = needs_of(opened, target=target, precision=precision)
    except ArtefactError:
        # The run is damaged; opening it names the fault.
        return False
    if needs.rewritten > _MAX_REWRITTEN:
        raise UsageError(
            f"the weights of {opened.place} take {bytes_text(needs.rewritten)} as plugins or in NVFP4, "
            "and onnxruntime compares at most 2.15 GB of them with torch; export integers or FP8 with "
            "--target qdq"
        )
    _check_disk(out, needs.disk)
    limit = memory or int(available_bytes() * _SHARE_AVAILABLE)
    if not limit or needs.in_memory <= limit:
        return False
    if needs.packed > limit:
        text = (
            f"the export of {opened.place} needs about {bytes_text(needs.packed)} of memory, more than "
            f"the {bytes_text(limit)} that may be used"
        )
        if memory is not None:
            raise UsageError(f"{text}; allow more with --memory")
        logger.warning(text)
    else:
        logger.log(
            logging.WARNING if memory is None else logging.INFO,
            "the export with unpacked codes needs about %s of memory, and %s may be used: codes stay "
            "packed, and the comparison with torch takes longer",
            bytes_text(needs.in_memory),
            bytes_text(limit),
        )
    return target != "comfy"


def _check_disk(out: Path, needed: int) -> None:
    """Raise if the disk has no room for an output of this size."""
    place = next(place for place in (out, *out.parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ArtefactError(
            f"{out} needs {bytes_text(needed)} of disk, and {bytes_text(free)} are free; free some, or "
            "choose another --output"
        )
