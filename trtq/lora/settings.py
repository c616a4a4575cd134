"""Strength of a LoRA's layers according to PEFT's configuration.

PEFT writes `adapter_config.json` into the adapter's folder; diffusers writes the same settings into the
file's metadata, as `<component>.<setting>`. An update is `lora_alpha / r` times `lora_B @ lora_A`, with
rank-stabilised LoRA `lora_alpha / sqrt(r)` (arXiv:2312.03732). `rank_pattern` and `alpha_pattern`
override the rank and alpha of some layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtq.errors import ArtefactError

__all__ = ["Settings", "parse_json", "read_settings"]

# PEFT's default.
_ALPHA = 8

# Settings that do not affect merging.
_NEUTRAL = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
    "velora_config",
}
# Initialisations that do not change the base model; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# subtract the first update from its weights.
_INITIALISATIONS = {"true", "false", "gaussian", "eva", "orthogonal", "none"}
_MAX_PATTERN = 200


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one component.

    Attributes:
        where: source of the settings, for messages.
        rank: `r`; None if the settings have no rank.
        alpha: `lora_alpha`.
        rank_stabilised: `use_rslora`.
        ranks: `rank_pattern`: ranks by regular expressions for the end of a layer's path.
        alphas: `alpha_pattern`: alphas by regular expressions.
        dora: `use_dora`; None if the settings have no such key.
    """

    where: str
    rank: int | None = None
    alpha: float = _ALPHA
    rank_stabilised: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dora: bool | None = None

    def factor(self, paths: Sequence[str], rank: int, dora: bool) -> float:
        """`alpha / r` of a layer.

        Args:
            paths: names of the layer, beginning with the path in the model.
            rank: rank of the layer's matrices.
            dora: whether the file has DoRA's magnitude for the layer.

        Raises:
            ArtefactError: settings and file differ in the rank or in the use of DoRA.
        """
        if self.dora is not None and self.dora != dora:
            has = "a" if dora else "no"
            raise ArtefactError(
                f"{self.where} has use_dora {str(self.dora).lower()}, but the file has {has} magnitude "
                f"(lora_magnitude_vector) for {paths[0]!r}; the two files do not belong together"
            )
        expected = _matching(self.ranks, paths)
        if expected is None:
            expected = self.rank
        if expected is not None and expected != rank:
            raise ArtefactError(
                f"{self.where} gives {paths[0]!r} rank {expected}, but its matrices have rank {rank}; "
                "the two files do not belong together"
            )
        alpha = _matching(self.alphas, paths)
        return strength(self.alpha if alpha is None else alpha, rank, self.rank_stabilised)


def strength(alpha: float, rank: int, rank_stabilised: bool = False) -> float:
    """`alpha / r`, or `alpha / sqrt(r)`.

    Args:
        alpha: alpha of the layer.
        rank: rank `r` of the layer.
        rank_stabilised: whether to divide by `sqrt(r)`.
    """
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def _matching(pattern: Mapping[str, Any], paths: Sequence[str]) -> Any:
    """The value of the first key that matches the end of a path, or None."""
    for path in paths:
        for key, value in pattern.items():
            if key == path or re.match(rf"(.*\.)?({key})$", path):
                return value
    return None


def _wrong(where: str, name: str, value: Any, allowed: str) -> ArtefactError:
    text = str(value) if len(str(value)) <= 40 else f"{str(value)[:37]}..."
    return ArtefactError(f"{where}: {name} is {text!r}; it must be {allowed}")


def _number(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise _wrong(where, name, _shown(value), "a finite number")
    return float(value)


def _shown(value: Any) -> Any:
    """A value in a form suitable for messages, without the digits of huge numbers."""
    return "a huge number" if isinstance(value, int) and value.bit_length() > 200 else value


def _count(where: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise _wrong(where, name, _shown(value), "a whole number of at least 1")
    return value


def _flag(where: str, name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _wrong(where, name, _shown(value), "true or false")


def _pattern(where: str, name: str, value: Any, read: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(where, name, _shown(value), "an object of layer names")
    for key in value:
        repeats = len(re.findall(r"[*+{]", key))
        if len(key) > _MAX_PATTERN or repeats > 2 or re.search(r"\)[*+{]", key):
            raise _wrong(
                where, f"a key of {name}", key, "a layer's name or a plain regular expression"
            )
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as err:
            raise _wrong(where, f"a key of {name}", key, f"a regular expression ({err})") from err
    return {key: read(where, f"{name}[{key!r}]", number) for key, number in value.items()}


def read_settings(values: Mapping[str, Any], where: str) -> Settings:
    """Validate PEFT's settings of one component.

    Args:
        values: settings in PEFT's form.
        where: source of the settings, for messages.

    Raises:
        ArtefactError: a value has the wrong type, or cannot be merged.
    """
    kind = values.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper().removeprefix("PEFTTYPE.") != "LORA":
        raise _wrong(where, "peft_type", kind, "LORA (with or without use_dora)")
    initialisation = str(values.get("init_lora_weights", True)).lower()
    if initialisation not in _INITIALISATIONS:
        raise ArtefactError(
            f"{where}: init_lora_weights is {initialisation[:40]!r}, which also changes the base "
            "model's weights; convert the adapter to a plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    bias = values.get("bias", "none")
    if bias not in ("none", None):
        raise _wrong(where, "bias", bias, "none, because trained biases of the model are not read")
    for name, value in values.items():
        if name not in _NEUTRAL and name != "bias" and value:
            raise ArtefactError(
                f"{where}: the setting {name} changes the adapter's effect and is not supported; merge "
                "the adapter with PEFT (merge_and_unload) and use the merged model"
            )
    rank = values.get("r")
    return Settings(
        where,
        None if rank is None else _count(where, "r", rank),
        _number(where, "lora_alpha", values.get("lora_alpha", _ALPHA)),
        _flag(where, "use_rslora", values.get("use_rslora")),
        _pattern(where, "rank_pattern", values.get("rank_pattern"), _count),
        _pattern(where, "alpha_pattern", values.get("alpha_pattern"), _number),
        _flag(where, "use_dora", values["use_dora"])
        if values.get("use_dora") is not None
        else None,
    )


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text.

    Args:
        text: JSON text.
        where: source of the text, for messages.

    Raises:
        ArtefactError: the text is not JSON, not an object, or nested too deeply.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as err:
        reason = "nested too deeply" if isinstance(err, RecursionError) else str(err)
        raise ArtefactError(f"{where} is not JSON ({reason})") from err
    if not isinstance(values, dict):
        raise ArtefactError(f"{where} holds {type(values).__name__}, not a JSON object of settings")
    return values
