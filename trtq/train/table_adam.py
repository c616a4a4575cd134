"""AdamW that treats every entry of a timestep table as a separate parameter.

A table `[T]` has non-zero gradients only at the steps that a batch visits. AdamW on the whole table
also moves unvisited entries, by their momentum, and corrects the bias of all moments by the number of
iterations. `TableAdamW` moves only visited entries and corrects each entry by the number of its visits.
QuEST's released code also resets an entry's moments whenever its timestep is visited again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["TableAdamW", "TableState"]

TableState = Literal["dense", "persistent", "reset"]
"""Optimiser state of a table's entries.

`dense`: AdamW on the whole table, as in EfficientDM. `persistent`: one state per entry. `reset`: one
state per entry, which is reset when the entry is visited again after a pause, as in QuEST's released
code.
"""


class TableAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101); groups with `table=True` are updated entry by entry.

    Args:
        groups: parameter groups with `params` and `lr`.
        weight_decay: decoupled weight decay.
        state: `persistent` or `reset`, see `TableState`.
        betas: decay factors of the first and second moment.
        eps: term added to the square root of the second moment.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        weight_decay: float = 0.01,
        state: TableState = "persistent",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults | {"table": False})
        self.table_state: TableState = state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters once; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        entries = group["table"]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros_like(parameter) if entries else torch.zeros(())
            if entries:
                state["visited"] = torch.zeros_like(parameter)
        visited = gradient != 0 if entries else torch.ones((), dtype=torch.bool)
        if entries:
            if self.table_state == "reset":
                again = visited & (state["visited"] == 0)
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    state[key].masked_fill_(again, 0)
            state["visited"].copy_(visited)
        first, second = group["betas"]
        state["step"].add_(visited)
        mean = torch.where(visited, state["exp_avg"].lerp(gradient, 1 - first), state["exp_avg"])
        square = state["exp_avg_sq"] * second + gradient.square() * (1 - second)
        square = torch.where(visited, square, state["exp_avg_sq"])
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        count = state["step"].clamp_min(1)
        deviation = (square / (1 - second**count)).sqrt() + group["eps"]
        update = mean / (1 - first**count) / deviation + group["weight_decay"] * parameter
        parameter.sub_(torch.where(visited, update, 0.0) * group["lr"])
