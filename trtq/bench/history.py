"""Comparison of a result with an earlier result of `trtq bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from trtq.bench.result import ComparedValue, HistoryComparison
from trtq.bench.summary import compare_medians
from trtq.documents import parse_json, read_text, shown
from trtq.errors import ArtefactError, UsageError
from trtq.limits import MAX_BATCH, MAX_STEPS

__all__ = ["FORMAT_VERSION", "EarlierResult", "check_same_run", "compare", "read_earlier"]

FORMAT_VERSION = 2
"""Format version of the JSON result of `trtq bench`."""

_WHAT = "give what `trtq bench --json` printed, or the report.json of a report"
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None


class _Turns(BaseModel):
    turns: Annotated[list[_Positive], Field(min_length=1)]


class _Batch(BaseModel):
    batch: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    parts: dict[str, _Turns]
    batch_of_images: _Turns


class _Memory(BaseModel):
    weights_bytes: _Amount = None
    activations_bytes: _Amount = None
    peak_bytes: _Amount = None
    gpu_bytes: _Amount = None


class _Row(BaseModel):
    path: str
    provider: str
    bits: str
    device: str | None
    measured: bool
    load_seconds: _Amount
    build_seconds: _Amount
    denoiser_bytes: _Amount
    memory: _Memory | None
    batches: list[_Batch]

    @property
    def label(self) -> str:
        return f"{self.path}@{self.provider}"


class EarlierResult(BaseModel):
    """The compared part of an earlier JSON result of `trtq bench`."""

    device: dict[str, Any]
    date: str | None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    guidance: Annotated[float, Field(allow_inf_nan=False)]
    model_class: str
    shape: list[int]
    rows: list[_Row]


def read_earlier(path: Path, device: dict[str, Any]) -> EarlierResult:
    """Read an earlier result to compare with.

    Args:
        path: JSON file.
        device: description of the current device.

    Raises:
        UsageError: the file is not a result of `trtq bench`, or is from another device.
    """
    try:
        # The validation below rejects non-finite numbers and names their location.
        document = parse_json(read_text(path), finite=False)
    except ArtefactError as err:
        raise UsageError(f"--baseline: {err}; {_WHAT}") from err
    except ValueError as err:
        raise UsageError(f"--baseline: cannot read {path}: {err}; {_WHAT}") from err
    if not isinstance(document, dict) or not {"format_version", "rows", "device"} <= set(document):
        raise UsageError(f"--baseline: {path} is not a result of trtq bench; {_WHAT}")
    if document["format_version"] != FORMAT_VERSION:
        raise UsageError(
            f"--baseline: {path} has format version {shown(document['format_version'])}; trtq reads "
            f"{FORMAT_VERSION}; measure again"
        )
    earlier = _validate(path, document)
    for key, value in device.items():
        if earlier.device.get(key, value) != value:  # Earlier versions recorded fewer keys.
            raise _different(
                path,
                key,
                earlier.device.get(key),
                value,
                "results of the same device are comparable",
            )
    return earlier


def _validate(path: Path, document: Mapping[str, Any]) -> EarlierResult:
    try:
        return EarlierResult.model_validate(document)
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"--baseline: {path} is not a result of trtq bench: {place}: {first['msg']}; {_WHAT}"
        ) from err


def _different(path: Path, key: str, then: Any, now: Any, only: str) -> UsageError:
    return UsageError(
        f"--baseline: {path} was measured with {key} {shown(then)}, this run has {now!r}; only {only}"
    )


def check_same_run(
    earlier: EarlierResult,
    path: Path,
    *,
    steps: int,
    guidance: float,
    model_class: str,
    shape: list[int],
) -> None:
    """Raise unless the earlier result has the same model, size and sampling as this run.

    Args:
        earlier: earlier result.
        path: file of the earlier result, used in messages.
        steps: number of denoising steps.
        guidance: classifier-free guidance scale.
        model_class: class of the denoiser.
        shape: shape of one denoiser sample, [C, H, W].

    Raises:
        UsageError: the model, the image size, the number of steps or the guidance differs.
    """
    now = {"model_class": model_class, "shape": shape, "steps": steps, "guidance": guidance}
    for key, value in now.items():
        then = getattr(earlier, key)
        if then != value:
            raise _different(
                path,
                key,
                then,
                value,
                "results of the same model, size and sampling are comparable",
            )


def compare(earlier: EarlierResult, result: Mapping[str, Any], name: str) -> HistoryComparison:
    """Compare every number of every row and batch size that both results contain.

    Args:
        earlier: earlier result.
        result: JSON result of this run.
        name: file name of the earlier result, shown in the output.
    """
    before = {row.label: row for row in earlier.rows}
    now = _validate(Path(name), result)
    after = {row.label: row for row in now.rows}
    rows: list[ComparedValue] = []
    different = []
    missing = _only_one_side(before, after)
    for label in [label for label in after if label in before]:
        old, new = before[label], after[label]
        unlike = [
            f"{key} {getattr(old, key)} then, {getattr(new, key)} now"
            for key in ("bits", "device")
            if getattr(old, key) != getattr(new, key)
        ]
        if not (old.measured and new.measured):
            missing.append(f"{label}: not measured {'now' if old.measured else 'then'}")
        elif unlike:
            different.append(f"{label}: {', '.join(unlike)}")
        else:
            missing += _only_one_side_batches(old, new)
            rows += _compare_rows(old, new)
    return HistoryComparison(
        file=name, date=earlier.date, rows=rows, missing=missing, different=different
    )


def _only_one_side(before: dict[str, _Row], after: dict[str, _Row]) -> list[str]:
    return [f"{label}: only now" for label in after if label not in before] + [
        f"{label}: only then" for label in before if label not in after
    ]


def _only_one_side_batches(old: _Row, new: _Row) -> list[str]:
    then, now = ({entry.batch for entry in row.batches} for row in (old, new))
    return [
        f"{new.label}, batch {batch}: only {'now' if batch in now else 'then'}"
        for batch in sorted(then ^ now)
    ]


def _compare_rows(old: _Row, new: _Row) -> Iterator[ComparedValue]:
    batches = {entry.batch: entry for entry in old.batches}
    for now in new.batches:
        then = batches.get(now.batch)
        if then is None:
            continue
        for part in [name for name in now.parts if name in then.parts]:
            medians = compare_medians(then.parts[part].turns, now.parts[part].turns)
            yield ComparedValue(row=new.label, batch=now.batch, what=part, unit="ms", **medians)
        medians = compare_medians(_rates(then), _rates(now), more_is_better=True)
        yield ComparedValue(
            row=new.label, batch=now.batch, what="whole images", unit="images/s", **medians
        )
    yield from _compare_amounts(new.label, old, new, _SINGLE)
    memories = (old.memory or _Memory(), new.memory or _Memory())
    yield from _compare_amounts(new.label, *memories, _MEMORY)


def _rates(entry: _Batch) -> list[float]:
    """Number of images per second in each round."""
    return [1e3 * entry.batch / milliseconds for milliseconds in entry.batch_of_images.turns]


_SINGLE = (
    ("load", "load_seconds", "s", 1.0),
    ("build", "build_seconds", "s", 1.0),
    ("denoiser's files", "denoiser_bytes", "MB", 1e-6),
)
_MEMORY = (
    ("weights", "weights_bytes", "MB", 1e-6),
    ("activations", "activations_bytes", "MB", 1e-6),
    ("peak memory", "peak_bytes", "MB", 1e-6),
    ("GPU memory", "gpu_bytes", "MB", 1e-6),
)


def _compare_amounts(
    label: str, old: BaseModel, new: BaseModel, entries: tuple[tuple[str, str, str, float], ...]
) -> Iterator[ComparedValue]:
    """Compare values that a run measures only once; of these, only file sizes are reproducible."""
    for what, key, unit, factor in entries:
        before, after = getattr(old, key), getattr(new, key)
        if before is None or after is None:
            continue
        verdict = "one value each"
        if before == after:
            verdict = "equal"
        elif key == "denoiser_bytes":
            verdict = "better" if after < before else "worse"
        yield ComparedValue(
            row=label,
            batch=None,
            what=what,
            unit=unit,
            before=factor * before,
            after=factor * after,
            ratio=before / after if before and after else None,
            verdict=verdict,
        )
