"""The fine-tuning of a recipe, as one or several stages over the shared loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trtq.calib.policy import Policy
from trtq.calib.recipe import Quest as QuestRecipe
from trtq.calib.recipe import Recipe, Training
from trtq.calib.roles import LayerRoles
from trtq.errors import QuantizationError, RecipeError
from trtq.progress import ProgressCallback
from trtq.quant import QuantizedDenoiser
from trtq.quant.branch import start_adapters
from trtq.results import OMITTED_IF_NONE, Result
from trtq.runs.rates import branch_of, rates_of, warn_of_large_updates
from trtq.runs.result import FineTuneStage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trtq.train.distill import Distillation
    from trtq.train.points import Points

__all__ = ["FineTuneResult", "FineTuning", "accelerator_for", "fine_tune"]

logger = logging.getLogger(__name__)


def accelerator_for(recipe: Recipe) -> Accelerator:
    """The accelerator of this process, on a GPU if there is one.

    Raises:
        RecipeError: the recipe's precision needs a GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    precision = recipe.training.mixed_precision if recipe.training else "no"
    gpu = torch.cuda.is_available()
    if precision == "fp16" and not gpu:
        raise RecipeError(
            "training.mixed_precision='fp16' needs a GPU and there is none; use 'bf16' or 'no'"
        )
    # accelerate keeps its settings for the life of the process; a second call may need other settings.
    AcceleratorState._reset_state()
    return Accelerator(cpu=not gpu, mixed_precision=precision)


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


def _run(
    setup: FineTuning,
    training: Training,
    objective: Distillation,
    name: str,
    iterations: int,
    *,
    last: bool,
) -> FineTuneStage:
    from trtq.train.loop import fit

    name = f"{setup.label}{name}"
    result = fit(
        setup.model,
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


def _save_memory(setup: FineTuning, training: Training) -> None:
    """Turn on gradient checkpointing if the recipe requests it or the model is large.

    Raises:
        RecipeError: the recipe requests it, and the denoiser does not support it.
    """
    from trtq.train.recompute import recompute_blocks

    parameters = sum(p.numel() for p in setup.model.parameters())
    if not training.recomputes(parameters) or recompute_blocks(setup.model):
        return
    message = f"diffusers' {type(setup.model.denoiser).__name__} has no gradient checkpointing"
    if training.gradient_checkpointing:
        raise RecipeError(message + "; leave training.gradient_checkpointing out")
    logger.warning("%s: fine-tuning keeps all activations", message)


@dataclass(frozen=True, kw_only=True)
class FineTuneResult(Result):
    """Measurements of a fine-tuning; see `trtq.runs.result.RunResult` for the fields."""

    fine_tune_seconds: float
    fine_tune_iterations: int
    stages: list[FineTuneStage]
    tuned_share: float | None = field(default=None, metadata=OMITTED_IF_NONE)


def fine_tune(setup: FineTuning, recipe: Recipe) -> FineTuneResult:
    """Run all fine-tuning stages of a recipe, change the model in place, and return the measurements.

    Raises:
        RecipeError: the policy does not define a set of layers that the recipe names.
        QuantizationError: a set contains no quantised layer.
        NonFiniteError: a loss is NaN or infinite.
    """
    training = recipe.training
    assert training is not None
    _save_memory(setup, training)
    if training.adapter_start == "residual":
        for _, layer in setup.model.layers():
            start_adapters(layer)
    if recipe.quest is None:
        from trtq.train.efficientdm import EfficientDM

        rates = rates_of(training, training.iterations, 1.0)
        warn_of_large_updates(training, training.iterations, setup.label)
        with setup.trajectories("efficientdm") as points:
            branch = branch_of(training, training.iterations)
            objective = EfficientDM(setup.model, points, rates, branch)
            rows = [_run(setup, training, objective, "fine-tune", training.iterations, last=True)]
        tuned_share = None
    else:
        rows, tuned_share = _quest(setup, recipe, training, recipe.quest)
    return FineTuneResult(
        fine_tune_seconds=round(sum(row.seconds for row in rows), 2),
        fine_tune_iterations=sum(row.iterations or 0 for row in rows),
        stages=rows,
        tuned_share=tuned_share,
    )


def _quest(
    setup: FineTuning, recipe: Recipe, training: Training, quest: QuestRecipe
) -> tuple[list[FineTuneStage], float]:
    """Run learned rounding if requested, then tune the time embedding and the attention-related layers.

    Returns:
        One entry per stage, and the share of the denoiser's parameters whose float values are trained.
    """
    from trtq.train.quest import Quest

    layers = dict(setup.model.layers())
    sets = {}
    for name in (quest.embedding, quest.attention):
        sets[name] = setup.policy.select(name, layers, setup.roles)
        if not sets[name]:
            raise QuantizationError(
                f"the policy's set {name!r} for {setup.policy.family} names no quantised layer"
            )
    embedding, attention = sets[quest.embedding], sets[quest.attention]
    adapters = training.rank > 0
    # If every layer has adapters, the attention-related layers need no trained weights.
    tuned = embedding if adapters else [*embedding, *attention]
    for name in tuned:
        layers[name].tune()
    setup.model.to(setup.accelerator.device)
    rows = []
    if quest.adaround:
        rows.append(_learn_rounding(setup, recipe, quest.adaround))
    first = max(1, min(training.iterations - 1, round(quest.first_stage * training.iterations)))
    warn_of_large_updates(training, training.iterations - first, setup.label)
    embedding_paths = {f"{name}.activation" for name in embedding}
    stages = (
        ("time embedding", first, embedding, embedding, embedding_paths, False),
        (
            "attention",
            training.iterations - first,
            [] if adapters else attention,
            _aligned(setup, quest, attention),
            {path for path, _ in setup.model.activations()} - embedding_paths,
            adapters,
        ),
    )
    for index, (name, iterations, weights, aligned, activations, with_adapters) in enumerate(
        stages
    ):
        with setup.trajectories(name) as points:
            objective = Quest(
                setup.model,
                points,
                rates_of(training, iterations, quest.weight_travel),
                tuned=weights,
                aligned=aligned,
                activations=activations,
                adapters=with_adapters,
                weighting=quest.weighting,
                global_weight=quest.global_weight,
                branch=branch_of(training, iterations),
            )
            last = index == len(stages) - 1
            rows.append(_run(setup, training, objective, name, iterations, last=last))
    return rows, _tuned_share(setup, tuned)


def _aligned(setup: FineTuning, quest: QuestRecipe, attention: list[str]) -> list[str]:
    """The layers whose outputs are compared in stage 2."""
    if quest.aligned == "stage":
        return attention
    return [name for name, layer in setup.model.layers() if layer.lora_A is not None]


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


def _learn_rounding(setup: FineTuning, recipe: Recipe, iterations: int) -> FineTuneStage:
    import time

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
