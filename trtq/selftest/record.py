"""The file of `trtq selftest`: its schema, and how it is written and read.

The file holds no name of host or user and no path. `sha256` is the hash of its content, so that a file
that was edited or cut is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtq.documents import explain_first, read_object, shown
from trtq.errors import ArtefactError

__all__ = [
    "MAX_FILE_BYTES",
    "SCHEMA",
    "GpuRow",
    "KernelRow",
    "SelftestFile",
    "TimeRow",
    "TrialRow",
    "read_selftest",
    "write_selftest",
]

SCHEMA = 1
MAX_FILE_BYTES = 200_000
_KIND = "trtq selftest"
_MAX_ERROR, _SHORT_ERROR = 400, 60
"""Maximum number of characters of an error, and of one in a file that would become too large."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrialRow(_Row):
    """The outcome of one trial.

    Attributes:
        stage: number of the stage.
        name: name of the trial.
        ok: whether it passed; None: it was skipped.
        seconds: duration.
        detail: what it measured or counted.
        error: the first thing that is wrong.
        skipped: why it was skipped, with the command that installs what is missing.
    """

    stage: int = Field(ge=0, le=7)
    name: str = Field(max_length=120)
    ok: bool | None
    seconds: float
    detail: dict[str, Any] = {}
    error: str | None = Field(default=None, max_length=_MAX_ERROR)
    skipped: str | None = Field(default=None, max_length=_MAX_ERROR)


class KernelRow(_Row):
    """What a loaded kernel takes of a processor.

    Attributes:
        variant: name of the variant.
        registers: registers of a thread.
        local_bytes: local memory of a thread.
        shared_bytes: static and dynamic shared memory of a block.
        blocks_per_sm: number of blocks that a processor holds at once.
    """

    variant: str
    registers: int
    local_bytes: int
    shared_bytes: int
    blocks_per_sm: int


class GpuRow(_Row):
    """A GPU, as the driver reports it; None: it does not.

    Attributes:
        name: name of the GPU.
        architecture: architecture, e.g. `sm89`.
        processors: number of streaming multiprocessors.
        memory_bytes: size of the memory.
        clock_mhz: highest clock of the processors.
        memory_mhz: highest clock of the memory.
        bus_bits: width of the memory's bus.
        cache_bytes: size of the L2 cache.
        watts_limit: limit of power.
        processes: number of processes that compute on the GPU.
        tested: whether the stages ran on this GPU.
    """

    name: str
    architecture: str
    processors: int
    memory_bytes: int
    clock_mhz: float | None = None
    memory_mhz: float | None = None
    bus_bits: int | None = None
    cache_bytes: int | None = None
    watts_limit: float | None = None
    processes: int | None = None
    tested: bool = False


class TimeRow(_Row):
    """The times of one layer in one form, in microseconds.

    Attributes:
        model: name of the model that has the layer.
        shape: input and output sizes, as text.
        form: bit widths, e.g. `w4a8`.
        tile: tile of the product.
        splits: number of blocks that divide the product of an output.
        wrong_values: number of outputs that differ from the layer's definition.
        both: duration of the layer, quantisation and product.
        quantise: duration of the quantisation alone.
        product: duration of the product alone.
        half: duration in half precision, cuBLAS or cuDNN.
        tiles: duration of the product by tile, without splits.
        predicted_quantise: predicted duration of the quantisation.
        predicted_product: predicted duration of the product.
        predicted_half: predicted duration in half precision.
        state: clocks, power and temperature after the row.
    """

    model: str
    shape: str
    form: str
    tile: str
    splits: int
    wrong_values: int
    both: float = Field(gt=0)
    quantise: float = Field(gt=0)
    product: float = Field(gt=0)
    half: float = Field(gt=0)
    tiles: dict[str, float] = {}
    predicted_quantise: float | None = None
    predicted_product: float | None = None
    predicted_half: float | None = None
    state: dict[str, float | None] = {}


class SelftestFile(_Row):
    """The content of the file.

    Attributes:
        kind: always `trtq selftest`.
        format_version: version of this schema; the key is `schema`.
        trtq: version of trtq.
        commit: commit of a checkout or of an installation from git; None for a release.
        options: options of the command, e.g. `--quick`.
        complete: whether the last stage has ended.
        machine: operating system, processor, driver and packages.
        gpus: all GPUs that the process may use.
        checks: outcomes of all trials.
        kernels: what each variant takes of a processor.
        rows: times of the benchmark's layers.
    """

    kind: Literal["trtq selftest"] = "trtq selftest"
    format_version: int = Field(default=SCHEMA, alias="schema")
    trtq: str
    commit: str | None = None
    options: list[str] = []
    complete: bool = False
    machine: dict[str, Any] = {}
    gpus: list[GpuRow] = []
    checks: list[TrialRow] = []
    kernels: list[KernelRow] = []
    rows: list[TimeRow] = []

    @property
    def failed(self) -> list[TrialRow]:
        """The trials that did not pass."""
        return [row for row in self.checks if row.ok is False]

    def to_json(self) -> dict[str, Any]:
        """Return the file's object, without the hash."""
        return self.model_dump(mode="json", by_alias=True)


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _text(content: dict[str, Any]) -> str:
    """The file's text, with each row on one line."""
    parts = []
    for key, value in (content | {"sha256": _digest(content)}).items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_selftest(path: Path, record: SelftestFile) -> None:
    """Write the file atomically; errors are shortened in a file that would become too large.

    Args:
        path: path of the file, which may exist.
        record: content of the file.

    Raises:
        ArtefactError: the disk is full, or writing fails.
    """
    text = _text(record.to_json())
    if len(text.encode()) > MAX_FILE_BYTES:
        short = [
            row.model_copy(update={"error": row.error and row.error[:_SHORT_ERROR], "detail": {}})
            for row in record.checks
        ]
        text = _text(record.model_copy(update={"checks": short}).to_json())
    try:
        handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as err:
        raise ArtefactError(f"cannot write {path}: {err.strerror}") from err


def read_selftest(path: Path) -> SelftestFile:
    """Read a file of `trtq selftest`.

    Raises:
        ArtefactError: the file is missing, damaged, changed, or of another schema.
    """
    content = read_object(path, max_bytes=MAX_FILE_BYTES)
    if content.get("kind") != _KIND:
        raise ArtefactError(f"{path} is not a file of trtq selftest")
    if content.get("schema") != SCHEMA:
        raise ArtefactError(
            f"{path} has schema {shown(content.get('schema'))}, this trtq reads {SCHEMA}; read it with "
            f"the trtq that wrote it, {shown(content.get('trtq'))}"
        )
    digest = content.pop("sha256", None)
    if digest != _digest(content):
        raise ArtefactError(
            f"{path} was changed after it was written: its hash is not that of its content; ask its "
            "owner for the file as trtq selftest wrote it"
        )
    try:
        return SelftestFile.model_validate(content)
    except ValidationError as err:
        raise ArtefactError(f"cannot read {path}: {explain_first(err)}") from err
