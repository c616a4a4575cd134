"""Which layers become low-bit: named module by module, per family, in TOML files beside this one."""

from __future__ import annotations

import logging
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from trtq.artefact.records import Text
from trtq.documents import check_depth, read_text, shown
from trtq.errors import RecipeError
from trtq.quant.bits import parse_bits
from trtq.quant.plan import LayerPlan, layer_kind, quantizable_layers

__all__ = ["Policy", "load_policy", "plan_layers"]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "policies"

GENERIC = "generic"
PROBABILITIES = "probabilities"
_MAX_PATTERN = 1024
_MAX_PROBLEMS = 5
_MAX_BYTES = 256 << 10
_MAX_LEVELS = 16
_MANY_KEYS = re.compile(r"(?<![\w\"'-])(?:[\w\"'-]+[ \t]*\.[ \t]*){100}")
"""A dotted key so deep that the parser would take minutes for it."""


def _pattern(value: str) -> str:
    try:
        fnmatchcase("", value)
    except re.error as err:
        raise ValueError(f"{shown(value)} is no shell pattern: {err}") from err
    return value


_Pattern = Annotated[str, Field(strict=True, max_length=_MAX_PATTERN), AfterValidator(_pattern)]


class Rule(BaseModel):
    """One entry of a policy; see the TOML files for the meaning of the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[_Pattern]
    bits: str
    reason: Text
    adapters: bool = True

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, value: str) -> str:
        if value not in ("target", "float", PROBABILITIES):
            parse_bits(value)
        return value


class Policy(BaseModel):
    """The rules of one family of denoisers.

    Attributes:
        family: diffusers' class.
        rule: tried in order for every layer.
        tune: named sets of layers that a method may tune, as shell patterns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    rule: list[Rule]
    tune: dict[str, list[_Pattern]] = {}

    def select(self, name: str, layers: Iterable[str]) -> list[str]:
        """The layers in the set of this name.

        Raises:
            RecipeError: the policy has no such set.
        """
        if name not in self.tune:
            known = ", ".join(sorted(self.tune)) or "none"
            raise RecipeError(f"the policy for {self.family} has no set {name!r}, it has {known}")
        patterns = self.tune[name]
        return [layer for layer in layers if any(fnmatchcase(layer, p) for p in patterns)]


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        RecipeError: it cannot be read or is not TOML.
    """
    text = read_text(path, f"the {what}", error=RecipeError, max_bytes=_MAX_BYTES)
    try:
        if _MANY_KEYS.search(text):
            raise ValueError("a key has more than 100 parts")
        found = tomllib.loads(text)
        check_depth(found, _MAX_LEVELS)
    except RecursionError as err:
        raise RecipeError(f"cannot read the {what} {path}: it is nested too deep") from err
    except ValueError as err:
        # Of TOML, and of a number with more digits than Python reads.
        raise RecipeError(f"cannot read the {what} {path}: {err}") from err
    return found


def explain(error: ValidationError) -> str:
    """Pydantic's complaints, of the first few, each as `place: what is wrong`."""
    problems = error.errors()
    lines = []
    for problem in problems[:_MAX_PROBLEMS]:
        place = ".".join(shown(part).strip("'\"") for part in problem["loc"]) or "the file"
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{place}: {message} (got {shown(problem['input'])})")
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"and {len(problems) - _MAX_PROBLEMS} more")
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


def plan_layers(
    denoiser: nn.Module, policy: Policy, bits: str, probability_bits: int | None = 8
) -> list[LayerPlan]:
    """What becomes of every linear, convolution and spelled-out product, in module order.

    Args:
        denoiser: the float model.
        policy: its rules.
        bits: what "target" means, e.g. `w4a4`.
        probability_bits: of attention probabilities; None leaves their product in float.

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
        reason = rule.reason if rule else f"not named by the policy for {policy.family}"
        kind = layer_kind(module)
        assert kind is not None
        if kind == "product":
            left, right = _product_bits(rule.bits if rule else "float", target, probability_bits)
            plans.append(LayerPlan(name, kind, None, left, reason, False, right))
            continue
        widths: tuple[int | None, int | None] = (None, None)
        if rule is not None and rule.bits != "float":
            widths = target if rule.bits == "target" else parse_bits(rule.bits)
        adapters = rule.adapters if rule else False
        plans.append(LayerPlan(name, kind, *widths, reason, adapters))
    unnamed = [plan.name for plan in plans if not plan.quantized and "not named" in plan.reason]
    if unnamed:
        logger.warning("left in float, since no rule names them: %s", ", ".join(unnamed))
    if policy.family == GENERIC:
        counts = Counter(plan.precision for plan in plans)
        logger.warning(
            "the generic policy makes %s",
            ", ".join(f"{count} layers {precision}" for precision, count in sorted(counts.items())),
        )
    return plans


def _product_bits(
    rule: str, target: tuple[int, int], probability_bits: int | None
) -> tuple[int | None, int | None]:
    """Bits of both inputs of a product."""
    if rule == PROBABILITIES:
        return (None, None) if probability_bits is None else (probability_bits, target[1])
    if rule == "float":
        return None, None
    bits = target[1] if rule == "target" else parse_bits(rule)[1]
    return bits, bits
