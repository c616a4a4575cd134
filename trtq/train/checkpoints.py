"""Checkpoints of a fine-tuning run, written atomically and bound to the run that wrote them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtq.errors import ArtefactError

__all__ = ["CheckpointState", "Stateful", "latest_checkpoint"]


class Stateful(Protocol):
    """An object whose tensors belong in a checkpoint."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of `state`."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    # A folder without this file is the remainder of an interrupted write or removal.
    complete = sorted(path.parent for path in folder.glob("iteration-*/checkpoint.json"))
    return complete[-1] if complete else None


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True, eq=False)
class CheckpointState:
    """Everything that a checkpoint saves and restores.

    Attributes:
        model: quantised denoiser; its trainable parameters are saved.
        optimizer: optimiser of these parameters.
        objective: the method, with its trajectories.
        accelerator: an `accelerate.Accelerator`.
        fingerprint: hash of model and recipe.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Stateful
    accelerator: Any
    fingerprint: str

    @property
    def _process_file(self) -> str:
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        return f"process-{index}-of-{count}.safetensors"

    def save(self, folder: Path, iteration: int) -> None:
        """Write `folder/iteration-N` atomically, then remove older checkpoints.

        Args:
            folder: folder of the checkpoints.
            iteration: number of completed iterations.
        """
        accelerator = self.accelerator
        final = folder / f"iteration-{iteration:07d}"
        partial = folder / f".{final.name}.partial"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        state = {name: tensor.contiguous() for name, tensor in self.objective.state().items()}
        save_file(state, partial / self._process_file)
        if accelerator.is_main_process:
            save_file(self._tensors(), partial / "model.safetensors")
            record = {"iteration": iteration, "fingerprint": self.fingerprint}
            (partial / "checkpoint.json").write_text(json.dumps(record), encoding="utf-8")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            older = [path for path in folder.glob("iteration-*") if path != final]
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for path in older:
                shutil.rmtree(path)
        accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            f"parameter.{name}": parameter.detach().clone()
            for name, parameter in _trainable(self.model).items()
        }
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value).clone()
        return tensors

    def load(self, checkpoint: Path) -> int:
        """Restore everything and return the number of completed iterations.

        Raises:
            ArtefactError: the checkpoint is damaged, or belongs to another model, recipe or number of
                processes.
        """
        try:
            record = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
            if record["fingerprint"] != self.fingerprint:
                raise ArtefactError(
                    f"{checkpoint} was made with another model or recipe; resume with the same ones, or "
                    "start again with --overwrite"
                )
            if not (checkpoint / self._process_file).is_file():
                raise ArtefactError(
                    f"{checkpoint} was not written by {self.accelerator.num_processes} processes; "
                    "resume with the number that wrote it"
                )
            tensors = load_file(checkpoint / "model.safetensors")
            self.objective.load_state(load_file(checkpoint / self._process_file))
            self._restore(tensors)
            return int(record["iteration"])
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as err:
            raise ArtefactError(
                f"the checkpoint {checkpoint} is damaged ({err}); delete it and start again"
            ) from err

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in _trainable(self.model).items():
                parameter.copy_(tensors[f"parameter.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
