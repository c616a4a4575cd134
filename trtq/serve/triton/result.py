"""What `trtq package triton` returns."""

from __future__ import annotations

from dataclasses import dataclass

from trtq.results import Result

__all__ = ["PackagedModel", "TritonPackageResult"]


@dataclass(frozen=True, kw_only=True)
class PackagedModel(Result):
    """One model of the repository.

    Attributes:
        backend: Triton backend that runs it.
        max_batch_size: maximum batch size; 0 if the server must not batch.
        files: its files.
    """

    backend: str
    max_batch_size: int
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class TritonPackageResult(Result):
    """A finished model repository.

    Attributes:
        output: its folder.
        models: its models by name.
        bytes: size of all files.
        notes: sentences for the reader.
    """

    output: str
    models: dict[str, PackagedModel]
    bytes: int
    notes: list[str]
