"""One model of a server that is batched by denoising step: its batcher and its bounded queue."""

from __future__ import annotations

from collections.abc import Sequence

from trtq.serve.batcher import Batcher
from trtq.serve.generation import CodecThread, StepGeneration
from trtq.serve.metrics import Metrics
from trtq.serve.model_queue import ModelQueue
from trtq.serve.models.base import GenerationRequest, ImageModel
from trtq.serve.options import Batching, Limits
from trtq.serve.requests import DrawOptions

__all__ = ["ServedModel"]


class ServedModel(ModelQueue):
    """A model with its batcher and a bounded number of images in progress.

    Args:
        model: the model, loaded and warmed up.
        limits: limits of the server.
        batching: batching strategy, see `Batcher`.
        metrics: metrics of the server.
        sizes: batch sizes that the model is ready for; None: any size.
        more_sizes: whether further sizes will follow, see `Batcher.add_size`.
        load_seconds: time that loading the model took, in seconds.
    """

    def __init__(
        self,
        model: ImageModel,
        limits: Limits,
        batching: Batching,
        metrics: Metrics,
        *,
        sizes: Sequence[int] | None = None,
        more_sizes: bool = False,
        load_seconds: float = 0.0,
    ) -> None:
        super().__init__(
            model.info,
            limits,
            metrics,
            load_seconds=load_seconds,
            waiting=lambda: self.batcher.waiting,
            max_rows=limits.batch,
        )
        self.model = model
        self.batcher = Batcher(
            model,
            max_rows=limits.batch,
            sizes=sizes,
            more_sizes=more_sizes,
            batching=batching,
            observer=self.metrics,
        )

    @property
    def alive(self) -> bool:
        """See `ModelQueue`."""
        return self.batcher.alive

    @property
    def died(self) -> bool:
        """See `ModelQueue`."""
        return self.batcher.died

    def generation(
        self, request: GenerationRequest, options: DrawOptions, codec: CodecThread
    ) -> StepGeneration:
        """See `ModelQueue`."""
        return StepGeneration(self, self.model, self.batcher, request, options, codec)

    def refuse(self, error: Exception) -> None:
        """See `ModelQueue`; a call in progress runs to its end."""
        self.batcher.refuse(error)

    def close(self, error: Exception, seconds: float | None = None) -> bool:
        """See `ModelQueue`."""
        return self.batcher.close(error, seconds)
