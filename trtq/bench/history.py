"""A former result, and what has become better or worse since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from trtq.bench.result import ComparedValue, HistoryComparison
from trtq.bench.summary import compare_medians
from trtq.documents import parse_json, read_text, shown
from trtq.errors import ArtefactError, UsageError
from trtq.limits import MAX_BATCH, MAX_STEPS

__all__ = ["FORMAT_VERSION", "Former", "check_same_run", "compare", "read_former"]

FORMAT_VERSION = 2
"""Of the result of `trtq.bench.run.benchmark`."""

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


class Former(BaseModel):
    """What is compared of a result: see `trtq.bench.run.benchmark`."""

    device: dict[str, Any]
    date: str | None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    guidance: Annotated[float, Field(allow_inf_nan=False)]
    model_class: str
    shape: list[int]
    rows: list[_Row]


def read_former(path: Path, device: dict[str, Any]) -> Former:
    """A result to compare with.

    Raises:
        UsageError: it is none, or of another device.
    """
    try:
        # Numbers that are not finite are refused with their place.
        found = parse_json(read_text(path), finite=False)
    except ArtefactError as err:
        raise UsageError(f"--against: {err}; {_WHAT}") from err
    except ValueError as err:
        raise UsageError(f"--against: cannot read {path}: {err}; {_WHAT}") from err
    if not isinstance(found, dict) or not {"format_version", "rows", "device"} <= set(found):
        raise UsageError(f"--against: {path} is no result of trtq bench; {_WHAT}")
    if found["format_version"] != FORMAT_VERSION:
        raise UsageError(
            f"--against: {path} has format version {shown(found['format_version'])}, this trtq reads "
            f"{FORMAT_VERSION}; measure again"
        )
    former = _validate(path, found)
    for key, value in device.items():
        if former.device.get(key, value) != value:  # Earlier versions wrote less about it.
            raise _different(path, key, former.device.get(key), value, "the same device compares")
    return former


def _validate(path: Path, found: dict[str, Any]) -> Former:
    try:
        return Former.model_validate(found)
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"--against: {path} is no result of trtq bench: {place}: {first['msg']}; {_WHAT}"
        ) from err


def _different(path: Path, key: str, then: Any, now: Any, only: str) -> UsageError:
    return UsageError(
        f"--against: {path} was measured with {key} {shown(then)}, here it is {now!r}; only {only}"
    )


def check_same_run(
    former: Former, path: Path, *, steps: int, guidance: float, model_class: str, shape: list[int]
) -> None:
    """Nothing, if what is about to be measured is what was measured.

    Raises:
        UsageError: another model or size, or another number of steps or guidance.
    """
    now = {"model_class": model_class, "shape": shape, "steps": steps, "guidance": guidance}
    for key, value in now.items():
        then = getattr(former, key)
        if then != value:
            raise _different(path, key, then, value, "the same model, size and sampling compare")


def compare(former: Former, result: dict[str, Any], name: str) -> HistoryComparison:
    """Compare every number of every row and batch size that both results have.

    Args:
        former: the earlier result.
        result: JSON of this result.
        name: path of the earlier result.
    """
    before = {row.label: row for row in former.rows}
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
        file=name, date=former.date, rows=rows, missing=missing, different=different
    )


def _only_one_side(before: dict[str, _Row], after: dict[str, _Row]) -> list[str]:
    return [f"{label}: only now" for label in after if label not in before] + [
        f"{label}: only then" for label in before if label not in after
    ]


def _only_one_side_batches(old: _Row, new: _Row) -> list[str]:
    then, now = ({one.batch for one in row.batches} for row in (old, new))
    return [
        f"{new.label}, batch {batch}: only {'now' if batch in now else 'then'}"
        for batch in sorted(then ^ now)
    ]


def _compare_rows(old: _Row, new: _Row) -> Iterator[ComparedValue]:
    batches = {one.batch: one for one in old.batches}
    for now in new.batches:
        then = batches.get(now.batch)
        if then is None:
            continue
        for part in [name for name in now.parts if name in then.parts]:
            medians = compare_medians(then.parts[part].turns, now.parts[part].turns)
            yield ComparedValue(row=new.label, batch=now.batch, what=part, unit="ms", **medians)
        rates = (
            [1e3 * now.batch / milliseconds for milliseconds in one.batch_of_images.turns]
            for one in (then, now)
        )
        medians = compare_medians(*rates, more_is_better=True)
        yield ComparedValue(
            row=new.label, batch=now.batch, what="whole images", unit="images/s", **medians
        )
    yield from _compare_amounts(new.label, old, new, _SINGLE)
    memories = (old.memory or _Memory(), new.memory or _Memory())
    yield from _compare_amounts(new.label, *memories, _MEMORY)


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
    """What there is one value of in a run; only the size of files is the same each time."""
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
