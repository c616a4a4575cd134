"""The folder that a model argument leads to: a folder, a shipped model, the hub's cache or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from trtq.diffusion.layout import CONFIG_NAME, INDEX_NAME, read_json
from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.shipped import shipped_model, shipped_models
from trtq.diffusion.single_file_layout import as_traced
from trtq.diffusion.tensor_file import open_tensor_file
from trtq.diffusion.weight_files import single_file_refusal
from trtq.diffusion.wording import one_line
from trtq.errors import ArtefactError

__all__ = ["config_folder", "download", "resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CONFIG_FILES = ["*.json", "**/*.json", "*.txt", "**/*.txt", "**/*.model"]
_TAKES = (
    "give a diffusers folder of the same architecture with --config FOLDER (config=...); only its "
    "configurations, tokenizers and scheduler are read, and the components that the file lacks"
)


def resolve_model(model: str | Path) -> Path | str:
    """The folder that a model argument denotes, or the argument itself if it is a hub id.

    Args:
        model: folder of a pipeline, folder `models--OWNER--NAME` of the hub's cache, name of a shipped
            model, or hub id.

    Raises:
        ArtefactError: the argument is neither a folder, a shipped model nor a hub id.
    """
    shipped = shipped_model(str(model))
    if shipped is not None and not Path(model).is_dir():
        return shipped
    folder, name = Path(model), str(model)
    if "\0" in name:
        raise ArtefactError(
            f"the model name {one_line(repr(name))} holds a NUL character; remove it"
        )
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
        if is_folder and not (folder / INDEX_NAME).is_file():
            folder = _snapshot(folder)
        if (is_folder and not (folder / INDEX_NAME).is_file()) or (exists and not is_folder):
            raise ArtefactError(_no_pipeline(folder))
    except OSError as err:
        raise ArtefactError(f"cannot read {one_line(repr(name))}: {err.strerror}") from err
    if is_folder:
        return folder
    if _is_hub_id(name):
        return name
    raise ArtefactError(
        f"there is no model {one_line(repr(name))}: it is not a folder, not a hub id (owner/name), and "
        f"not a model that ships with trtq ({', '.join(shipped_models()) or 'none'})"
    )


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _snapshot(folder: Path) -> Path:
    """The snapshot in a folder of the hub's cache; other folders are returned unchanged.

    Raises:
        ArtefactError: there are several snapshots, and `refs/main` names none of them.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    names = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        named = main.read_text(encoding="utf-8", errors="replace").strip()
        if named in names:
            return snapshots / named
    if len(names) == 1:
        return snapshots / names[0]
    if not names:
        raise ArtefactError(f"{snapshots} holds no snapshot; download the pipeline again")
    raise ArtefactError(
        f"{folder} holds {len(names)} snapshots, and its refs/main names none of them; give one of "
        f"them: {', '.join(str(snapshots / name) for name in names)}"
    )


def _no_pipeline(path: Path) -> str:
    """Message about an existing file or folder that is not a pipeline."""
    single = None if (path / CONFIG_NAME).is_file() else single_file_refusal(path)
    if single is not None:
        return single
    if not path.is_dir():
        return f"{path} is a file, not a pipeline; give the folder that holds its {INDEX_NAME}"
    if (path / CONFIG_NAME).is_file():
        class_name = read_json(path / CONFIG_NAME).get("_class_name")
        return (
            f"{path} is the folder of one component ({class_name or 'of an unnamed class'}) "
            f"and holds no {INDEX_NAME}; give the folder of the whole pipeline, with scheduler, "
            "text encoders and autoencoder"
        )
    subfolders = sorted(p.parent.name for p in path.glob(f"*/{INDEX_NAME}"))
    hint = f", e.g. its subfolder {subfolders[0]!r}" if subfolders else ""
    return f"{path} holds no {INDEX_NAME}; give the folder of a whole pipeline{hint}"


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
    if not Path(name).is_dir() and _is_hub_id(name):
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
            f"diffusers does not know the architecture of {file} by its {len(checkpoint)} tensors "
            f"({first!r}, ...); {_TAKES}"
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
