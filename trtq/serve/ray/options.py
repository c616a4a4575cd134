"""The options of a server on Ray Serve, and the `key=value` arguments of `serve run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model

from trtq.errors import UsageError
from trtq.serve.http.access import allowed_hosts, allowed_origins
from trtq.serve.options import Limits, ServeOptions, parse_batch_sizes, read_api_key

__all__ = ["RayOptions", "parse_arguments"]


@dataclass(frozen=True, kw_only=True)
class RayOptions(ServeOptions):
    """The options of a server on Ray Serve. Each replica is a server with these options.

    `threads` is also the number of processors that Ray reserves for a replica, 1 if it is None. The
    models must have the same paths on every machine. `host`, `port` and `drain_s` apply to
    `trtq serve --ray` only.

    Attributes:
        min_replicas: minimum number of replicas.
        max_replicas: maximum number of replicas.
        images_per_replica: number of images in progress per replica above which another replica starts;
            None: the images of a full batch.
        upscale_delay_s: time that demand must exceed the replicas before a replica starts, in seconds.
        downscale_delay_s: time that demand must stay below the replicas before a replica stops, in
            seconds.
        look_back_s: time over which the number of images in progress is averaged, in seconds.
    """

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 2
    images_per_replica: Annotated[float, Field(gt=0)] | None = None
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120.0
    look_back_s: Annotated[float, Field(gt=0)] = 20.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise UsageError(
                f"min_replicas={self.min_replicas} and max_replicas={self.max_replicas} are no range; "
                "the first must be 1 or more and not exceed the second"
            )


_LISTS = {"allowed_hosts": allowed_hosts, "allowed_origins": allowed_origins}
_NO_ARGUMENTS = ("host", "port", "drain_s", "api_key", "limits", *_LISTS)
"""Fields that are not arguments of `serve run`, or that have another form there."""
_FORMER_NAMES = {"target": "images_per_replica"}
"""Former names of arguments, accepted for one release."""


def parse_arguments(arguments: Mapping[str, Any]) -> RayOptions:
    """The options that the `key=value` arguments of `serve run` describe.

    Args:
        arguments: fields of `RayOptions` and `Limits`, and `api_key_file`; lists are comma-separated.

    Raises:
        UsageError: an argument is unknown or out of range.
    """
    arguments = {_FORMER_NAMES.get(name, name): value for name, value in arguments.items()}
    config = ConfigDict(extra="forbid")
    types = _argument_types()
    try:
        values = dict(create_model("Arguments", __config__=config, **types)(**arguments))
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{name!r}: {first['msg'].lower()}; the arguments are {', '.join(types)}"
        ) from err
    key = read_api_key(values.pop("api_key_file"))
    for name, parse in _LISTS.items():
        values[name] = parse(text for text in values[name].split(",") if text.strip())
    limits = {field.name: values.pop(field.name) for field in fields(Limits)}
    if limits["batch_sizes"] is not None:
        limits["batch_sizes"] = parse_batch_sizes(limits["batch_sizes"], limits["batch"])
    return RayOptions(**values, api_key=key, limits=Limits(**limits))


def _argument_types() -> dict[str, Any]:
    """Type and default of each argument: fields of the options and of their limits."""
    types: dict[str, Any] = {}
    for cls in (RayOptions, Limits):
        hints = get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            if field.name not in _NO_ARGUMENTS:
                types[field.name] = (
                    hints[field.name],
                    ... if field.name == "path" else field.default,
                )
    types |= {"batch_sizes": (str | None, None), "api_key_file": (Path | None, None)}
    return types | dict.fromkeys(_LISTS, (str, ""))
