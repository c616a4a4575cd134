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
        max_batch_size: maximum batch size; 0 if the server must not batch.
        files: paths of the model's files, relative to its folder.
    """

    backend: str
    max_batch_size: int
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class TritonPackageResult(Result):
    """A finished model repository.

    Attributes:
        output: path of the repository.
        models: the models by name.
        bytes: total size of the files, in bytes.
        notes: hints for the user.
    """

    output: str
    models: dict[str, PackagedModel]
    bytes: int
    notes: list[str]
