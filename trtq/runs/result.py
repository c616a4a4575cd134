"""Results of `trtq.quantize`, of an exchange of LoRAs and of a dry run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trtq.results import OMITTED_IF_NONE, Result, json_key

__all__ = ["FineTuneStage", "PlanResult", "RunResult"]


@dataclass(frozen=True, kw_only=True)
class FineTuneStage(Result):
    """One stage of a fine-tuning.

    Attributes:
        name: name of the stage.
        seconds: duration of the stage, in seconds.
        iterations: number of optimiser updates; None for learned rounding.
        loss_first: loss of the first update.
        loss_last: loss of the last update.
        rounded_up_share_changed: share of weights that are no longer rounded to nearest, after learned
            rounding.
    """

    name: str
    seconds: float
    iterations: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    loss_first: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    loss_last: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    rounded_up_share_changed: float | None = field(default=None, metadata=OMITTED_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class RunResult(Result):
    """A finished run.

    Attributes:
        fine_tune_seconds: duration of the fine-tuning, in seconds; None without fine-tuning.
        fine_tune_iterations: number of optimiser updates; None without fine-tuning.
        stages: stages of the fine-tuning; None without fine-tuning.
        tuned_share: share of the denoiser's parameters whose float values were trained, for QuEST.
        zero_points_rounded_after_training: True if zero points were trained as float numbers.
        calibration_images: number of images whose trajectories were recorded; None for an exchange.
        layers_quantized: number of low-bit layers.
        layers_float: number of layers in float.
        bytes_before: size of the denoiser's parameters in float32, in bytes.
        bytes_after: size of the low-bit denoiser's file, in bytes.
        snr_db_before: SNR of the noise prediction against the float model before the exchange, in dB.
        snr_db_after: SNR against the float model with the new LoRAs, in dB.
        loras: LoRAs of the run after an exchange: `file`, `sha256`, `scale`, `modules`.
        seconds: duration of the whole call, in seconds.
        peak_rss_bytes: peak resident memory of this process, in bytes.
    """

    fine_tune_seconds: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    fine_tune_iterations: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    stages: list[FineTuneStage] | None = field(default=None, metadata=OMITTED_IF_NONE)
    tuned_share: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    zero_points_rounded_after_training: bool | None = field(default=None, metadata=OMITTED_IF_NONE)
    calibration_images: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    layers_quantized: int
    layers_float: int
    bytes_before: int
    bytes_after: int
    snr_db_before: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    snr_db_after: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    loras: list[dict[str, Any]] | None = field(default=None, metadata=OMITTED_IF_NONE)
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlanResult(Result):
    """The plan of a quantisation, and its estimated cost on this machine.

    Attributes:
        model: name of the checkpoint.
        denoiser: class of the denoiser.
        method: quantisation method of the recipe.
        layers_quantized: number of layers that become low-bit.
        layers_float: number of layers that stay in float.
        precisions: number of layers by precision, e.g. `w4a4`.
        float_layers: names of the layers that stay in float; `float` in JSON.
        timesteps: number of calibrated timesteps.
        calibration_images: number of images whose trajectories are recorded.
        bytes_before: size of the denoiser's parameters in float32, in bytes.
        bytes_after: size of the low-bit denoiser's file, in bytes.
        iterations: number of optimiser updates; of each block with block-wise fine-tuning.
        blocks: number of blocks that are fine-tuned one by one; None: the whole denoiser is at once.
        adapter_parameters: number of adapter parameters.
        estimated_seconds: estimated duration, in seconds.
        estimated_peak_bytes: estimated peak memory, in bytes.
    """

    model: str
    denoiser: str
    method: str
    layers_quantized: int
    layers_float: int
    precisions: dict[str, int]
    float_layers: list[str] = field(metadata=json_key("float"))
    timesteps: int
    calibration_images: int
    bytes_before: int
    bytes_after: int
    iterations: int
    blocks: int | None = field(default=None, metadata=OMITTED_IF_NONE)
    adapter_parameters: int
    estimated_seconds: float
    estimated_peak_bytes: float
