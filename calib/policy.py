"""Policies: rules for the bits of a denoiser's layers, one TOML file per family in `policies`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from trtq.artefact.records import Text
from trtq.calib.formats import fitted
from trtq.calib.roles import LayerRoles
from trtq.calib.toml_files import explain, read_toml
from trtq.documents import shown
from trtq.errors import RecipeError
from trtq.precision import Precision, ScaleChoice, ScalePolicy, parse_precision
from trtq.quant.plan import LayerPlan, layer_kind, layer_obstacle, quantizable_layers

__all__ = ["Policy", "load_policy", "plan_layers"]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "policies"
GENERIC = "generic"
RECIPE = "recipe"
PROBABILITIES = "probabilities"
FIRST, LAST, EMBEDDING = "{first}", "{last}", "{embedding}"
"""Patterns for the roles of layers, see `calib.roles`."""
NOT_CALLED = "never called"
WEIGHT_ONLY = "weight_only"
_MAX_PATTERN = 1024


def _pattern(value: str) -> str:
    try:
        fnmatchcase("", value)
    except re.error as err:
        raise ValueError(f"{shown(value)} is not a shell pattern: {err}") from err
    return value


_Pattern = Annotated[str, Field(strict=True, max_length=_MAX_PATTERN), AfterValidator(_pattern)]


class Rule(BaseModel):
    """One rule of a policy; `policies/UNet2DModel.toml` documents the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[_Pattern]
    bits: str
    reason: Text
    adapters: bool = True
    scales: ScalePolicy | None = None
    smooth: bool = True
    rotate: Literal[0, 16, 64, 256] | None = None
    weight_only: str | None = None

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, value: str) -> str:
        if value == "target":  # The former name, accepted for one release.
            return RECIPE
        if value not in (RECIPE, "float", PROBABILITIES):
            parse_precision(value)
        return value

    @field_validator("weight_only")
    @classmethod
    def _known_weight_only(cls, value: str | None) -> str | None:
        if value is not None and parse_precision(value).format != WEIGHT_ONLY:
            raise RecipeError(f"weight_only={shown(value)} must be w4a16 or w8a16")
        return value


class Policy(BaseModel):
    """The rules for one family of denoisers.

    Attributes:
        family: name of the diffusers class.
        rule: rules in order of precedence; the first matching rule applies.
        tune: named sets of layers that a method may tune, as shell patterns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    rule: list[Rule]
    tune: dict[str, list[_Pattern]] = {}

    def select(
        self, name: str, layers: Iterable[str], roles: LayerRoles | None = None
    ) -> list[str]:
        """The layers in a named set.

        Args:
            name: name of the set.
            layers: paths of the layers to choose from.
            roles: observed roles, for `{first}`, `{last}` and `{embedding}`; None: these match no layer.

        Raises:
            RecipeError: the policy has no set of this name.
        """
        if name not in self.tune:
            known = ", ".join(sorted(self.tune)) or "none"
            raise RecipeError(f"the policy for {self.family} has no set {name!r}, it has {known}")
        special = {} if roles is None else _special(roles)
        return [layer for layer in layers if _matches(layer, self.tune[name], special)]


def load_policy(family: str, path: Path | None = None) -> Policy:
    """The policy of a family, or the generic policy with a warning.

    Args:
        family: name of the diffusers class.
        path: policy file of the user; None: the policy that ships with trtq.

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
    denoiser: nn.Module,
    policy: Policy,
    bits: str,
    probability_bits: int | None = 8,
    roles: LayerRoles | None = None,
    fallback: Policy | None = None,
    *,
    scales: ScaleChoice = "step",
    group: int | None = None,
) -> list[LayerPlan]:
    """Plans of all linear layers, convolutions and products of decomposed attention, in module order.

    Args:
        denoiser: float model.
        policy: rules for the model's family.
        bits: precision for rules with `bits = "recipe"`: `w4a4`, `w4a16`, `fp8`, `nvfp4`, ...
        probability_bits: bits of attention probabilities; None: their product stays in float.
        roles: observed roles, see `calib.roles`. Layers that were not called stay in float. None:
            `{first}` and `{last}` are the first and the last layer in module order, and `{embedding}`
            matches no layer.
        fallback: rules for layers that the policy does not name; None: these layers stay in float.
        scales: origin of the activations' scales, where a rule gives no other; with `auto`, linear
            layers and products without such a rule have `free_scales`.
        group: see `trtq.quant.formats.fitting_group`.

    Raises:
        RecipeError: the bits are not supported.
    """
    layers = quantizable_layers(denoiser)
    names = list(layers)
    recipe = parse_precision(bits)
    special: dict[str, frozenset[str]] = {}
    if roles is not None:
        special = _special(roles)
    elif names:
        special = {FIRST: frozenset(names[:1]), LAST: frozenset(names[-1:])}
    plans = []
    for name, module in layers.items():
        kind = layer_kind(module)
        assert kind is not None
        rule = _matching_rule(policy, name, special)
        if rule is None and fallback is not None:
            rule = _matching_rule(fallback, name, special)
        obstacle = layer_obstacle(module)
        if roles is not None and name in roles.not_called:
            obstacle = NOT_CALLED
        if obstacle is not None:
            plans.append(LayerPlan(name, kind, None, None, obstacle, adapters=False))
        elif rule is None:
            reason = f"not named by the policy for {policy.family}"
            plans.append(LayerPlan(name, kind, None, None, reason, adapters=False))
        elif kind == "product":
            plan = _product_plan(name, rule, recipe, probability_bits)
            scaled = _scales_of(plan, rule, scales)
            free = scales == "auto" and rule.scales is None and _may_have_rows(plan)
            plans.append(replace(plan, scales=scaled, free_scales=free, may_smooth=rule.smooth))
        else:
            plan = _layer_plan(name, module, rule, recipe, group)
            scaled = _scales_of(plan, rule, scales)
            plans.append(
                replace(
                    plan,
                    scales=scaled,
                    free_scales=scales == "auto" and rule.scales is None and _may_have_rows(plan),
                    may_smooth=rule.smooth,
                    may_rotate=rule.rotate,
                )
            )
    _warn_about(policy, plans)
    return plans


def _special(roles: LayerRoles) -> dict[str, frozenset[str]]:
    """The layers that each pattern for a role matches."""
    return {
        FIRST: frozenset([] if roles.first is None else [roles.first]),
        LAST: frozenset([] if roles.last is None else [roles.last]),
        EMBEDDING: roles.embeddings,
    }


def _matches(layer: str, patterns: Iterable[str], special: Mapping[str, frozenset[str]]) -> bool:
    """Whether a pattern matches a layer; `special` gives the layers of whole patterns."""
    return any(
        layer in special[pattern] if pattern in special else fnmatchcase(layer, pattern)
        for pattern in patterns
    )


def _matching_rule(
    policy: Policy, layer: str, special: Mapping[str, frozenset[str]]
) -> Rule | None:
    """The first rule with a pattern that matches a layer; `special` as in `_matches`."""
    return next((rule for rule in policy.rule if _matches(layer, rule.layers, special)), None)


def _layer_plan(
    name: str, module: nn.Module, rule: Rule, recipe: Precision, group: int | None
) -> LayerPlan:
    """The plan of a layer with a weight."""
    kind = layer_kind(module)
    assert kind is not None
    if rule.bits == "float":
        return LayerPlan(name, kind, None, None, rule.reason, rule.adapters)
    precision = recipe if rule.bits == RECIPE else parse_precision(rule.bits)
    plan = LayerPlan(
        name,
        kind,
        precision.weight_bits,
        precision.activation_bits,
        rule.reason,
        rule.adapters,
        format=precision.format,
    )
    return fitted(plan, module, rule.bits == RECIPE, recipe, rule.weight_only, group)


def _scales_of(plan: LayerPlan, rule: Rule, scales: ScaleChoice) -> ScalePolicy:
    """The origin of a layer's activation scales; only integers have others than one per step."""
    if not plan.operands or plan.format != "int":
        return "step"
    return rule.scales or ("step" if scales == "auto" else scales)


def _may_have_rows(plan: LayerPlan) -> bool:
    """Whether calibration can compare scales per row with scales per step for a layer."""
    return plan.kind in ("linear", "product") and bool(plan.operands) and plan.format == "int"


def _product_plan(
    name: str, rule: Rule, recipe: Precision, probability_bits: int | None
) -> LayerPlan:
    """The plan of a product of two activations, which is an integer product or stays in float."""
    precision = recipe if rule.bits in (RECIPE, PROBABILITIES) else None
    if rule.bits not in ("float", RECIPE, PROBABILITIES):
        precision = parse_precision(rule.bits)
    left: int | None = None
    right: int | None = None
    if precision is not None and precision.format == "int":
        left = right = precision.activation_bits
        if rule.bits == PROBABILITIES:
            left, right = probability_bits, None if probability_bits is None else right
    return LayerPlan(name, "product", None, left, rule.reason, False, right)


def _warn_about(policy: Policy, plans: Sequence[LayerPlan]) -> None:
    """Log layers without a rule, and the outcome of the generic policy."""
    unnamed = [plan.name for plan in plans if not plan.quantized and "not named" in plan.reason]
    if unnamed:
        logger.warning("left in float, since no rule names them: %s", ", ".join(unnamed))
    if policy.family == GENERIC:
        counts = Counter(plan.precision for plan in plans)
        logger.warning(
            "the generic policy makes %s",
            ", ".join(f"{count} layers {precision}" for precision, count in sorted(counts.items())),
        )
