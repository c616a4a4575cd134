"""A recorded pipeline that a server draws with: one call of the pipeline per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trtq.artefact.opened import StoredArtefact
from trtq.calls.pipeline import RecordedPipeline
from trtq.calls.recorder import close_progress_bar
from trtq.calls.survey import repeating
from trtq.calls.user_call import UserCall, run_call
from trtq.checkpoint.components import denoisers_of
from trtq.errors import ArtefactError, NonFiniteError, UsageError
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.models.recorded_call import base_call, describe_recorded, request_call
from trtq.torch_settings import own_settings

__all__ = ["RecordedModel"]

_PURPOSE = "image"
_MODES = ("L", "RGB")


class RecordedModel:
    """A recorded pipeline with the call that requests change.

    The pipeline runs once, with one denoiser call per form, so that an artefact that cannot be served is
    refused before the first request.

    Args:
        source: the pipeline, as `trtq.pipelines.open.open_any` returns it.
        name: model name used in requests.
        provider: execution provider.
        artefact: the opened artefact.

    Attributes:
        info: description of the model.
        calls_per_step: number of denoiser calls per denoising step; not a whole number if, e.g., the
            pipeline skips the first steps.

    Raises:
        ArtefactError: the pipeline does not run.
        UsageError: the pipeline returns no images.
    """

    def __init__(
        self, source: RecordedPipeline, name: str, provider: str, artefact: StoredArtefact
    ) -> None:
        self._source = source
        self._modules = denoisers_of(source.pipeline)
        self._call = base_call(source)
        with own_settings(), repeating(self._modules):
            image = _first_image(source.pipeline, run_call(source.pipeline, self._call, 0, "warm"))
        size = image.height, image.width
        self.info: ModelInfo = describe_recorded(source, name, provider, artefact, size)
        calls = sum(part.recorded.calls for part in artefact.manifest.denoisers)
        self.calls_per_step = calls / self.info.steps

    def call_of(self, request: GenerationRequest) -> UserCall:
        """The call that a request makes.

        Raises:
            UsageError: the model does not accept the prompt, or the number of images.
        """
        return request_call(self._source, self._call, self.info, request)

    def draw(
        self,
        call: UserCall,
        seed: int,
        index: int,
        before: Callable[[int], None],
        after: Callable[[float], None],
    ) -> Any:
        """Draw one image, as `trtq generate` does.

        Calls wait for each other: pipelines without an argument `generator` draw from torch's generator,
        which all threads share.

        Args:
            call: arguments of the pipeline's call.
            seed: seed of the request.
            index: index of the image in its request.
            before: called with the number of completed denoiser calls before each of these; an exception
                ends the pipeline's call.
            after: called after each denoiser call with its duration, in seconds.

        Returns:
            A PIL image of mode `L` or `RGB`.

        Raises:
            UsageError: the pipeline refuses its arguments, or a graph does not support them.
            ArtefactError: the pipeline fails.
            NonFiniteError: a prediction holds NaN or infinity.
        """
        pipeline = self._source.pipeline
        calls = 0

        def count(seconds: float) -> None:
            nonlocal calls
            calls += 1
            after(seconds)

        try:
            with own_settings(), _watched(self._modules, lambda: before(calls), count):
                result = run_call(pipeline, call, seed, _PURPOSE, index)
        except ArtefactError as err:
            # Before the first denoiser call, a pipeline checks its arguments.
            if not calls and isinstance(err.__cause__, ValueError | TypeError):
                raise UsageError(str(err)) from err
            raise
        finally:
            close_progress_bar(pipeline)
        return _first_image(pipeline, result)


@contextmanager
def _watched(
    modules: Mapping[str, nn.Module], before: Callable[[], None], after: Callable[[float], None]
) -> Iterator[None]:
    """Inside the block, call `before()` and `after(seconds)` around each denoiser call."""
    begun = 0.0

    def pre_hook(*_: Any) -> None:
        nonlocal begun
        before()
        begun = time.monotonic()

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        prediction = output[0]
        if isinstance(prediction, Tensor) and not bool(torch.isfinite(prediction).all()):
            raise NonFiniteError(
                "the denoiser predicts NaN or infinity; choose other settings, or another artefact"
            )
        after(time.monotonic() - begun)

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(pre_hook).remove)
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _first_image(pipeline: Any, result: Any) -> Any:
    """The first image of a pipeline's result, of mode `L` or `RGB`.

    Raises:
        UsageError: the result holds no image.
    """
    from PIL import Image

    image = getattr(result, "images", result)
    while isinstance(image, list | tuple) and image:
        image = image[0]
    if not isinstance(image, Image.Image):
        fields = ", ".join(result) if isinstance(result, Mapping) else type(result).__name__
        raise UsageError(
            f"{type(pipeline).__name__} returns {fields}, and a server draws images; use trtq generate"
        )
    return image if image.mode in _MODES else image.convert("RGB")
