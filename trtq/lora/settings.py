"""The strength of a LoRA's layers, as PEFT's configuration says it.

PEFT writes `adapter_config.json` beside an adapter; diffusers writes the same settings into the
file's metadata, as `<component>.<setting>`. An update is `lora_alpha / r` times `lora_B @ lora_A`,
with rank-stabilised LoRA `lora_alpha / sqrt(r)` (arXiv:2312.03732); `rank_pattern` and
`alpha_pattern` give some layers their own numbers.
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

# What may stand in a configuration without changing what is merged.
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
# Ways to start that leave the base model as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# take the first update out of its weights.
_STARTS = {"true", "false", "gaussian", "eva", "orthogonal", "none"}
_MAX_PATTERN = 200


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one component.

    Attributes:
        where: the file that says so, for messages.
        rank: `r`, or `None` where nothing is said.
        alpha: `lora_alpha`.
        rank_stabilised: `use_rslora`.
        ranks: `rank_pattern`: by the end of a layer's path, a regular expression.
        alphas: `alpha_pattern`.
        dora: `use_dora`, or `None` where nothing is said.
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
            paths: the names that the layer has, the model's own first.
            rank: of its matrices.
            dora: whether the file has DoRA's magnitude of it.

        Raises:
            ArtefactError: the configuration gives it another rank, or does not agree about DoRA.
        """
        if self.dora is not None and self.dora != dora:
            has = "a" if dora else "no"
            raise ArtefactError(
                f"{self.where} says use_dora {str(self.dora).lower()}, the file has {has} magnitude "
                f"(lora_magnitude_vector) of {paths[0]!r}; the two files do not belong together"
            )
        said = _matching(self.ranks, paths)
        if said is None:
            said = self.rank
        if said is not None and said != rank:
            raise ArtefactError(
                f"{self.where} gives {paths[0]!r} the rank {said}, its matrices have rank {rank}; the "
                "two files do not belong together"
            )
        alpha = _matching(self.alphas, paths)
        return strength(self.alpha if alpha is None else alpha, rank, self.rank_stabilised)


def strength(alpha: float, rank: int, rank_stabilised: bool = False) -> float:
    """`alpha / r`, or `alpha / sqrt(r)`."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def _matching(pattern: Mapping[str, Any], paths: Sequence[str]) -> Any:
    """The value of the first key that the end of a path matches, or `None`."""
    for path in paths:
        for key, value in pattern.items():
            if key == path or re.match(rf"(.*\.)?({key})$", path):
                return value
    return None


def _wrong(where: str, name: str, value: Any, allowed: str) -> ArtefactError:
    text = str(value) if len(str(value)) <= 40 else f"{str(value)[:37]}..."
    return ArtefactError(f"{where}: {name} is {text!r}; what is allowed is {allowed}")


def _number(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise _wrong(where, name, _shown(value), "a finite number")
    return float(value)


def _shown(value: Any) -> Any:
    """A number of any length, shown without writing all of it."""
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


def read_settings(found: Mapping[str, Any], where: str) -> Settings:
    """PEFT's settings of one component, checked.

    Args:
        found: as PEFT writes them.
        where: the file that they are from.

    Raises:
        ArtefactError: a value is of the wrong type, or asks for what cannot be merged.
    """
    kind = found.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper().removeprefix("PEFTTYPE.") != "LORA":
        raise _wrong(where, "peft_type", kind, "LORA (with or without use_dora)")
    start = str(found.get("init_lora_weights", True)).lower()
    if start not in _STARTS:
        raise ArtefactError(
            f"{where}: init_lora_weights is {start[:40]!r}, which also changes the base model's "
            "weights; convert the adapter to a plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    bias = found.get("bias", "none")
    if bias not in ("none", None):
        raise _wrong(where, "bias", bias, "none, since the model's own biases are not read")
    for name, value in found.items():
        if name not in _NEUTRAL and name != "bias" and value:
            raise ArtefactError(
                f"{where}: the setting {name} changes what the adapter does and is not understood here; "
                "merge it with PEFT (merge_and_unload) and give the merged model"
            )
    rank = found.get("r")
    return Settings(
        where,
        None if rank is None else _count(where, "r", rank),
        _number(where, "lora_alpha", found.get("lora_alpha", _ALPHA)),
        _flag(where, "use_rslora", found.get("use_rslora")),
        _pattern(where, "rank_pattern", found.get("rank_pattern"), _count),
        _pattern(where, "alpha_pattern", found.get("alpha_pattern"), _number),
        _flag(where, "use_dora", found["use_dora"]) if found.get("use_dora") is not None else None,
    )


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArtefactError: it is no JSON, not an object, or nested too deeply.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as err:
        reason = "nested too deeply" if isinstance(err, RecursionError) else str(err)
        raise ArtefactError(f"{where} is not JSON ({reason})") from err
    if not isinstance(found, dict):
        raise ArtefactError(f"{where} holds {type(found).__name__}, not a JSON object of settings")
    return found
