"""Which layers become low-bit: named module by module, per family, in TOML files beside this one."""

from __future__ import annotations

import logging
import re
import tomllib
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from trtq.errors import RecipeError
from trtq.quant.convert import LayerPlan, quantizable_layers
from trtq.quant.ranges import check_bits

__all__ = ["Policy", "load_policy", "parse_bits", "plan_layers"]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "policies"
_BITS = re.compile(r"w([0-9]+)a([0-9]+)")
GENERIC = "generic"


def parse_bits(text: str) -> tuple[int, int]:
    """`w4a8` -> (4, 8), the bits of weights and activations.

    Raises:
        RecipeError: not of that form, or bits that are not supported.
    """
    match = _BITS.fullmatch(text.lower())
    if match is None:
        raise RecipeError(f"bits={text!r} is not understood; write them like w4a4 or w8a8")
    return check_bits(int(match[1])), check_bits(int(match[2]))


class Rule(BaseModel):
    """One entry of a policy; see the TOML files for the meaning of the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[str]
    bits: str
    reason: str
    adapters: bool = True


class Policy(BaseModel):
    """The rules of one family of denoisers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    rule: list[Rule]


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        RecipeError: it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise RecipeError(f"cannot read the {what} {path}: {err}") from err


def explain(error: ValidationError) -> str:
    """Pydantic's complaints in one line each, as `place: what is wrong`."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{place}: {message} (got {problem['input']!r})")
    return "; ".join(lines)


def load_policy(family: str, path: Path | None = None) -> Policy:
    """The policy of a family, or the generic one with a warning, or the user's own file.

    Raises:
        RecipeError: the file is not a policy.
    """
    if path is None:
        path = _FOLDER / f"{family}.toml"
        if not path.is_file():
            logger.warning("no policy for %s: using the generic one", family)
            path = _FOLDER / f"{GENERIC}.toml"
    try:
        return Policy.model_validate(read_toml(path, "policy"))
    except ValidationError as err:
        raise RecipeError(f"{path} is not a policy: {explain(err)}") from err


def plan_layers(denoiser: nn.Module, policy: Policy, bits: str) -> list[LayerPlan]:
    """What becomes of every linear and convolution, in module order.

    Args:
        denoiser: the float model.
        policy: its rules.
        bits: what "target" means, e.g. `w4a4`.

    Raises:
        RecipeError: bits that are not supported.
    """
    layers = quantizable_layers(denoiser)
    names = list(layers)
    target = parse_bits(bits)
    special = {"{first}": names[0], "{last}": names[-1]} if names else {}
    plans = []
    for name, module in layers.items():
        rule = next(
            (
                rule
                for rule in policy.rule
                if any(fnmatchcase(name, special.get(pattern, pattern)) for pattern in rule.layers)
            ),
            None,
        )
        kind = "linear" if isinstance(module, nn.Linear) else "conv2d"
        widths: tuple[int | None, int | None] = (None, None)
        if rule is not None and rule.bits != "float":
            widths = target if rule.bits == "target" else parse_bits(rule.bits)
        reason = rule.reason if rule else f"not named by the policy for {policy.family}"
        adapters = rule.adapters if rule else False
        plans.append(LayerPlan(name, kind, *widths, reason, adapters))  # type: ignore[arg-type]
    unnamed = [plan.name for plan in plans if not plan.quantized and "not named" in plan.reason]
    if unnamed:
        logger.warning("left in float, since no rule names them: %s", ", ".join(unnamed))
    if policy.family == GENERIC:
        counts = Counter((plan.weight_bits, plan.activation_bits) for plan in plans)
        logger.warning(
            "the generic policy quantises %s",
            ", ".join(f"{count} layers to w{w}a{a}" for (w, a), count in sorted(counts.items())),
        )
    return plans
