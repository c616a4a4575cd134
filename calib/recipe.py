"""A recipe: all options that determine the result of `trtq quantize` for a checkpoint.

The recipes that ship with trtq are TOML files in `calib/recipes`, one per method. A user's file names a
method and overrides values of the method's recipe. An unknown key is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from trtq.bits import check_bits
from trtq.calib.budget import parse_budget
from trtq.calib.calibrators import BY_OUTPUT, CALIBRATORS, parse_calibrator
from trtq.calib.toml_files import explain, read_toml
from trtq.checkpoint.layout import parse_size
from trtq.documents import check_depth, shown
from trtq.errors import RecipeError
from trtq.limits import MAX_BATCH, MAX_GUIDANCE, MAX_ITERATIONS, MAX_STEPS
from trtq.precision import GROUPS, METHODS, ScaleChoice, parse_precision

__all__ = [
    "Attention",
    "Blockwise",
    "Calibration",
    "Quest",
    "Recipe",
    "Training",
    "load_recipe",
    "methods",
]

POST_TRAINING = ("minmax", "search")
_FOLDER = Path(__file__).parent / "recipes"
_FORMAT_BITS = {"fp8": "w8a8", "nvfp4": "w4a4"}
"""Bits of the formats other than integers."""
_LARGE_MODEL = 100_000_000
_LARGE_AT_ONCE = 2


def check_path(value: str) -> str:
    """Return a user's path if it contains no NUL character.

    Raises:
        ValueError: the path contains NUL.
    """
    if "\0" in value:
        raise ValueError("it holds a NUL character, which no path does")
    return value


def _range_method(value: str) -> str:
    """Return a method of finding activation ranges if it is known.

    Raises:
        ValueError: the method is unknown.
    """
    if value not in (*METHODS, BY_OUTPUT) and parse_calibrator(value) is None:
        known = ", ".join([*METHODS, BY_OUTPUT, *CALIBRATORS, "percentile:99.9"])
        raise ValueError(f"unknown method {shown(value)} of finding ranges; choose one of {known}")
    return value


class _Strict(BaseModel):
    # Fields are strict: numbers in quotes, booleans in place of numbers, NaN and infinity are refused.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Int = Annotated[int, Field(strict=True)]
_Float = Annotated[float, Field(strict=True)]
_Bool = Annotated[bool, Field(strict=True)]
_Path = Annotated[
    str, Field(strict=True, min_length=1, max_length=4096), AfterValidator(check_path)
]


class Calibration(_Strict):
    """Calibration: how ranges are determined before any training."""

    images: _Int | None = Field(None, ge=1, le=65536)
    """Number of images whose trajectories are recorded; None: 64, or fewer for a large model, see
    `trtq.runs.calibration_images`. The recipe of a plan has a number."""
    samples_per_step: _Int = Field(4096, ge=16, le=1 << 20)
    """Number of sampled values per layer and step."""
    weights: Literal["minmax", "search"] = "search"
    activations: Annotated[str, AfterValidator(_range_method)] = "search"
    """`minmax`, `search`, `output` (see `trtq.calib.output_ranges`), or a calibrator of
    `trtq.calib.histogram`: `entropy`, `mse`, `percentile` or e.g. `percentile:99.9`."""
    batch: _Int = Field(64, ge=1, le=MAX_BATCH)
    """Maximum number of images per denoiser call; fewer for large images, see
    `trtq.diffusion.sampling.at_once`."""
    share_inputs: _Bool = True
    """Whether layers with the same input, e.g. queries, keys and values, share one quantiser; the
    published methods use one per layer."""


class Attention(_Strict):
    """Quantisation of attention's products, as in QuEST (arXiv 2402.03666)."""

    quantize: _Bool = False
    probability_bits: _Int | Literal["float"] = 8
    """Bits of the softmax output, 2 .. 8; `float` keeps the product of probabilities and values in
    float."""

    @field_validator("probability_bits")
    @classmethod
    def _known_bits(cls, value: int | Literal["float"]) -> int | Literal["float"]:
        return value if value == "float" else check_bits(value)


class Training(_Strict):
    """Data-free fine-tuning; defaults follow EfficientDM's released code (arXiv 2310.03270)."""

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, values: Any) -> Any:
        """Accept `split_step`, the former name of `split_scale`, for one release."""
        if isinstance(values, dict) and "split_step" in values and "split_scale" not in values:
            values = {("split_scale" if k == "split_step" else k): v for k, v in values.items()}
        return values

    iterations: _Int = Field(ge=1, le=MAX_ITERATIONS)
    """Total number of updates in all stages."""
    batch: _Int = Field(ge=1, le=MAX_BATCH)
    """Number of images per process and micro-batch."""
    accumulate: _Int = Field(1, ge=1, le=65536)
    """Number of micro-batches per update."""
    at_once: _Int | None = Field(None, ge=1, le=MAX_BATCH)
    """Maximum number of images per forward and backward pass; a larger batch is split into several
    micro-batches. None: the whole batch, or 2 images for models of 100 million parameters or more."""
    rank: _Int = Field(32, ge=0, le=65536)
    """Rank of the QALoRA adapters; 0: no adapters."""
    adapter_start: Literal["zero", "residual"] = "zero"
    """Start of the adapters. `zero`: `B` is zero, as released. `residual`: the best low-rank
    approximation of what the weight's codes do not hold, see `trtq.quant.branch.start_adapters`."""
    branch_rank: _Int = Field(0, ge=0, le=65536)
    """Rank of a float branch that fine-tuning adds to each quantised weight with adapters, and that
    decays to nothing, see `trtq.quant.branch`; 0: no branch."""
    branch_share: _Float = Field(0.5, gt=0, le=1)
    """Share of the stage's iterations after which the branch is gone."""
    base: Literal["fp", "int"] = "fp"
    """Operand to which the adapters are added: `fp` the float weight; `int` its codes (released)."""
    zero_points: Literal["frozen", "rounded", "float"] = "frozen"
    """Behaviour of activation zero points, see `trtq.quant.activation.ZeroPointMode`."""
    trajectory: Literal["staggered", "sequential"] = "staggered"
    """`sequential`: all items of a batch are at the same step, as released. `staggered`: the items of a
    batch are at different steps, so every update covers the whole trajectory."""
    eta: _Float = Field(1.0, ge=0, le=1)
    """Amount of fresh noise in the teacher's DDIM steps; 1 in the release."""
    step_weights: Literal["uniform", "influence"] = "uniform"
    """Weight of an error at each step. `influence`: the error's effect on the final sample, see
    `trtq.diffusion.schedule.NoiseSchedule.influence`. `uniform`: 1 at every step, as published."""
    lora_travel: _Float = Field(3.2, gt=0, le=1e6)
    """Number of weight levels that an adapter entry moves under a constant gradient. The learning
    rate of a layer is `2 * lora_travel * mean(d_w) / iterations`; with linear decay the released
    `mean(d_w) / 2500` over 16,000 iterations is a travel of 3.2."""
    weight_scale_lr: _Float = Field(1e-6, ge=0, le=1e3)
    """Learning rate of the weight scales."""
    activation_lr: _Float = Field(5e-4, ge=0, le=1e3)
    """Learning rate of the activation scales and zero points."""
    activation_lr_relative: _Bool = False
    """Whether to multiply `activation_lr` by the layer's mean scale, for equal relative changes."""
    split_scale: _Bool = False
    """Whether to update weight scales twice per iteration, as in the release; requires base `int`."""
    weight_decay: _Float = Field(0.01, ge=0, le=1e3)
    """Weight decay of AdamW."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the student's forward pass, see accelerate."""
    gradient_checkpointing: _Bool | None = None
    """Whether to recompute activations in the backward pass: much less memory, a third more time.
    None: for models of 100 million parameters or more."""
    table_state: Literal["dense", "persistent", "reset"] = "dense"
    """Optimiser state of the entries of timestep tables, see `trtq.train.table_adam`."""
    checkpoint_every: _Int = Field(200, ge=1, le=MAX_ITERATIONS)
    """Number of iterations between checkpoints."""

    def divided(self, parameters: int) -> Training:
        """Split each update's images into micro-batches for a model of `parameters` parameters."""
        default = self.batch if parameters < _LARGE_MODEL else _LARGE_AT_ONCE
        limit = min(self.batch, self.at_once or default)
        batch = next(size for size in range(limit, 0, -1) if self.batch % size == 0)
        accumulate = self.accumulate * (self.batch // batch)
        return self.model_copy(update={"batch": batch, "accumulate": accumulate})

    def recomputes(self, parameters: int) -> bool:
        """Whether to use gradient checkpointing for a model with this number of parameters."""
        choice = self.gradient_checkpointing
        return parameters >= _LARGE_MODEL if choice is None else choice


class Quest(_Strict):
    """Selective, progressive fine-tuning (QuEST, arXiv 2402.03666)."""

    embedding: str = "time_embedding"
    """Name of the policy's set of layers tuned in stage 1."""
    attention: str = "attention"
    """Name of the policy's set of layers tuned in stage 2."""
    first_stage: _Float = Field(0.2, gt=0, lt=1)
    """Share of the iterations in stage 1."""
    weighting: Literal["paper", "released", "global"] = "paper"
    """See `trtq.train.quest.alignment_loss`."""
    global_weight: _Float = Field(1.0, ge=0, le=1e6)
    """See `trtq.train.quest.alignment_loss`."""
    aligned: Literal["stage", "adapters"] = "stage"
    """Layers whose outputs are compared with those of the float model. `stage`: the layers of the stage,
    as published. `adapters`: in stage 2 all layers with adapters."""
    weight_travel: _Float = Field(1.0, gt=0, le=1e6)
    """Number of weight levels that a tuned weight moves by, see `Training.lora_travel`."""
    adaround: _Int = Field(0, ge=0, le=MAX_ITERATIONS)
    """Number of iterations of learned rounding per layer before stage 1; 0: rounding to nearest."""


class Blockwise(_Strict):
    """Fine-tuning of one block of the denoiser at a time, against the float block's output.

    Only one block's activations, gradients and optimiser state are in memory. Each block gets
    `training.iterations` updates.
    """

    points: _Int = Field(16, ge=1, le=65536)
    """Number of micro-batches at which a block's inputs and outputs are recorded, for each micro-batch
    of an update. The records of one block at a time are on disk."""
    inputs: Literal["quantized", "float"] = "quantized"
    """Origin of a block's inputs: `quantized`, the denoiser with the blocks that are trained already, so
    that a block also corrects their errors; `float`, the float denoiser. The target is the float
    denoiser's in both cases."""
    whole_iterations: _Int = Field(0, ge=0, le=MAX_ITERATIONS)
    """Number of updates of the whole denoiser after the last block, which need the memory of fine-tuning
    the whole denoiser."""


class Recipe(_Strict):
    """All options of quantisation, from calibration to fine-tuning."""

    method: str
    """Name of the method, see `methods`."""
    bits: str = "w4a4"
    """Bits of weights and activations, e.g. `w4a8`; `w4a16` and `w8a16` leave activations in float."""
    format: Literal["int", "fp8", "nvfp4"] = "int"
    """Format of low-bit layers; `fp8` has the bits w8a8, `nvfp4` the bits w4a4."""
    group: _Int | None = None
    """Number of input channels that share a scale of a weight-only layer: 32, 64, 128, or 0 for one
    scale per output channel. None: 64 with 4-bit codes, 0 with 8-bit codes."""
    tables: Literal["per-step", "static"] = "per-step"
    """Activation scales: one per denoising step, or one for all steps."""
    steps: _Int = Field(20, ge=1, le=MAX_STEPS)
    """Number of calibrated denoising steps."""
    guidance: _Float | None = Field(None, ge=0, le=MAX_GUIDANCE)
    """Classifier-free guidance scale of the trajectories; None: the scale of the pipeline."""
    prompts: _Path | None = None
    """Text file with one prompt per line, for calibration and fine-tuning of text models."""
    size: str | None = None
    """Image size `HEIGHTxWIDTH`, in pixels, of all training images; None: the model's size."""
    seed: _Int = Field(0, ge=0, lt=1 << 31)
    """Seed of all random numbers."""
    policy: _Path | None = None
    """Policy file of the user; None: the family's policy."""
    budget: str | None = None
    """Cost limit of mixed precision, e.g. `size=0.15x`, see `calib.sensitivity`; None: no limit."""
    scales: ScaleChoice = "step"
    """Origin of the activations' scales: one per denoising step, one per row of the activation, or the
    smaller of both; `auto` chooses per step or per row for each linear layer and each product of
    attention. See `trtq.quant.dynamic_scale`."""
    smooth: _Bool = True
    """Whether the channels of a layer's input are scaled before its quantiser where the layer's error
    becomes smaller, see `trtq.calib.transforms`."""
    rotate: Literal[0, 16, 64, 256] = 0
    """Maximum number of channels that a rotation of a layer's input mixes, where the layer's error
    becomes smaller; 0: no rotation."""
    split_skips: _Bool = False
    """Whether the two sources of a decoder's skip convolutions have separate quantisers (QuEST)."""
    attention: Attention = Attention()
    calibration: Calibration = Calibration()
    training: Training | None = None
    quest: Quest | None = None
    blockwise: Blockwise | None = None
    """Section of block-wise fine-tuning; None: the whole denoiser is fine-tuned at once."""

    @model_validator(mode="before")
    @classmethod
    def _bits_of_format(cls, values: Any) -> Any:
        if (
            isinstance(values, dict)
            and "bits" not in values
            and values.get("format") in _FORMAT_BITS
        ):
            return values | {"bits": _FORMAT_BITS[values["format"]]}
        return values

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, value: str) -> str:
        if parse_precision(value).format in _FORMAT_BITS:
            raise RecipeError(f"bits={shown(value)} is a format; write format = {value.lower()!r}")
        return value.lower()

    @field_validator("group")
    @classmethod
    def _known_group(cls, value: int | None) -> int | None:
        if value not in (None, 0, *GROUPS):
            allowed = ", ".join(map(str, sorted(GROUPS)))
            raise RecipeError(f"group={value} is not supported; choose one of 0, {allowed}")
        return value

    @property
    def precision(self) -> str:
        """Precision of the layers that a policy leaves to the recipe: `w4a4`, `w4a16`, `fp8`, ..."""
        return self.bits if self.format == "int" else self.format

    @field_validator("size")
    @classmethod
    def _known_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("budget")
    @classmethod
    def _known_budget(cls, value: str | None) -> str | None:
        if value is not None:
            parse_budget(value)
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in methods():
            raise RecipeError(
                f"unknown method {shown(value)}; choose one of {', '.join(methods())}"
            )
        return value


def methods() -> list[str]:
    """Names of all methods."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def load_recipe(path: Path | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load the method's recipe, and apply the user's file and then the overrides.

    Args:
        path: TOML file of the user; None: no file.
        overrides: values that take precedence over both files, nested like a file; None: no values.

    Raises:
        RecipeError: a key is unknown, a value is out of range, or a file cannot be read.
    """
    given = _merge(read_toml(path, "recipe") if path else {}, overrides or {})
    try:
        check_depth(given)
    except ValueError as err:
        raise RecipeError(f"the recipe is not valid: {err}") from err
    method = given.get("method", "efficientdm")
    if not isinstance(method, str) or method not in methods():
        raise RecipeError(f"unknown method {shown(method)}; choose one of {', '.join(methods())}")
    if method in POST_TRAINING and given.get("training") is not None:
        raise RecipeError(
            f"the method {method!r} does not fine-tune, so it allows neither [training] nor a number "
            "of iterations; choose another method"
        )
    if method in POST_TRAINING and given.get("blockwise") is not None:
        raise RecipeError(
            f"the method {method!r} does not fine-tune, so there is nothing to do block by block; leave "
            "--blockwise (the section [blockwise]) out, or choose another method"
        )
    values = _merge(read_toml(_FOLDER / f"{method}.toml", "recipe"), given)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as err:
        raise RecipeError(f"the recipe is not valid: {explain(err)}") from err
    _check_format(recipe)
    if (
        recipe.training is not None
        and recipe.training.split_scale
        and recipe.training.base != "int"
    ):
        raise RecipeError('training.split_scale=true needs training.base="int"')
    if recipe.quest is not None and (recipe.training is None or recipe.training.iterations < 2):
        raise RecipeError("a [quest] section needs a [training] section with 2 iterations or more")
    if recipe.quest is None and recipe.training is not None and recipe.training.rank == 0:
        raise RecipeError(
            "training.rank=0 leaves nothing to train; raise the rank or add a [quest] section"
        )
    _check_adapters(recipe)
    _check_blockwise(recipe)
    return recipe


def _check_blockwise(recipe: Recipe) -> None:
    """Raise if a setting of block-wise fine-tuning has no meaning with the others.

    Raises:
        RecipeError: the message names the setting.
    """
    if recipe.blockwise is None or recipe.training is None:
        return
    if recipe.quest is not None and recipe.blockwise.whole_iterations == 1:
        raise RecipeError(
            "blockwise.whole_iterations=1 is not enough for the two stages of [quest]; choose 0, or 2 "
            "and above"
        )
    if recipe.training.gradient_checkpointing and not recipe.blockwise.whole_iterations:
        raise RecipeError(
            "training.gradient_checkpointing computes the blocks of the whole denoiser again, and "
            "[blockwise] keeps one block's activations anyway; leave one of them out"
        )


def _check_adapters(recipe: Recipe) -> None:
    """Raise if a setting needs adapters and there are none.

    Raises:
        RecipeError: the message names the setting.
    """
    if recipe.training is None or recipe.training.rank:
        return
    for name, needed in (
        ("quest.aligned='adapters'", recipe.quest and recipe.quest.aligned == "adapters"),
        (f"training.branch_rank={recipe.training.branch_rank}", recipe.training.branch_rank),
    ):
        if needed:
            raise RecipeError(
                f"{name} needs adapters, and training.rank is 0; raise the rank or leave the setting out"
            )


def _check_format(recipe: Recipe) -> None:
    """Raise unless the other settings suit the recipe's format.

    Raises:
        RecipeError: a setting has no meaning in the format.
    """
    format = parse_precision(recipe.precision).format
    needed = _FORMAT_BITS.get(format)
    if needed is not None and recipe.bits != needed:
        raise RecipeError(
            f"format={format!r} has the bits {needed}, got {recipe.bits!r}; leave out the bits, or the "
            "format"
        )
    floating = needed is not None
    if floating and recipe.training is not None and recipe.training.base == "int":
        raise RecipeError(
            f'format={format!r} has no integer codes, so training.base="int" has no meaning; leave it '
            "out"
        )
    if floating and recipe.quest is not None and recipe.quest.adaround:
        raise RecipeError(
            f"format={format!r} has no learned rounding; set quest.adaround = 0, or choose integer bits"
        )
    if format != "int" and recipe.budget is not None:
        raise RecipeError(
            f"a budget chooses the bits of integer weights, and the recipe asks for {recipe.precision}; "
            "leave out the budget, or choose integer bits, e.g. w4a4"
        )
    method = recipe.calibration.activations
    calibrated = method == BY_OUTPUT or parse_calibrator(method) is not None
    if calibrated and recipe.scales == "row":
        raise RecipeError(
            f"calibration.activations={recipe.calibration.activations!r} finds ranges, and scales='row' "
            "computes them while the model runs; leave one of them out"
        )
    if calibrated and format != "int":
        raise RecipeError(
            f"calibration.activations={recipe.calibration.activations!r} finds ranges of integers, and "
            f"the recipe asks for {recipe.precision}; leave it out, or choose integer bits, e.g. w8a8"
        )
    if recipe.group is not None and format != "weight_only":
        raise RecipeError(
            f"group={recipe.group} is for weight-only bits (w4a16 or w8a16), and the recipe asks for "
            f"{recipe.precision}; leave out the group"
        )
