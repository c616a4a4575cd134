"""The fine-tuning of a recipe, as one or several stages over the shared loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from trtq.calib.recipe import Quest as QuestRecipe
from trtq.calib.recipe import Recipe, Training
from trtq.errors import RecipeError
from trtq.quant.branch import start_adapters
from trtq.results import OMITTED_IF_NONE, Result
from trtq.runs.fine_tune_blocks import fine_tune_blocks, recipe_after_blocks
from trtq.runs.fine_tune_stage import (
    FineTuning,
    TunedLayers,
    learn_rounding_of,
    run_stage,
    tuned_layers,
)
from trtq.runs.rates import branch_of, rates_of, warn_of_large_updates
from trtq.runs.result import FineTuneStage

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FineTuneResult", "accelerator_for", "fine_tune"]

logger = logging.getLogger(__name__)


def accelerator_for(recipe: Recipe) -> Accelerator:
    """The accelerator of this process, on a GPU if there is one.

    Raises:
        RecipeError: the recipe's precision needs a GPU, or its fine-tuning one process.
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
    accelerator = Accelerator(cpu=not gpu, mixed_precision=precision)
    if recipe.blockwise is not None and accelerator.num_processes > 1:
        raise RecipeError(
            f"block-wise fine-tuning runs in one process, and accelerate started "
            f"{accelerator.num_processes}; call trtq without accelerate launch, or leave --blockwise out"
        )
    return accelerator


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
        QuantizationError: a set contains no quantised layer, or the model has no blocks.
        NonFiniteError: a loss is NaN or infinite.
    """
    training, quest = recipe.training, recipe.quest
    assert training is not None
    whole = recipe if recipe.blockwise is None else recipe_after_blocks(recipe)
    if whole is not None:
        _save_memory(setup, training)
    if training.adapter_start == "residual":
        for _, layer in setup.model.layers():
            start_adapters(layer)
    tuned = None if quest is None else tuned_layers(setup, training, quest)
    rows = []
    if quest is not None and quest.adaround:
        rows.append(learn_rounding_of(setup, recipe, quest.adaround))
    if recipe.blockwise is not None:
        rows += fine_tune_blocks(setup, recipe, tuned)
    if whole is not None and whole.training is not None:
        rows += _fine_tune_whole(setup, whole.training, whole.quest, tuned)
    return FineTuneResult(
        fine_tune_seconds=round(sum(row.seconds for row in rows), 2),
        fine_tune_iterations=sum(row.iterations or 0 for row in rows),
        stages=rows,
        tuned_share=None if tuned is None else tuned.share(setup),
    )


def _fine_tune_whole(
    setup: FineTuning,
    training: Training,
    quest: QuestRecipe | None,
    tuned: TunedLayers | None,
) -> list[FineTuneStage]:
    """Train all layers against the denoiser's prediction; one entry per stage."""
    if quest is not None and tuned is not None:
        return _quest(setup, training, quest, tuned)
    from trtq.train.efficientdm import EfficientDM

    rates = rates_of(training, training.iterations, 1.0)
    warn_of_large_updates(training, training.iterations, setup.label)
    with setup.trajectories("efficientdm") as points:
        branch = branch_of(training, training.iterations)
        objective = EfficientDM(setup.model, points, rates, branch)
        return [run_stage(setup, training, objective, "fine-tune", training.iterations, last=True)]


def _quest(
    setup: FineTuning, training: Training, quest: QuestRecipe, tuned: TunedLayers
) -> list[FineTuneStage]:
    """Tune the time embedding, then the attention-related layers; one entry per stage."""
    from trtq.train.quest import Quest

    adapters = training.rank > 0
    first = max(1, min(training.iterations - 1, round(quest.first_stage * training.iterations)))
    warn_of_large_updates(training, training.iterations - first, setup.label)
    embedding_paths = {f"{name}.activation" for name in tuned.embedding}
    stages = (
        ("time embedding", first, tuned.embedding, tuned.embedding, embedding_paths, False),
        (
            "attention",
            training.iterations - first,
            tuned.weights,
            _aligned(setup, quest, tuned.attention),
            {path for path, _ in setup.model.activations()} - embedding_paths,
            adapters,
        ),
    )
    rows = []
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
            rows.append(run_stage(setup, training, objective, name, iterations, last=last))
    return rows


def _aligned(setup: FineTuning, quest: QuestRecipe, attention: list[str]) -> list[str]:
    """The layers whose outputs are compared in stage 2."""
    if quest.aligned == "stage":
        return attention
    return [name for name, layer in setup.model.layers() if layer.lora_A is not None]
