"""The typed and checked options of `trtq serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from pydantic import Field

from trtq.documents import read_text, shown
from trtq.errors import UsageError
from trtq.limits import parse_whole
from trtq.serve.http.access import Access

__all__ = [
    "Batching",
    "Limits",
    "ServeOptions",
    "parse_batch_sizes",
    "parse_batching",
    "read_api_key",
]

Batching = Literal["step", "request"]
"""`step`: images join and leave at any denoising step; `request`: a batch starts and ends together."""
_API_KEY_VARIABLE = "TRTQ_API_KEY"
_MAX_KEY_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a server. Their ranges are checked when the options are parsed.

    Attributes:
        batch: maximum number of rows per denoiser call.
        batch_sizes: allowed batch sizes of denoiser calls, in rows; None: any size, or powers of two if
            each size must be compiled.
        queue: maximum number of waiting images, in addition to the images in the batch.
        images: maximum number of images per request.
        steps: maximum number of denoising steps per image.
        body_bytes: maximum size of a request body, in bytes.
        deadline_s: maximum time from a request's arrival to its response, in seconds.
        body_s: maximum time for receiving a request body, in seconds.
        upload_bytes: maximum size of a request body with images, in bytes.
        upload_s: maximum time for receiving a request body with images, in seconds.
    """

    batch: Annotated[int, Field(ge=2)] = 8
    batch_sizes: tuple[int, ...] | None = None
    queue: Annotated[int, Field(ge=0)] = 64
    images: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int, Field(ge=1)] = 200
    body_bytes: Annotated[int, Field(ge=1)] = 64 << 10
    deadline_s: Annotated[float, Field(gt=0)] = 120.0
    body_s: Annotated[float, Field(gt=0)] = 10.0
    upload_bytes: Annotated[int, Field(ge=1)] = 32 << 20
    upload_s: Annotated[float, Field(gt=0)] = 60.0

    @property
    def max_images(self) -> int:
        """Maximum number of images per request that the server can ever accept."""
        return min(self.images, self.batch + self.queue)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `trtq serve`.

    Attributes:
        path: an ONNX folder, a run or a checkpoint.
        name: model name used in requests; None: the folder's name.
        beside: a second model to compare with, e.g. the float model.
        host: address to listen on.
        port: port to listen on; 0: any free port.
        provider: execution provider of ONNX folders.
        threads: number of threads per operator; None: the number of cores.
        batching: batching strategy, see `Batcher`.
        limits: limits on requests and batches.
        drain_s: maximum time from SIGTERM to the exit, for finishing accepted requests, in seconds.
        api_key: key that requests to `/v1` must send; None: no key.
        allowed_hosts: additional host names that the server answers to, see `Access`.
        allowed_origins: origins of other sites whose pages may use the server, see `Access`.
    """

    path: str
    name: str | None = None
    beside: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    provider: str | None = None
    threads: int | None = None
    batching: Batching = "step"
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()

    @property
    def access(self) -> Access:
        """The hosts and origins that the server answers to."""
        return Access(bound=self.host, hosts=self.allowed_hosts, origins=self.allowed_origins)


def read_api_key(path: Path | None) -> str | None:
    """Read the API key from a file, or else from TRTQ_API_KEY; None if neither is given.

    Raises:
        UsageError: the file cannot be read, or the key is empty or contains characters that a header
            cannot hold.
    """
    if path is not None:
        key = read_text(path, "the API key", error=UsageError, max_bytes=_MAX_KEY_BYTES).strip()
    elif _API_KEY_VARIABLE in os.environ:
        key = os.environ[_API_KEY_VARIABLE].strip()
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        where = _API_KEY_VARIABLE if path is None else path
        raise UsageError(
            f"the API key in {where} must be printable ASCII without spaces, and not empty"
        )
    return key


def parse_batching(text: str) -> Batching:
    """Return the batching strategy with this name.

    Raises:
        UsageError: the name is unknown.
    """
    if text not in get_args(Batching):
        raise UsageError(
            f"unknown batching {text!r}; choose one of {', '.join(get_args(Batching))}"
        )
    return cast(Batching, text)


def parse_batch_sizes(text: str, max_rows: int) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4).

    Args:
        text: comma-separated batch sizes.
        max_rows: maximum batch size.

    Raises:
        UsageError: the text is malformed, a size exceeds `max_rows`, or every size is too small for an
            image with guidance, which takes two rows.
    """
    try:
        sizes = tuple(sorted({parse_whole(part) for part in text.split(",")}))
    except ValueError:
        sizes = (0,)
    if sizes[0] < 1 or not 2 <= sizes[-1] <= max_rows:
        raise UsageError(
            f"the batch sizes {shown(text)} are not understood; write numbers from 1 to {max_rows} "
            "(--max-batch), the largest at least 2, e.g. 1,2,4,8"
        )
    return sizes
