"""The folder that a model argument leads to: a folder, a shipped model, the hub's cache or a hub id."""

from __future__ import annotations

from pathlib import Path

from trtq.checkpoint.layout import INDEX_NAME
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.checkpoint.resolve import is_hub_id, resolve_model
from trtq.checkpoint.single_file_layout import as_traced
from trtq.checkpoint.tensor_file import open_tensor_file
from trtq.checkpoint.wording import one_line
from trtq.errors import ArtefactError

__all__ = ["config_folder", "download"]

_CONFIG_FILES = ["*.json", "**/*.json", "*.txt", "**/*.txt", "**/*.model"]
_TAKES = (
    "give a diffusers folder of the same architecture with --config FOLDER (config=...); only its "
    "configurations, tokenizers and scheduler are read, and the components that the file lacks"
)


def download(name: str) -> Path:
    """Download the pipeline of a hub id into the hub's cache.

    Raises:
        ArtefactError: the repository does not exist or cannot be reached.
    """
    from diffusers import DiffusionPipeline

    try:
        with quiet_diffusers():
            folder = DiffusionPipeline.download(name, use_safetensors=True)
    # The hub's client and diffusers let any exception of their network libraries through.
    except Exception as err:
        raise ArtefactError(
            f"cannot load the pipeline {name!r} from the hub ({one_line(err)}); check the name and "
            "the connection, or download the pipeline (`hf download`) and give its folder"
        ) from err
    return Path(folder)


def config_folder(file: Path, config: str | Path | None) -> Path:
    """The diffusers folder that configures a single-file checkpoint.

    Args:
        file: the checkpoint.
        config: folder or hub id of a pipeline of the same architecture; None: the hub id that diffusers
            infers from the names of the tensors.

    Raises:
        ArtefactError: the layout of the file is unknown, there is no such folder, or the hub id cannot
            be fetched.
    """
    name = _inferred_id(file) if config is None else str(config)
    if not Path(name).is_dir() and is_hub_id(name):
        return _downloaded_configs(file, name, is_inferred=config is None)
    try:
        place = resolve_model(name)
    except ArtefactError as err:
        raise ArtefactError(f"--config (config=...) of {file}: {err}") from err
    return Path(place)


def _inferred_id(file: Path) -> str:
    """The hub id of the pipeline whose layout a file has.

    Raises:
        ArtefactError: diffusers does not know the layout.
    """
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, fetch_diffusers_config

    checkpoint = as_traced(open_tensor_file(file).header)
    try:
        name = str(fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"])
        default = str(fetch_diffusers_config({})["pretrained_model_name_or_path"])
    # diffusers reads shapes of tensors that only some layouts have.
    except Exception as err:
        raise ArtefactError(
            f"diffusers cannot tell the architecture of {file} from its tensors ({one_line(err)}); "
            f"{_TAKES}"
        ) from err
    # diffusers answers with its first architecture for every layout that it does not know.
    if name == default and CHECKPOINT_KEY_NAMES["v1"] not in checkpoint:
        first = min(checkpoint, default="none")
        raise ArtefactError(
            f"diffusers does not know the architecture of the single-file checkpoint {file} by "
            f"its {len(checkpoint)} tensors ({first!r}, ...); {_TAKES}"
        )
    return name


def _downloaded_configs(file: Path, name: str, *, is_inferred: bool) -> Path:
    """Download everything except the weights of a hub id into the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_CONFIG_FILES))
    # The hub's client lets any exception of its network libraries through.
    except Exception as err:
        whose = "by its tensors of the architecture" if is_inferred else "to be configured by"
        raise ArtefactError(
            f"{file} is a single-file checkpoint, {whose} {name!r}, which cannot be fetched "
            f"from the hub ({one_line(err)}); {_TAKES}"
        ) from err
    if not (folder / INDEX_NAME).is_file():
        raise ArtefactError(
            f"{file} is configured by {name!r}, which holds no {INDEX_NAME} and thus no pipeline; "
            f"{_TAKES}"
        )
    return folder
