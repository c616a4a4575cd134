"""The block-wise fine-tuning of a recipe: one stage per block of the denoiser."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from trtq.calib.recipe import Recipe, Training
from trtq.runs.fine_tune_stage import FineTuning, TunedLayers, run_stage
from trtq.runs.rates import branch_of, rates_of, warn_of_large_updates
from trtq.runs.result import FineTuneStage

if TYPE_CHECKING:
    from trtq.train.block_points import BlockPoints
    from trtq.train.blocks import Block
    from trtq.train.distill import Distillation

__all__ = ["fine_tune_blocks", "recipe_after_blocks"]

logger = logging.getLogger(__name__)


def recipe_after_blocks(recipe: Recipe) -> Recipe | None:
    """The recipe of the whole model's updates after the last block; None: there are none.

    The learning rates are those of the blocks, so the way that a value can move is shorter.
    """
    training, blockwise = recipe.training, recipe.blockwise
    assert training is not None
    assert blockwise is not None
    iterations = blockwise.whole_iterations
    if not iterations:
        return None
    share = iterations / training.iterations
    changes = {
        "iterations": iterations,
        "lora_travel": training.lora_travel * share,
        "branch_rank": 0,
    }
    update: dict[str, object] = {"training": training.model_copy(update=changes)}
    if recipe.quest is not None:
        travel = recipe.quest.weight_travel * share
        update["quest"] = recipe.quest.model_copy(update={"weight_travel": travel})
    return recipe.model_copy(update=update)


def fine_tune_blocks(
    setup: FineTuning, recipe: Recipe, tuned: TunedLayers | None
) -> list[FineTuneStage]:
    """Train one block after the other against its float output; one entry per block.

    Args:
        setup: the shared state.
        recipe: recipe with a training and a block-wise section.
        tuned: layers whose weights QuEST trains; None: only adapters are trained, as in EfficientDM.

    Raises:
        QuantizationError: the denoiser has no blocks.
        NonFiniteError: a loss is NaN or infinite.
        ArtefactError: the checkpoint cannot be used.
    """
    from trtq.train.block_points import BlockPoints, KeptPoints
    from trtq.train.blocks import blocks_of

    training, blockwise = recipe.training, recipe.blockwise
    assert training is not None
    assert blockwise is not None
    warn_of_large_updates(training, training.iterations, setup.label)
    setup.model.requires_grad_(False)
    rows = []
    with setup.trajectories("blocks") as trajectories:
        kept = KeptPoints(
            setup.model,
            trajectories,
            count=blockwise.points,
            inputs=blockwise.inputs,
            seed=recipe.seed,
            folder=setup.checkpoints.parent / "block-inputs",
        )
        blocks = [
            block
            for block in blocks_of(setup.model, kept.called)
            if _has_parameters(block, adapters_only=tuned is None)
        ]
        _warn_of_other_layers(setup, blocks, adapters_only=tuned is None)
        for number, block in enumerate(blocks, 1):
            name = f"block {number} of {len(blocks)}, {block.place}"
            last = number == len(blocks) and not blockwise.whole_iterations
            with BlockPoints(kept, block) as points:
                objective = _objective(block, points, training, recipe, tuned)
                rows.append(
                    run_stage(setup, training, objective, name, training.iterations, last=last)
                )
            block.requires_grad_(False)
    return rows


def _objective(
    block: Block,
    points: BlockPoints,
    training: Training,
    recipe: Recipe,
    tuned: TunedLayers | None,
) -> Distillation:
    """The parameters of the recipe's method inside a block, and the error of the block's output."""
    branch = branch_of(training, training.iterations)
    if recipe.quest is None or tuned is None:
        from trtq.train.efficientdm import EfficientDM

        return EfficientDM(block, points, rates_of(training, training.iterations, 1.0), branch)
    from trtq.train.quest import Quest

    inside = {name for name, _ in block.layers()}
    return Quest(
        block,
        points,
        rates_of(training, training.iterations, recipe.quest.weight_travel),
        tuned=inside & {*tuned.embedding, *tuned.weights},
        aligned=(),
        activations={path for path, _ in block.activations()},
        adapters=training.rank > 0,
        branch=branch,
    )


def _has_parameters(block: Block, *, adapters_only: bool) -> bool:
    """Whether the method trains anything in a block; EfficientDM skips layers without adapters."""
    if not adapters_only:
        return True
    return any(layer.lora_A is not None for _, layer in block.layers()) or any(block.products())


def _warn_of_other_layers(setup: FineTuning, blocks: list[Block], *, adapters_only: bool) -> None:
    """Warn about layers with trainable parameters that no call reaches through a block."""
    inside = {name for block in blocks for name, _ in block.layers()}
    outside = [
        name
        for name, layer in setup.model.layers()
        if name not in inside and (layer.lora_A is not None or not adapters_only)
    ]
    if outside:
        logger.warning(
            "%s%d layers stay as calibrated, since no recorded call reaches them through a block: %s",
            setup.label,
            len(outside),
            ", ".join(outside[:3]) + (", ..." if len(outside) > 3 else ""),
        )
