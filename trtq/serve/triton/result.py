"""The result of `trtq package triton`."""

from __future__ import annotations

from dataclasses import dataclass

from trtq.results import Result

__all__ = ["PackagedModel", "TritonPackageResult"]


@dataclass(frozen=True, kw_only=True)
class PackagedModel(Result):
    """One model of a repository.

    Attributes:
        backend: Triton backend that runs the model.
        max_batch_size: maximum batch size, in items; 0: the server must not batch.
        files: paths of the files, relative to the folder of the model.
    """

    backend: str
    max_batch_size: int
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class TritonPackageResult(Result):
    """A finished model repository.

    Attributes:
        output: folder of the repository.
        models: models of the repository by name.
        bytes: total size of the files, in bytes.
        notes: remarks for the user, one sentence each.
    """

    output: str
    models: dict[str, PackagedModel]
    bytes: int
    notes: list[str]
