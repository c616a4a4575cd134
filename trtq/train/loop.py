"""The fine-tuning loop that every method shares: accumulation, precision, decay, checkpoints.

A method brings its parameter groups and the loss of one micro-batch (`Objective`). The loop runs it
under accelerate on any number of processes. Randomness is drawn from (seed, stream, iteration), so a
run of two processes, a run with two accumulation steps and a run that was interrupted in between all
see the same noise.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtq.errors import ArtefactError, NonFiniteError
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.hooks import output_hooks
from trtq.train.table_adam import TableAdamW, TableState

__all__ = ["FitResult", "Objective", "fit", "latest_checkpoint"]

_LOSS_SMOOTHING = 0.05


class Objective(Protocol):
    """What a method brings to the loop."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW: `params`, `lr` and what else AdamW takes. All else is frozen."""

    def loss(self, student: Callable[..., Any], slot: int, iteration: int) -> Tensor:
        """The loss of accumulation step `slot`, a scalar."""

    def after_update(self) -> None:
        """Called after each optimiser step, e.g. to bring parameters back into range."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside parameters and optimiser."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""


@dataclass(frozen=True)
class FitResult:
    """What the loop did.

    Attributes:
        seconds: wall time of the loop in this process, checkpoints included.
        loss_first: mean loss of the first tenth of the iterations run here.
        loss_last: mean loss of the last tenth.
        iterations: optimiser steps run here (fewer than asked for after a resume).
    """

    seconds: float
    loss_first: float
    loss_last: float
    iterations: int


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    # One without this file was cut off while it was written or removed.
    found = sorted(path.parent for path in folder.glob("iteration-*/checkpoint.json"))
    return found[-1] if found else None


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _save_checkpoint(
    folder: Path,
    iteration: int,
    model: QuantizedDenoiser,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    accelerator: Any,
    fingerprint: str,
) -> None:
    """Write `folder/iteration-N`, complete or not at all; older checkpoints are then removed."""
    final = folder / f"iteration-{iteration:07d}"
    partial = folder / f".{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    rank = f"process-{accelerator.process_index}-of-{accelerator.num_processes}.safetensors"
    save_file({k: v.contiguous() for k, v in objective.state().items()}, partial / rank)
    if accelerator.is_main_process:
        tensors = {f"parameter.{k}": v.detach().clone() for k, v in _trainable(model).items()}
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value).clone()
        save_file(tensors, partial / "model.safetensors")
        (partial / "checkpoint.json").write_text(
            json.dumps({"iteration": iteration, "fingerprint": fingerprint})
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = [path for path in folder.glob("iteration-*") if path != final]
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for path in older:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def _load_checkpoint(
    checkpoint: Path,
    model: QuantizedDenoiser,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    accelerator: Any,
    fingerprint: str,
) -> int:
    """Restore everything; returns the number of iterations already done.

    Raises:
        ArtefactError: the checkpoint is damaged, or of another recipe or number of processes.
    """
    rank = f"process-{accelerator.process_index}-of-{accelerator.num_processes}.safetensors"
    try:
        record = json.loads((checkpoint / "checkpoint.json").read_text())
        if record["fingerprint"] != fingerprint:
            raise ArtefactError(
                f"{checkpoint} was made with another model or recipe; resume with the same ones, or "
                "start again with --overwrite"
            )
        if not (checkpoint / rank).is_file():
            raise ArtefactError(
                f"{checkpoint} was not written by {accelerator.num_processes} processes; resume with "
                "the number that wrote it"
            )
        tensors = load_file(checkpoint / "model.safetensors")
        objective.load_state(load_file(checkpoint / rank))
        with torch.no_grad():
            for name, parameter in _trainable(model).items():
                parameter.copy_(tensors[f"parameter.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return int(record["iteration"])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as err:
        raise ArtefactError(
            f"the checkpoint {checkpoint} is damaged ({err}); delete it and start again"
        ) from err


@contextmanager
def _first_bad_layer(model: QuantizedDenoiser) -> Iterator[list[str]]:
    """Collects the names of layers whose output is not finite, in the order they are called."""
    bad: list[str] = []

    def check(name: str, _: tuple[Any, ...], output: Tensor) -> None:
        if not bool(torch.isfinite(output).all()):
            bad.append(name)

    with output_hooks(dict(model.layers()), check):
        yield bad


def _stop_on_bad_loss(
    model: QuantizedDenoiser, objective: Objective, slot: int, iteration: int
) -> None:
    with _first_bad_layer(model) as bad, torch.no_grad():
        objective.loss(model, slot, iteration)
    where = f"; the first layer to give one is {bad[0]!r}" if bad else ""
    raise NonFiniteError(
        f"the loss at iteration {iteration} is NaN or infinite{where}. Lower the learning rates of "
        "the recipe, or train with mixed_precision='no'"
    )


def fit(
    model: QuantizedDenoiser,
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
    """Minimise the objective with AdamW and learning rates that fall linearly to zero.

    Args:
        model: the quantised denoiser; its trainable parameters are changed in place.
        objective: the method.
        iterations: optimiser steps in all.
        accumulate: micro-batches per optimiser step and process.
        weight_decay: AdamW's.
        accelerator: an `accelerate.Accelerator`.
        checkpoints: where to keep the newest checkpoint; None for none.
        checkpoint_every: iterations between two of them.
        fingerprint: of model and recipe; a checkpoint of another one is refused.
        resume: go on from the newest checkpoint, if there is one.
        keep_last: write a checkpoint at the end too, for a stage that others follow.
        table_state: how the optimiser treats the entries of timestep tables.
        progress: called with (iterations done, iterations in all).

    Raises:
        NonFiniteError: the loss is NaN or infinite; the message names the layer.
        ArtefactError: the checkpoint cannot be used.
    """
    # Asked for once, before a checkpoint is loaded: rates follow the calibrated scales.
    groups = objective.parameter_groups()
    model.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, weight_decay=weight_decay)
        if table_state == "dense"
        else TableAdamW(groups, weight_decay, table_state)
    )
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    first = 0
    checkpoint = latest_checkpoint(checkpoints) if resume and checkpoints else None
    if checkpoint is not None:
        first = _load_checkpoint(checkpoint, model, optimizer, objective, accelerator, fingerprint)
    student, stepper = accelerator.prepare(model, optimizer)
    losses: list[float] = []
    start = time.monotonic()
    for iteration in range(first, iterations):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - iteration / iterations)
        total = 0.0
        for slot in range(accumulate):
            synchronise = slot == accumulate - 1
            with _gradient_sync(accelerator, student, synchronise), accelerator.autocast():
                loss = objective.loss(student, slot, iteration)
                value = loss.item()
                if value != value or abs(value) == float("inf"):
                    _stop_on_bad_loss(model, objective, slot, iteration)
                accelerator.backward(loss / accumulate)
            total += value / accumulate
        stepper.step()
        stepper.zero_grad()
        objective.after_update()
        losses.append(total)
        done = iteration + 1
        if progress is not None:
            progress(done, iterations)
        due = keep_last if done == iterations else done % checkpoint_every == 0
        if checkpoints is not None and due:
            _save_checkpoint(
                checkpoints, done, model, optimizer, objective, accelerator, fingerprint
            )
    accelerator.wait_for_everyone()
    tenth = max(1, len(losses) // 10)
    return FitResult(
        seconds=time.monotonic() - start,
        loss_first=sum(losses[:tenth]) / tenth if losses else 0.0,
        loss_last=sum(losses[-tenth:]) / tenth if losses else 0.0,
        iterations=len(losses),
    )


@contextmanager
def _gradient_sync(accelerator: Any, student: Any, synchronise: bool) -> Iterator[None]:
    """Exchange gradients between processes only with the last micro-batch of a step."""
    if synchronise or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(student):
            yield
