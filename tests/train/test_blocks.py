"""Block-wise fine-tuning: the blocks, their recorded calls, and what one block's training may touch."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import tiny_pipeline
from tests.families.pipelines import build
from trtq.artefact.files import sha256
from trtq.calib.policy import load_policy, plan_layers
from trtq.calib.recipe import load_recipe
from trtq.checkpoint.components import denoisers_of
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import ArtefactError, QuantizationError, RecipeError
from trtq.quant import TimestepTable, convert
from trtq.quant.plan import quantizable_layers
from trtq.quant.timestep import float_scope
from trtq.runs import fine_tune as fine_tuning
from trtq.runs.fine_tune_blocks import recipe_after_blocks
from trtq.runs.plan import plan_quantize
from trtq.runs.quantize import quantize
from trtq.train import blocks
from trtq.train.block_call import rows_of, store_call
from trtq.train.block_points import BlockPoints, KeptPoints, _row_weights
from trtq.train.blocks import block_paths, blocks_of
from trtq.train.distill import Rates
from trtq.train.efficientdm import EfficientDM
from trtq.train.loop import fit
from trtq.train.trajectories import Trajectories

FILE = "quantized.safetensors"
STEPS = 4


def recipe(method="efficientdm", blockwise=None, **training):
    settings = {"iterations": 3, "batch": 4, "checkpoint_every": 2}
    if method != "quest":
        settings["rank"] = 4
    return {
        "method": method,
        "steps": STEPS,
        "calibration": {"images": 8, "samples_per_step": 256},
        "training": settings | training,
        "blockwise": {"points": 2} | (blockwise or {}),
    }


class Stop(Exception):
    pass


def interrupt_at(stage, iteration):
    def report(name, done, total):
        if name.startswith(stage) and done == iteration:
            raise Stop

    return report


class Tuned:
    """A quantised tiny UNet with its kept points."""

    def __init__(self, folder, *, inputs="quantized", count=3, batch=4, slots=1):
        source = open_pipeline(tiny_pipeline())
        schedule = NoiseSchedule.of(source.pipeline.scheduler, STEPS)
        table = TimestepTable(schedule.timesteps.tolist())
        plans = plan_layers(source.denoiser, load_policy("UNet2DModel"), "w4a4")
        self.model = convert(source.denoiser, plans, table, rank=4)
        for _, layer in self.model.layers():
            zero_point = layer.activation.zero_point.detach()
            layer.activation.set_range(torch.full((STEPS,), 0.2), zero_point)
        self.trajectories = Trajectories(
            self.model.teacher,
            schedule,
            source.sample_shape,
            source.draw_conditions,
            batch=batch,
            slots=slots,
        )
        self.kept = KeptPoints(
            self.model, self.trajectories, count=count, inputs=inputs, folder=folder / "inputs"
        )
        self.blocks = blocks_of(self.model, self.kept.called)

    def block(self, path):
        return next(block for block in self.blocks if block.place == path)

    def objective(self, block, points, **rates):
        rates = {"lora": 0.2, "weight_scale": 1e-6, "activation": 1e-2} | rates
        return EfficientDM(block, points, Rates(**rates))

    def train(self, block, iterations=30):
        from accelerate import Accelerator

        with BlockPoints(self.kept, block) as points:
            fit(
                block,
                self.objective(block, points),
                iterations=iterations,
                accumulate=len(points.streams),
                weight_decay=0.0,
                accelerator=Accelerator(cpu=True),
                checkpoints=None,
                checkpoint_every=100,
                fingerprint="",
            )


def error(tuned, block):
    """Mean squared error of a block at its recorded calls."""
    with BlockPoints(tuned.kept, block) as points, torch.no_grad():
        calls = [points.next(0, index) for index in range(3)]
        return sum(float((block(call) - call.teacher).square().mean()) for call in calls)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tiny", ["conv_in", "mid_block.resnets.1", "up_blocks.1.resnets.0", "conv_out"]),
        ("dit", ["transformer_blocks.0"]),
        ("flux", ["transformer_blocks.0", "single_transformer_blocks.0", "proj_out"]),
        ("sd_xl", ["down_blocks.1.attentions.0.transformer_blocks.0", "add_embedding"]),
        ("pixart", ["transformer_blocks.0"]),
    ],
)
def test_every_layer_lies_in_one_block_of_the_repeated_structure(model, expected):
    pipeline = tiny_pipeline() if model == "tiny" else build(model)
    (module,) = denoisers_of(pipeline).values()
    layers = list(quantizable_layers(module))
    paths = block_paths(module, layers)
    assert set(expected) <= set(paths)
    assert not any(isinstance(module.get_submodule(path), nn.ModuleList) for path in paths)
    inside = [
        [path for path in paths if name == path or name.startswith(f"{path}.")] for name in layers
    ]
    assert [len(blocks) for blocks in inside] == [1] * len(layers)
    assert max(sum(path in each for each in inside) for path in paths) < len(layers) / 2


def test_a_module_around_the_repeated_structure_is_no_block():
    body = nn.Module()
    body.layers = nn.ModuleList(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(2)
    )
    around = nn.Module()
    around.model = body
    names = [name for name, module in around.named_modules() if isinstance(module, nn.Linear)]
    assert block_paths(around, names) == ["model.layers.0", "model.layers.1"]


def test_a_denoiser_without_blocks_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(
        QuantizationError, match=r"Sequential has no blocks .* leave --blockwise out"
    ):
        block_paths(model, ["0", "2"])


def test_blocks_come_in_the_order_of_their_calls(tmp_path):
    places = [block.place for block in Tuned(tmp_path).blocks]
    order = ("conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "conv_out")
    positions = [min(i for i, p in enumerate(places) if p.startswith(name)) for name in order]
    assert positions == sorted(positions)


@pytest.mark.parametrize("path", ["down_blocks.1.resnets.0", "mid_block.attentions.0"])
def test_training_a_block_lowers_its_error_and_touches_no_other(path, tmp_path):
    tuned = Tuned(tmp_path)
    block = tuned.block(path)
    before = {name: tensor.clone() for name, tensor in tuned.model.state_dict().items()}
    first = error(tuned, block)
    tuned.train(block)
    assert error(tuned, block) < 0.9 * first
    changed = {
        name
        for name, tensor in tuned.model.state_dict().items()
        if not torch.equal(before[name], tensor)
    }
    assert changed
    assert all(name.startswith(f"denoiser.{path}.") for name in changed)
    assert not (tmp_path / "inputs").exists()


def test_the_optimisers_of_different_blocks_share_no_parameter(tmp_path):
    tuned = Tuned(tmp_path)
    groups = {}
    for block in tuned.blocks:
        objective = tuned.objective(block, BlockPoints(tuned.kept, block))
        parameters = [p for group in objective.parameter_groups() for p in group["params"]]
        assert {id(p) for p in parameters} <= {id(p) for p in block.parameters()}
        groups[block.place] = {id(p) for p in parameters}
    assert not any(a & b for a, b in itertools.combinations(groups.values(), 2))
    whole = EfficientDM(tuned.model, tuned.trajectories, Rates(0.01, 1e-6, 5e-4))
    expected = {id(p) for group in whole.parameter_groups() for p in group["params"]}
    assert set.union(*groups.values()) == expected


def test_a_quantiser_that_blocks_share_belongs_to_the_first(tmp_path):
    tuned = Tuned(tmp_path)
    first, second = "down_blocks.0.resnets.0", "mid_block.resnets.0"
    layers = dict(tuned.model.layers())
    shared = layers[f"{first}.time_emb_proj"].activation
    layers[f"{second}.time_emb_proj"].activation = shared
    blocks = {block.place: block for block in blocks_of(tuned.model, tuned.kept.called)}
    assert any(quantizer is shared for _, quantizer in blocks[first].activations())
    assert not any(quantizer is shared for _, quantizer in blocks[second].activations())


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_inputs_and_targets_are_those_of_the_denoisers(inputs, tmp_path):
    tuned = Tuned(tmp_path, inputs=inputs)
    tuned.train(tuned.block("down_blocks.0.resnets.0"), iterations=3)
    block = tuned.block("mid_block.resnets.0")
    seen = {}

    def keep(name):
        return lambda _, args, result: seen.update({name: (args, result)})

    point = tuned.kept._points[0][1]
    with torch.no_grad():
        for name, denoiser in (("quantized", tuned.model), ("float", tuned.model.teacher)):
            handle = block.denoiser.register_forward_hook(keep(name))
            tuned.trajectories.predict(denoiser, point)
            handle.remove()
    with BlockPoints(tuned.kept, block) as points:
        calls = [points.next(0, index) for index in range(3)]
    (call,) = [call for call in calls if torch.equal(call.timestep, point.timestep)]
    assert all(torch.equal(a, b) for a, b in zip(call.args, seen[inputs][0], strict=True))
    assert torch.equal(call.teacher, seen["float"][1].flatten(1))
    assert torch.equal(call.step, tuned.model.table.index(point.timestep))
    assert not torch.equal(seen["quantized"][0][0], seen["float"][0][0])


def test_scales_get_gradients_at_the_steps_of_the_call_alone(tmp_path):
    tuned = Tuned(tmp_path, batch=1)
    block = tuned.block("mid_block.resnets.0")
    with BlockPoints(tuned.kept, block) as points:
        call = points.next(0, 0)
        (block(call) - call.teacher).square().sum().backward()
    (step,) = call.step.tolist()
    gradient = dict(block.layers())["mid_block.resnets.0.conv1"].activation.scale.grad
    assert gradient[step] != 0
    assert torch.count_nonzero(gradient) == 1


def test_each_recorded_call_is_used_once_per_epoch(tmp_path):
    tuned = Tuned(tmp_path)
    with BlockPoints(tuned.kept, tuned.block("conv_in")) as points:
        orders = [
            [points.next(0, 3 * epoch + place).args[0].sum().item() for place in range(3)]
            for epoch in range(4)
        ]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len(set(orders[0])) == 3
    assert len({tuple(order) for order in orders}) > 1


class Saved:
    """Bytes that the backward pass keeps at the same time."""

    def __init__(self):
        self.peak = self.now = 0

    def pack(self, tensor):
        saved = self

        class Kept:
            def __init__(self):
                saved.now += tensor.numel() * tensor.element_size()
                saved.peak = max(saved.peak, saved.now)

            def __del__(self):
                saved.now -= tensor.numel() * tensor.element_size()

            value = tensor

        return Kept()

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.value)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def test_the_backward_pass_keeps_one_block_alone(tmp_path):
    peaks = {}
    for name, settings in (("blocks", recipe()), ("whole", recipe() | {"blockwise": None})):
        with Saved() as saved:
            quantize(tiny_pipeline(), settings, tmp_path / name)
        assert saved.now == 0
        peaks[name] = saved.peak
    tuned = Tuned(tmp_path)
    alone = []
    for block in tuned.blocks:
        with BlockPoints(tuned.kept, block) as points, Saved() as saved:
            call = points.next(0, 0)
            (block(call) - call.teacher).square().sum().backward()
        alone.append(saved.peak)
    assert peaks["blocks"] < 1.1 * max(alone)
    assert peaks["blocks"] < peaks["whole"] / 3


@pytest.mark.parametrize(
    ("method", "stage"),
    [("efficientdm", "block 2 of"), ("combined", "block 3 of"), ("quest", "block 1 of")],
)
def test_an_interrupted_run_resumes_to_the_same_bits(method, stage, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = recipe(method)
    if method == "quest":
        settings["quest"] = {"adaround": 1}
    result = quantize(tiny_pipeline(), settings, whole)
    with pytest.raises(Stop):
        quantize(tiny_pipeline(), settings, cut, progress=interrupt_at(stage, 3))
    assert not cut.exists()
    other = settings | {"blockwise": {"points": 3}}
    with pytest.raises(ArtefactError, match="another model or recipe"):
        quantize(tiny_pipeline(), other, cut, resume=True)
    resumed = quantize(tiny_pipeline(), settings, cut, resume=True)
    assert resumed.fine_tune_iterations < result.fine_tune_iterations
    assert sha256(cut / FILE) == sha256(whole / FILE)
    assert not list(tmp_path.rglob("block-inputs"))


def test_the_run_says_that_it_was_tuned_block_by_block(tmp_path):
    result = quantize(tiny_pipeline(), recipe(blockwise={"whole_iterations": 2}), tmp_path / "run")
    *stages, last = result.stages
    assert stages[0].name == f"block 1 of {len(stages)}, down_blocks.0.resnets.0"
    assert [stage.iterations for stage in result.stages] == [*[3] * len(stages), 2]
    assert last.name == "fine-tune"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    expected = {"points": 2, "inputs": "quantized", "whole_iterations": 2}
    assert manifest["recipe"]["blockwise"] == expected
    plan = plan_quantize(tiny_pipeline(), load_recipe(overrides=recipe()))
    assert len(plan.blocks()) == len(stages)


def test_updates_after_the_blocks_keep_their_rates():
    settings = load_recipe(
        overrides=recipe("combined", {"whole_iterations": 30}, iterations=60, lora_travel=4.0)
    )
    after = recipe_after_blocks(settings)
    assert (after.training.iterations, after.training.lora_travel) == (30, 2.0)
    assert after.quest.weight_travel == settings.quest.weight_travel / 2
    assert recipe_after_blocks(load_recipe(overrides=recipe())) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branch_rank": 2, "branch_share": 0.7}, None),
        ({"adapter_start": "residual"}, None),
        ({"accumulate": 2}, None),
        ({"mixed_precision": "bf16"}, None),
        ({"zero_points": "float", "table_state": "persistent"}, None),
        ({"step_weights": "influence"}, None),
        ({"gradient_checkpointing": True}, r"training.gradient_checkpointing .* leave one of them"),
    ],
    ids=str,
)
def test_settings_of_the_training_with_blocks(options, message, tmp_path):
    if message is not None:
        with pytest.raises(RecipeError, match=message):
            load_recipe(overrides=recipe(**options))
        return
    result = quantize(tiny_pipeline(), recipe(**options), tmp_path / "run")
    assert {stage.iterations for stage in result.stages} == {3}
    branches = [
        key for key in load_file(tmp_path / "run" / "trained.safetensors") if "branch" in key
    ]
    assert branches == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "search", "blockwise": {}},
            r"'search' does not fine-tune, .* leave --blockwise",
        ),
        (
            recipe("combined", {"whole_iterations": 1}),
            r"blockwise.whole_iterations=1 is not enough",
        ),
        (recipe(blockwise={"points": 0}), r"blockwise.points"),
        (recipe(blockwise={"inputs": "teacher"}), r"blockwise.inputs"),
        (recipe(blockwise={"count": 2}), r"blockwise.count"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(overrides=settings)


def test_a_denoiser_without_blocks_is_refused_before_the_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_LISTS", ())
    monkeypatch.setattr(blocks, "_blocks_in", lambda *_: iter(["conv_in"]))
    stages = []
    with pytest.raises(
        QuantizationError, match="UNet2DModel has no blocks to fine-tune one by one"
    ):
        quantize(
            tiny_pipeline(),
            recipe(),
            tmp_path / "run",
            progress=lambda *given: stages.append(given),
        )
    assert stages == []
    assert not list(tmp_path.iterdir())


def test_guided_errors_are_weighted_in_both_halves(tmp_path):
    settings = recipe(step_weights="influence") | {"guidance": 2.0}
    result = quantize(tiny_pipeline(), settings, tmp_path / "run")
    assert {stage.iterations for stage in result.stages} == {3}
    weights = torch.tensor([1.0, 3.0])
    assert _row_weights(weights, 4).tolist() == [1.0, 3.0, 1.0, 3.0]
    assert _row_weights(weights, 1).tolist() == [2.0]


def test_several_processes_are_refused(monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(RecipeError, match="one process, and accelerate started 2"):
        fine_tuning.accelerator_for(load_recipe(overrides=recipe()))


def test_a_stored_call_has_the_structure_and_values_of_the_call(tmp_path):
    from trtq.train.block_call import BlockCall

    table = torch.polar(torch.ones(2, 3), torch.rand(2, 3))
    x = torch.rand(2, 3, dtype=torch.bfloat16)
    args, kwargs = (x, [x.t(), None]), {"emb": (table, x), "scale": 0.5}
    step, weight = torch.tensor([1, 2]), torch.ones(1).expand(2)
    call = BlockCall(args, kwargs, step, torch.tensor([7.0, 9.0]), torch.rand(2, 4), weight)
    again = store_call(tmp_path / "call.safetensors", call).load(torch.device("cpu"))
    assert torch.equal(again.args[1][0], x.t())
    assert again.args[0].dtype == x.dtype
    assert again.args[1][1] is None
    assert torch.equal(again.kwargs["emb"][0], table)
    assert again.kwargs["scale"] == 0.5
    assert torch.equal(again.step, step)
    assert torch.equal(again.weight, weight)


def test_the_rows_of_a_result():
    a, b = torch.rand(2, 3, 4), torch.rand(2, 5, 4)
    assert torch.equal(rows_of((a, b)), torch.cat([a.flatten(1), b.flatten(1)], 1))
    assert rows_of((a, torch.rand(3, 2))).shape == (1, 30)
    with pytest.raises(QuantizationError, match="without floating-point tensors"):
        rows_of(torch.ones(2, dtype=torch.long))


def test_a_block_computes_in_float_as_a_teacher(tmp_path):
    tuned = Tuned(tmp_path, inputs="float")
    block = tuned.block("conv_in")
    with BlockPoints(tuned.kept, block) as points:
        call = points.next(0, 0)
    with torch.no_grad(), float_scope():
        assert torch.equal(block.teacher(call), call.values(block.denoiser))
    assert torch.equal(block.teacher(call), call.teacher)
