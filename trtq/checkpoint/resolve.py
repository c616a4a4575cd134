"""What a model argument denotes: a folder, a shipped model, the hub's cache or a hub id.

This module loads neither torch nor diffusers, so that a wrong argument is refused at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from trtq.checkpoint.layout import CONFIG_NAME, INDEX_NAME, read_json
from trtq.checkpoint.shipped import shipped_model, shipped_models
from trtq.checkpoint.weight_files import single_file_refusal
from trtq.checkpoint.wording import one_line
from trtq.errors import ArtefactError

__all__ = ["is_hub_id", "resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


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
    if is_hub_id(name):
        return name
    raise ArtefactError(
        f"there is no model {one_line(repr(name))}: it is not a folder, not a hub id (owner/name), and "
        f"not a model that ships with trtq ({', '.join(shipped_models()) or 'none'})"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, OWNER/NAME."""
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
