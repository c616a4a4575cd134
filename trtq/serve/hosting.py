"""Open the models of a server and prepare them for drawing."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtq.artefact.opened import OnnxFolder, Opened, StoredArtefact, open_artefact
from trtq.artefact.recorded import refuse_recorded
from trtq.engine.openvino import MAX_SHAPES
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import ArtefactError, TrtqError, UsageError
from trtq.serve.batcher import batch_sizes
from trtq.serve.logs import FIELDS
from trtq.serve.memory import copy_mapped_files, mapped_files
from trtq.serve.metrics import Metrics
from trtq.serve.model_queue import ModelQueue
from trtq.serve.options import ServeOptions
from trtq.serve.served import ServedModel
from trtq.serve.service import Service

if TYPE_CHECKING:
    from trtq.serve.models.base import ImageModel
    from trtq.serve.models.recorded import RecordedModel

__all__ = ["build_service", "is_compiling", "open_model", "open_recorded"]

logger = logging.getLogger(__name__)
_COMPILE_THREAD = "compile-"
_LISTENING_S = 10.0
"""Maximum time from opening the models until the server listens, in seconds."""
_MAX_NAME = 100
TORCH = "torch"


def open_model(
    path: str | Path | Opened,
    name: str,
    *,
    provider: str | None = None,
    threads: int | None = None,
    shapes: int = MAX_SHAPES,
) -> ImageModel:
    """Open a model to serve, without torch and diffusers if possible.

    Args:
        path: an ONNX folder, a run or a checkpoint.
        name: model name used in requests.
        provider: execution provider; None: the default for this kind of path.
        threads: number of threads per operator; None: the number of cores.
        shapes: maximum number of batch sizes in use at once.

    Raises:
        TrtqError: see `trtq.pipelines.open.open_any`.
    """
    from trtq.serve.models.torch_free import TorchFreeModel

    # Hashing takes seconds per gigabyte, so the files are verified once, by the code that loads them.
    opened = open_artefact(path, verify=False)
    refuse_recorded(opened, "a server that batches by step", "use trtq serve")
    plain = provider not in (TORCH, *BACKENDS)
    if plain and isinstance(opened, OnnxFolder) and TorchFreeModel.serves(opened):
        return TorchFreeModel(
            opened.verified(), name, provider=provider or "cpu", threads=threads, shapes=shapes
        )
    from trtq.pipelines.open import open_any
    from trtq.serve.models.pipeline import PipelineModel

    source = open_any(opened, provider, threads)
    engine = getattr(source.denoiser, "engine", None)
    engine_provider = TORCH if engine is None else engine.provider
    return PipelineModel(source, name, engine_provider, shapes, opened)


def open_recorded(
    artefact: StoredArtefact, name: str, *, provider: str | None = None, threads: int | None = None
) -> RecordedModel:
    """Open a recorded artefact to serve; its pipeline is called once per image.

    Args:
        artefact: an opened run, ONNX folder or engine folder that was recorded.
        name: model name used in requests.
        provider: execution provider; None: the default for this kind of artefact.
        threads: number of threads per operator; None: the number of cores.

    Raises:
        TrtqError: see `trtq.pipelines.open.open_any` and `RecordedModel`.
    """
    from trtq.calls.pipeline import RecordedPipeline
    from trtq.pipelines.open import open_any
    from trtq.serve.models.recorded import RecordedModel

    source = open_any(artefact, provider, threads)
    assert isinstance(source, RecordedPipeline)
    engines = getattr(source.denoiser, "engines", None)
    return RecordedModel(source, name, engines[0].provider if engines else TORCH, artefact)


def build_service(
    options: ServeOptions, metrics: Metrics, ready: threading.Event | None = None
) -> Service:
    """Open all models, warm up the smallest batch size of each, and compile the others in a thread.

    Args:
        options: options of the server.
        metrics: metrics of the server.
        ready: event that is set when the server listens, after which the other sizes are compiled;
            None: compile them at once.

    Raises:
        TrtqError: a model cannot be opened or run.
    """
    served: dict[str, ModelQueue] = {}
    for name, path in _named_paths(options).items():
        host = _Host(path, name, options, metrics, ready, takes_provider=not served)
        served[name] = host.start()
    return Service(served, options.limits)


def _named_paths(options: ServeOptions) -> dict[str, str]:
    """The paths of the models by name, the default model first.

    Raises:
        UsageError: two models have the same name, or a name cannot be used in requests.
    """
    paths = {_folder_name(options.path) if options.name is None else options.name: options.path}
    if options.beside is not None:
        name = _folder_name(options.beside)
        if name in paths:
            raise UsageError(
                f"both models have the name {name!r}; give the first another name with --name"
            )
        paths[name] = options.beside
    for name in paths:
        if not name.isprintable() or "/" in name or not 0 < len(name) <= _MAX_NAME:
            raise UsageError(f"a model cannot be called {name!r}; choose another name with --name")
    return paths


def _folder_name(path: str) -> str:
    """The default name of a model: the name of its folder, resolved if the path is `.`."""
    return Path(os.path.realpath(path)).name


def is_compiling() -> bool:
    """Whether a batch size is being compiled, during which the process cannot exit cleanly."""
    return any(thread.name.startswith(_COMPILE_THREAD) for thread in threading.enumerate())


@dataclass
class _Host:
    """Opens one model and turns it into a `ModelQueue`.

    Attributes:
        path: an ONNX folder, a run or a checkpoint.
        name: model name used in requests.
        options: options of the server.
        metrics: metrics of the server.
        ready: event that is set when the server listens; None: compile without waiting.
        takes_provider: whether `options.provider` also applies if the path is not an ONNX folder.
    """

    path: str
    name: str
    options: ServeOptions
    metrics: Metrics
    ready: threading.Event | None
    takes_provider: bool

    def start(self) -> ModelQueue:
        """Open the model and run it once.

        Raises:
            UsageError: the model was built for smaller batches than the options require.
            ArtefactError: the model opens but does not run.
        """
        opened = open_artefact(self.path, verify=False)
        if isinstance(opened, StoredArtefact) and opened.manifest.recorded is not None:
            return self._start_recorded(opened)
        return self._start_batched(opened)

    def _start_recorded(self, opened: StoredArtefact) -> ModelQueue:
        from trtq.serve.served_pipeline import ServedPipeline

        begun = time.monotonic()
        mapped = mapped_files()
        model = open_recorded(
            opened, self.name, provider=self._provider(opened), threads=self.options.threads
        )
        copy_mapped_files(mapped)
        seconds = time.monotonic() - begun
        return ServedPipeline(model, self.options.limits, self.metrics, load_seconds=seconds)

    def _start_batched(self, opened: Opened) -> ModelQueue:
        """Open the model, run it once and start compiling its other batch sizes."""
        begun = time.monotonic()
        limits = self.options.limits
        sizes = limits.batch_sizes or batch_sizes(limits.batch)
        mapped = mapped_files()
        model = self._open(opened, len(sizes))
        # An image with guidance takes two rows, and a request with the default guidance must fit.
        rows = 2 if model.info.guidance != 1 else 1
        first = next(size for size in sizes if size >= rows)
        self._warm(model, first)
        copy_mapped_files(mapped)
        rest = [size for size in sizes if size != first] if model.fixed_shapes else []
        compiled = sizes if limits.batch_sizes else None
        served = ServedModel(
            model,
            limits,
            self.options.batching,
            self.metrics,
            sizes=[first] if model.fixed_shapes else compiled,
            more_sizes=bool(rest),
            load_seconds=time.monotonic() - begun,
        )
        if rest:
            threading.Thread(
                target=_compile_rest,
                args=(served, rest, self.ready, mapped),
                name=f"{_COMPILE_THREAD}{self.name}",
                daemon=True,
            ).start()
        return served

    def _provider(self, opened: Opened) -> str | None:
        takes_provider = self.takes_provider or isinstance(opened, OnnxFolder)
        return self.options.provider if takes_provider else None

    def _open(self, opened: Opened, shapes: int) -> ImageModel:
        options = self.options
        model = open_model(
            opened,
            self.name,
            provider=self._provider(opened),
            threads=options.threads,
            shapes=shapes,
        )
        batch = options.limits.batch
        if model.max_rows is not None and model.max_rows < batch:
            raise UsageError(
                f"{self.path} takes up to {model.max_rows} rows in a call, fewer than {batch}; give "
                f"--max-batch {max(model.max_rows, 2)}, or build it for more: trtq build --batch-range"
            )
        return model

    def _warm(self, model: ImageModel, rows: int) -> None:
        try:
            model.warm(rows)
        except TrtqError:
            raise
        except Exception as err:  # Exceptions of engines share no base class but Exception.
            raise ArtefactError(f"{self.path} opens but cannot be run: {err}") from err


def _compile_rest(
    served: ServedModel,
    sizes: Sequence[int],
    ready: threading.Event | None,
    mapped: set[str],
) -> None:
    """Compile further batch sizes, one by one, and let the batcher use them.

    Args:
        served: the model.
        sizes: batch sizes to compile.
        ready: event to wait for first; None: start at once.
        mapped: paths of files to skip, see `copy_mapped_files`.
    """
    if ready is not None:
        # Compiling uses all cores, which would delay the start of the server.
        ready.wait(_LISTENING_S)
    try:
        for size in sizes:
            served.model.warm(size)
            copy_mapped_files(mapped)
            served.batcher.add_size(size)
    except Exception:  # The sizes compiled so far can still be used.
        logger.exception("cannot compile", extra={FIELDS: {"batch": size}})
    else:
        fields = {"model": served.info.name, "batch_sizes": sizes}
        logger.info("compiled", extra={FIELDS: fields})
    finally:
        served.batcher.no_more_sizes()
