"""What a quantisation does before its long work: hash the checkpoint, clear an interrupted run."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from trtq.artefact.contents import source_hashes
from trtq.artefact.partial import has_checkpoint, partial_folder, remove_partial, strip_partial
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import UsageError

__all__ = ["clear_partial", "source_files"]

logger = logging.getLogger(__name__)


def source_files(source: LoadedPipeline) -> dict[str, str]:
    """Hashes of the checkpoint's files, or of the denoiser's tensors if there are no files.

    Args:
        source: the loaded checkpoint.

    Returns:
        SHA-256 in hexadecimal by file.
    """
    if source.folder is not None:
        return source_hashes(source.folder)
    digest = hashlib.sha256()
    for name, tensor in source.denoiser.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return {f"{source.denoiser_name} (tensors)": digest.hexdigest()}


def clear_partial(final: Path, *, resume: bool, overwrite: bool) -> None:
    """Remove the remains of an interrupted run, unless the run is resumed.

    Args:
        final: folder of the run.
        resume: whether to continue from a checkpoint.
        overwrite: whether checkpoints may be removed.

    Raises:
        UsageError: there is a checkpoint, and neither `resume` nor `overwrite` is set.
    """
    partial = partial_folder(final)
    whole = has_checkpoint(partial)
    if resume and whole:
        strip_partial(partial)
        return
    if whole and not overwrite:
        raise UsageError(
            f"an interrupted run for {final} left checkpoints; pass --resume to go on from them, or "
            "--overwrite to start again"
        )
    if resume:
        logger.warning(
            "there is no complete checkpoint for %s; the run starts at its beginning", final
        )
    remove_partial(final)
