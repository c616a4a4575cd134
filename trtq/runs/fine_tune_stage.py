"""One stage of a fine-tuning over the shared loop, and what all kinds of stages share."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtq.calib.policy import Policy
from trtq.calib.recipe import Quest as QuestRecipe
from trtq.calib.recipe import Recipe, Training
from trtq.calib.roles import LayerRoles
from trtq.errors import QuantizationError
from trtq.progress import ProgressCallback
from trtq.quant import QuantizedDenoiser
from trtq.runs.result import FineTuneStage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trtq.train.distill import Distillation
    from trtq.train.points import Points

__all__ = ["FineTuning", "TunedLayers", "learn_rounding_of", "run_stage", "tuned_layers"]


@dataclass(frozen=True)
class FineTuning:
    """The state that the stages of a fine-tuning share.

    Attributes:
        model: the quantised denoiser; changed in place.
        trajectories: function that opens the training points of a stage; its argument separates the
            random numbers of different stages.
        policy: policy with the sets of layers that QuEST tunes.
        accelerator: accelerator of this process.
        checkpoints: folder of the checkpoints; each stage has a folder in it.
        fingerprint: hash of model and recipe; checkpoints with another hash are not resumed.
        resume: continue from the newest checkpoint.
        progress: callback that receives the stage's name, the work done and the total.
        roles: observed roles of the layers, for the policy's sets; None: not observed.
        label: text before the names of the stages, e.g. the denoiser's name.
        keep_last: whether to keep a checkpoint of the last stage, since another denoiser follows.
    """

    model: QuantizedDenoiser
    trajectories: Callable[[str], AbstractContextManager[Points[Any]]]
    policy: Policy
    accelerator: Accelerator
    checkpoints: Path
    fingerprint: str
    resume: bool
    progress: ProgressCallback
    roles: LayerRoles | None = None
    label: str = ""
    keep_last: bool = False


def run_stage(
    setup: FineTuning,
    training: Training,
    objective: Distillation,
    name: str,
    iterations: int,
    *,
    last: bool,
) -> FineTuneStage:
    """Minimise an objective, and return the measurements.

    Args:
        setup: the shared state.
        training: the recipe's training.
        objective: the method.
        name: name of the stage.
        iterations: number of updates.
        last: whether no other stage of this denoiser follows.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
        ArtefactError: the checkpoint cannot be used.
    """
    from trtq.train.loop import fit

    name = f"{setup.label}{name}"
    result = fit(
        objective.model,
        objective,
        iterations=iterations,
        accumulate=training.accumulate,
        weight_decay=training.weight_decay,
        accelerator=setup.accelerator,
        checkpoints=setup.checkpoints / name,
        checkpoint_every=training.checkpoint_every,
        fingerprint=setup.fingerprint,
        resume=setup.resume,
        keep_last=setup.keep_last or not last,
        table_state=training.table_state,
        progress=lambda done, total: setup.progress(name, done, total),
    )
    return FineTuneStage(
        name=name,
        seconds=round(result.seconds, 2),
        iterations=result.iterations,
        loss_first=result.loss_first,
        loss_last=result.loss_last,
    )


@dataclass(frozen=True)
class TunedLayers:
    """The layers that QuEST trains or compares.

    Attributes:
        embedding: paths of the time-embedding layers, whose weights are trained.
        attention: paths of the attention-related layers.
        weights: paths of the attention-related layers whose weights are trained; none if every layer has
            adapters.
    """

    embedding: list[str]
    attention: list[str]
    weights: list[str]

    def share(self, setup: FineTuning) -> float:
        """Share of the denoiser's weights and biases whose float values are trained."""
        return _tuned_share(setup, [*self.embedding, *self.weights])


def tuned_layers(setup: FineTuning, training: Training, quest: QuestRecipe) -> TunedLayers:
    """Choose the layers by the policy's sets, and make their weights trainable.

    Args:
        setup: the shared state.
        training: the recipe's training.
        quest: the recipe's section.

    Raises:
        RecipeError: the policy does not define a set of layers that the recipe names.
        QuantizationError: a set contains no quantised layer.
    """
    layers = dict(setup.model.layers())
    sets = []
    for name in (quest.embedding, quest.attention):
        sets.append(setup.policy.select(name, layers, setup.roles))
        if not sets[-1]:
            raise QuantizationError(
                f"the policy's set {name!r} for {setup.policy.family} names no quantised layer"
            )
    embedding, attention = sets
    # If every layer has adapters, the attention-related layers need no trained weights.
    tuned = TunedLayers(embedding, attention, [] if training.rank > 0 else attention)
    for name in [*tuned.embedding, *tuned.weights]:
        layers[name].tune()
    setup.model.to(setup.accelerator.device)
    return tuned


def _tuned_share(setup: FineTuning, tuned: list[str]) -> float:
    """Share of the denoiser's weights and biases that belong to these layers."""
    layers = dict(setup.model.layers())
    count = sum(
        p.numel() for n in tuned for p in (layers[n].weight, layers[n].bias) if p is not None
    )
    total = sum(
        p.numel() for n, p in setup.model.named_parameters() if n.endswith((".weight", ".bias"))
    )
    return count / total


def learn_rounding_of(setup: FineTuning, recipe: Recipe, iterations: int) -> FineTuneStage:
    """Learn the rounding directions of the layers with weights below 8 bits.

    Args:
        setup: the shared state.
        recipe: the recipe.
        iterations: number of updates per layer.
    """
    from trtq.train.rounding import learn_rounding

    # The directions are not in the checkpoints: a resumed run learns the same directions again.
    start = time.monotonic()
    names = [name for name, layer in setup.model.layers() if layer.weight_bits < 8]
    stage = f"{setup.label}learn rounding"
    with setup.trajectories("rounding") as points:
        measured = learn_rounding(
            setup.model,
            points,
            names,
            iterations=iterations,
            seed=recipe.seed,
            progress=lambda done, total: setup.progress(stage, done, total),
        )
    seconds = round(time.monotonic() - start, 2)
    share = measured["rounded_up_share_changed"]
    return FineTuneStage(name=stage, seconds=seconds, rounded_up_share_changed=share)
