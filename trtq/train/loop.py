"""The training loop of all methods: accumulation, precision, learning-rate decay, checkpoints.

A method provides its parameter groups and the loss of one micro-batch (`Objective`). The loop runs
under accelerate with any number of processes. Random numbers depend only on (seed, stream, iteration),
so a run with two processes, a run with two micro-batches per update and a resumed run use the same
noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trtq.errors import NonFiniteError
from trtq.quant.hooks import output_hooks
from trtq.quant.part import QuantizedPart
from trtq.train.checkpoints import CheckpointState, Stateful, latest_checkpoint
from trtq.train.table_adam import TableAdamW, TableState

__all__ = ["FitResult", "Objective", "fit"]


class Objective(Stateful, Protocol):
    """A fine-tuning method; `state` and `load_state` save and restore its trajectories."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW with `params`, `lr` and other options; all other parameters are frozen."""

    def loss(self, student: Callable[..., Any], slot: int, iteration: int) -> Tensor:
        """Loss of micro-batch `slot` of an update, a scalar.

        Args:
            student: callable that computes the student's prediction.
            slot: index of the micro-batch in the update.
            iteration: index of the update.
        """

    def before_update(self, iteration: int) -> None:
        """Called before each update, e.g. to change what depends on the iteration."""

    def after_update(self) -> None:
        """Called after each update, e.g. to clamp parameters."""

    def finish(self) -> None:
        """Called after the last update, e.g. to remove what only training needs."""


@dataclass(frozen=True)
class FitResult:
    """Result of one run of the loop.

    Attributes:
        seconds: wall time of the loop in this process, including checkpoints, in seconds.
        loss_first: mean loss of the first tenth of this run's iterations.
        loss_last: mean loss of the last tenth of this run's iterations.
        iterations: number of updates in this run; after a resume, the remaining updates.
    """

    seconds: float
    loss_first: float
    loss_last: float
    iterations: int


@contextmanager
def _first_bad_layer(model: QuantizedPart) -> Iterator[list[str]]:
    """Collect the names of layers whose output is not finite, in the order of the calls."""
    bad: list[str] = []

    def check(name: str, _: tuple[Any, ...], output: Tensor) -> None:
        if not bool(torch.isfinite(output).all()):
            bad.append(name)

    with output_hooks(dict(model.layers()), check):
        yield bad


def _stop_on_bad_loss(
    model: QuantizedPart, objective: Objective, slot: int, iteration: int
) -> None:
    with _first_bad_layer(model) as bad, torch.no_grad():
        objective.loss(model, slot, iteration)
    where = f"; the first layer with such an output is {bad[0]!r}" if bad else ""
    raise NonFiniteError(
        f"the loss at iteration {iteration} is NaN or infinite{where}. Lower the learning rates of "
        "the recipe, or train with mixed_precision='no'"
    )


class _Optimisation:
    """Optimiser, learning rates and position of one run of the loop.

    Args:
        model: quantised denoiser; only the objective's parameters stay trainable.
        objective: the method.
        optimizer: optimiser of the objective's parameter groups.
        iterations: total number of updates.
        accumulate: number of micro-batches per update and process.
        accelerator: an `accelerate.Accelerator`.
    """

    def __init__(
        self,
        model: QuantizedPart,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        iterations: int,
        accumulate: int,
        accelerator: Any,
    ) -> None:
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.iterations, self.accumulate = iterations, accumulate
        self.accelerator = accelerator
        self._first_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._student: Any = None
        self._stepper: Any = None

    def prepare(self) -> None:
        """Pass model and optimiser to accelerate; called after a checkpoint has been loaded."""
        self._student, self._stepper = self.accelerator.prepare(self.model, self.optimizer)

    def update(self, iteration: int) -> float:
        """Update the parameters once and return the mean loss of the micro-batches.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        for group, rate in zip(self.optimizer.param_groups, self._first_rates, strict=True):
            group["lr"] = rate * (1 - iteration / self.iterations)
        self.objective.before_update(iteration)
        total = sum(self._accumulate(slot, iteration) for slot in range(self.accumulate))
        self._stepper.step()
        self._stepper.zero_grad()
        self.objective.after_update()
        return total

    def _accumulate(self, slot: int, iteration: int) -> float:
        """Accumulate one micro-batch's gradients and return its share of the update's loss."""
        last = slot == self.accumulate - 1
        with _gradient_sync(self.accelerator, self._student, last), self.accelerator.autocast():
            loss = self.objective.loss(self._student, slot, iteration)
            value = float(loss.item())
            if not math.isfinite(value):
                _stop_on_bad_loss(self.model, self.objective, slot, iteration)
            self.accelerator.backward(loss / self.accumulate)
        return value / self.accumulate


def _trainable_optimizer(
    model: QuantizedPart,
    groups: list[dict[str, Any]],
    weight_decay: float,
    table_state: TableState,
) -> torch.optim.Optimizer:
    """Create the optimiser of the groups, and freeze all other parameters."""
    model.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    if table_state == "dense":
        return torch.optim.AdamW(groups, weight_decay=weight_decay)
    return TableAdamW(groups, weight_decay, table_state)


def fit(
    model: QuantizedPart,
    objective: Objective,
    *,
    iterations: int,
    accumulate: int,
    weight_decay: float,
    accelerator: Any,
    checkpoints: Path | None,
    checkpoint_every: int,
    fingerprint: str,
    resume: bool = False,
    keep_last: bool = False,
    table_state: TableState = "dense",
    progress: Callable[[int, int], None] | None = None,
) -> FitResult:
    """Minimise the objective with AdamW and learning rates that decay linearly to zero.

    Args:
        model: quantised denoiser or a block of it; its trainable parameters are changed in place.
        objective: the method.
        iterations: total number of updates.
        accumulate: number of micro-batches per update and process.
        weight_decay: weight decay of AdamW.
        accelerator: an `accelerate.Accelerator`.
        checkpoints: folder of the checkpoints; None: no checkpoints.
        checkpoint_every: number of iterations between two checkpoints.
        fingerprint: hash of model and recipe; a checkpoint with another fingerprint is refused.
        resume: whether to continue from the newest checkpoint, if there is one.
        keep_last: whether to write a checkpoint at the end, too, for a stage that is not the last.
        table_state: optimiser state of the entries of timestep tables, see `TableState`.
        progress: callback with the completed and the total number of iterations.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the message names the layer.
        ArtefactError: the checkpoint cannot be used.
    """
    # The groups are created before a checkpoint is loaded: learning rates depend on calibrated scales.
    optimizer = _trainable_optimizer(model, objective.parameter_groups(), weight_decay, table_state)
    run = _Optimisation(model, objective, optimizer, iterations, accumulate, accelerator)
    state = CheckpointState(model, optimizer, objective, accelerator, fingerprint)
    checkpoint = latest_checkpoint(checkpoints) if resume and checkpoints else None
    first = 0 if checkpoint is None else state.load(checkpoint)
    run.prepare()
    losses: list[float] = []
    start = time.monotonic()
    for done in range(first + 1, iterations + 1):
        losses.append(run.update(done - 1))
        if progress is not None:
            progress(done, iterations)
        due = keep_last if done == iterations else done % checkpoint_every == 0
        if checkpoints is not None and due:
            state.save(checkpoints, done)
    accelerator.wait_for_everyone()
    objective.finish()
    return _result(losses, time.monotonic() - start)


def _result(losses: list[float], seconds: float) -> FitResult:
    tenth = max(1, len(losses) // 10)
    return FitResult(
        seconds=seconds,
        loss_first=sum(losses[:tenth]) / tenth if losses else 0.0,
        loss_last=sum(losses[-tenth:]) / tenth if losses else 0.0,
        iterations=len(losses),
    )


@contextmanager
def _gradient_sync(accelerator: Any, student: Any, synchronise: bool) -> Iterator[None]:
    """Exchange gradients between processes only with the last micro-batch of an update."""
    if synchronise or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(student):
            yield
