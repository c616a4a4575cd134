"""The user's call of a pipeline: its arguments, where they come from, and what calibration varies."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trtq.calls.arguments import check_type, nearest_text
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.checkpoint.wording import one_line
from trtq.errors import ArtefactError, TrtqError, UsageError
from trtq.seeds import seeded_generator

__all__ = [
    "COUNT_ARGUMENTS",
    "STEPS_ARGUMENT",
    "UserCall",
    "accepted_arguments",
    "check_names",
    "default_call",
    "run_call",
]

STEPS_ARGUMENT = "num_inference_steps"
COUNT_ARGUMENTS = (
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_waveforms_per_prompt",
    "batch_size",
)
"""Arguments of diffusers' pipelines that multiply the batch."""
_FROM_TRTQ = ("generator",)
"""Arguments that trtq passes by itself."""
_FROM_PIPELINES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ImportError,
)
"""Exceptions of diffusers' pipelines for arguments or components that do not fit."""


def accepted_arguments(pipeline: Any) -> dict[str, inspect.Parameter]:
    """The parameters of the call of a pipeline, or of a pipeline's class, by name."""
    cls: Any = pipeline if isinstance(pipeline, type) else type(pipeline)
    parameters = inspect.signature(cls.__call__).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind not in kinds
    }


def check_names(pipeline: Any, names: Iterable[str]) -> None:
    """Raise unless a pipeline's call has arguments of these names.

    Raises:
        UsageError: an argument does not exist, or comes from trtq.
    """
    accepted = [key for key in accepted_arguments(pipeline) if key not in _FROM_TRTQ]
    for name in names:
        if name in _FROM_TRTQ:
            raise UsageError(f"the argument {name!r} comes from trtq; leave it out")
        if name not in accepted:
            raise UsageError(
                f"{type(pipeline).__name__} has no argument {name!r}{nearest_text(name, accepted)}; its "
                f"arguments are {', '.join(accepted)}"
            )


@dataclass(frozen=True)
class UserCall:
    """Arguments of a pipeline's call, without the random generator.

    Attributes:
        arguments: arguments by name, as the pipeline takes them.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int | None:
        """Number of denoising steps; None: the pipeline's default."""
        steps = self.arguments.get(STEPS_ARGUMENT)
        return int(steps) if isinstance(steps, int) and not isinstance(steps, bool) else None

    @property
    def prompts(self) -> int | None:
        """Number of prompts; None if the call has no text prompt."""
        prompt = self.arguments.get("prompt")
        if isinstance(prompt, str):
            return 1
        texts = isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
        return len(prompt) if texts and prompt else None

    @property
    def labels(self) -> list[int] | None:
        """Class labels of the call; None if it has none."""
        labels = self.arguments.get("class_labels")
        given = labels if isinstance(labels, list) else [labels]
        whole = [label for label in given if isinstance(label, int) and not isinstance(label, bool)]
        return whole if given and len(whole) == len(given) else None

    @property
    def images(self) -> int:
        """Number of images that the call makes, as far as its arguments say; 1 or more."""
        count = self.prompts or len(self.labels or [0])
        for name in COUNT_ARGUMENTS:
            number = self.arguments.get(name)
            count *= number if isinstance(number, int) and number > 0 else 1
        return max(1, count)

    def check(self, pipeline: Any) -> None:
        """Raise unless the pipeline accepts every argument and gets every required one.

        Raises:
            UsageError: an argument is unknown, missing or of another type than the pipeline takes.
        """
        accepted = accepted_arguments(pipeline)
        name = type(pipeline).__name__
        check_names(pipeline, self.arguments)
        for argument, value in self.arguments.items():
            check_type(argument, value, accepted[argument])
        missing = [
            key
            for key, parameter in accepted.items()
            if parameter.default is inspect.Parameter.empty and key not in self.arguments
        ]
        if missing:
            raise UsageError(
                f"{name} requires {', '.join(missing)}; give a file with --input "
                f"{missing[0]}=FILE, or the arguments of the call with --call FILE.toml"
            )

    def with_prompts(self, texts: Sequence[str]) -> UserCall:
        """The same call with other prompts.

        Args:
            texts: prompts, as many as the call has; a call with one text takes the first.
        """
        single = isinstance(self.arguments["prompt"], str)
        return self.updated({"prompt": texts[0] if single else list(texts)})

    def with_labels(self, labels: Sequence[int]) -> UserCall:
        """The same call with other class labels.

        Args:
            labels: labels; a call with one label outside a list keeps this form for one label.
        """
        single = len(labels) == 1 and not isinstance(self.arguments["class_labels"], list)
        return self.updated({"class_labels": labels[0] if single else list(labels)})

    def updated(self, arguments: Mapping[str, Any]) -> UserCall:
        """The same call with other values for some arguments."""
        return replace(self, arguments={**self.arguments, **arguments})


def default_call(pipeline: Any, prompts: Sequence[str], offered: Mapping[str, Any]) -> UserCall:
    """A call for a pipeline whose user gives none.

    Args:
        pipeline: diffusers pipeline.
        prompts: prompts to choose from; the first is used.
        offered: further arguments, which are passed if the pipeline accepts them and their value is
            not None.

    Raises:
        UsageError: the pipeline requires an argument that trtq cannot choose, e.g. an image.
    """
    accepted = accepted_arguments(pipeline)
    arguments = {
        name: value for name, value in offered.items() if name in accepted and value is not None
    }
    texts = any(name in arguments for name in ("prompt", "prompt_embeds"))
    if "prompt" in accepted and not texts and prompts:
        arguments["prompt"] = prompts[0]
    call = UserCall(arguments)
    call.check(pipeline)
    return call


def run_call(pipeline: Any, call: UserCall, seed: int, *purpose: str | int) -> Any:
    """Call a pipeline, and return its result.

    The same seed and purpose give the same random numbers, also to pipelines without an argument
    `generator`.

    Args:
        pipeline: diffusers pipeline.
        call: arguments of the call.
        seed: seed of the random numbers.
        purpose: use of the random numbers, see `trtq.seeds.seeded_generator`.

    Raises:
        ArtefactError: the pipeline raises an error.
    """
    arguments = dict(call.arguments)
    generator = seeded_generator(seed, *purpose)
    if "generator" in accepted_arguments(pipeline):
        arguments["generator"] = generator
    try:
        with quiet_diffusers(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(generator.initial_seed())
            return pipeline(**arguments)
    except TrtqError:
        raise
    except _FROM_PIPELINES as err:
        raise ArtefactError(
            f"{type(pipeline).__name__} cannot be called with "
            f"{', '.join(call.arguments) or 'no arguments'}: {type(err).__name__}: {one_line(err)}"
        ) from err
