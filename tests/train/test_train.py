"""Fine-tuning: learning, interruption and resume, and one process compared with two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import tiny_pipeline
from trtq.artefact.files import sha256
from trtq.calib.policy import load_policy, plan_layers
from trtq.calib.recipe import Recipe, Training, load_recipe, methods
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import ArtefactError, NonFiniteError
from trtq.quant import TimestepTable, convert
from trtq.runs.quantize import quantize
from trtq.runs.rates import warn_of_large_updates
from trtq.train.distill import Rates
from trtq.train.efficientdm import EfficientDM
from trtq.train.recompute import recompute_blocks
from trtq.train.trajectories import Trajectories

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = "quantized.safetensors"


def recipe(**training):
    return {
        "method": "efficientdm",
        "steps": 4,
        "calibration": {"images": 8, "samples_per_step": 256},
        "training": {"iterations": 6, "batch": 4, "rank": 4, "checkpoint_every": 3} | training,
    }


def objective(source, *, rank=4, eta=1.0, lora=0.01, **options):
    schedule = NoiseSchedule.of(source.pipeline.scheduler, 4)
    table = TimestepTable(schedule.timesteps.tolist())
    plans = plan_layers(source.denoiser, load_policy("UNet2DModel"), "w4a4")
    model = convert(source.denoiser, plans, table, rank=rank)
    for _, layer in model.layers():
        layer.activation.set_range(torch.full((4,), 0.2), layer.activation.zero_point.detach())
    rates = Rates(lora=lora, weight_scale=1e-6, activation=5e-4)
    shape, draw = source.sample_shape, source.draw_conditions
    trajectories = Trajectories(model.teacher, schedule, shape, draw, batch=8, eta=eta, **options)
    return model, EfficientDM(model, trajectories, rates)


class Stop(Exception):
    pass


def interrupt_at(iteration):
    def report(stage, done, total):
        if stage == "fine-tune" and done == iteration:
            raise Stop

    return report


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quantize(tiny_pipeline(), recipe(), whole)
    with pytest.raises(Stop):
        quantize(tiny_pipeline(), recipe(), cut, progress=interrupt_at(5))
    assert not cut.exists()
    with pytest.raises(ArtefactError, match="another model or recipe"):
        quantize(tiny_pipeline(), recipe(rank=5), cut, resume=True)
    result = quantize(tiny_pipeline(), recipe(), cut, resume=True)
    assert result["fine_tune_iterations"] == 3
    assert sha256(cut / FILE) == sha256(whole / FILE)
    assert not (tmp_path / ".cut.trtq-partial").exists()


def test_few_iterations_with_a_large_travel_give_a_warning_with_the_remedy(caplog):
    training = Training(iterations=120, batch=4, lora_travel=16.0)
    warn_of_large_updates(training, 100, "transformer: ")
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(
        "transformer: the adapters move by up to 0.32 weight levels per iteration"
    )
    assert "Raise the number of iterations to 192, or lower training.lora_travel to 10" in message
    assert "\n" not in message
    caplog.clear()
    remedies = ({"iterations": 192}, {"lora_travel": 10.0}, {"rank": 0})
    for remedy in remedies:
        better = training.model_copy(update=remedy)
        warn_of_large_updates(better, better.iterations * 100 // 120)
    assert not caplog.records


def test_the_recipes_that_ship_give_no_warning_of_large_updates(caplog):
    for method in methods():
        training = load_recipe(overrides={"method": method}).training
        if training is not None:
            warn_of_large_updates(training, training.iterations)
    assert not caplog.records


def test_a_short_fine_tuning_warns_once(tmp_path, caplog):
    quantize(tiny_pipeline(), recipe(iterations=2), tmp_path / "run")
    assert sum("weight levels per iteration" in text for text in caplog.messages) == 1


def test_a_checkpoint_of_a_version_with_the_former_keys_is_resumed(tmp_path, monkeypatch):
    dump = Recipe.model_dump_json
    names = {"split_scale": "split_step"}

    def former_dump(recipe):
        text = dump(recipe)
        for name, former in names.items():
            assert f'"{name}":' in text
            text = text.replace(f'"{name}":', f'"{former}":')
        for section in (',"blockwise":null',):
            assert section in text
            text = text.replace(section, "")
        return text

    with monkeypatch.context() as earlier:
        earlier.setattr(Recipe, "model_dump_json", former_dump)
        with pytest.raises(Stop):
            quantize(tiny_pipeline(), recipe(), tmp_path / "run", progress=interrupt_at(5))
    result = quantize(tiny_pipeline(), recipe(), tmp_path / "run", resume=True)
    assert result.fine_tune_iterations == 3


def test_a_damaged_checkpoint_is_refused(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stop):
        quantize(tiny_pipeline(), recipe(), out, progress=interrupt_at(4))
    (weights,) = (tmp_path / ".run.trtq-partial").rglob("model.safetensors")
    weights.write_bytes(b"nonsense")
    with pytest.raises(ArtefactError, match="damaged"):
        quantize(tiny_pipeline(), recipe(), out, resume=True)


def test_the_seed_determines_the_result(tmp_path):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(tiny_pipeline(), recipe() | {"seed": seed}, tmp_path / name)
        hashes.append(sha256(tmp_path / name / FILE))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "options",
    [
        {"base": "int"},
        {"base": "int", "split_scale": True},
        {"zero_points": "float"},
        {"zero_points": "frozen"},
        {"trajectory": "sequential"},
        {"mixed_precision": "bf16"},
        {"accumulate": 2},
    ],
    ids=str,
)
def test_every_variant_produces_a_run(options, tmp_path):
    result = quantize(tiny_pipeline(), recipe(iterations=2, **options), tmp_path / "run")
    assert result["fine_tune_iterations"] == 2
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert set(options.items()) <= set(record["recipe"]["training"].items())
    rounded = result.get("zero_points_rounded_after_training", False)
    assert rounded == (options.get("zero_points") == "float")


@pytest.mark.parametrize(
    ("options", "parameters", "expected"),
    [
        ({}, 1_000_000, (40, 1)),
        ({}, 859_500_000, (2, 20)),
        ({"at_once": 16}, 1_000_000, (10, 4)),
        ({"batch": 3}, 859_500_000, (1, 3)),
        ({"at_once": 1, "accumulate": 2}, 859_500_000, (1, 80)),
        ({"at_once": 64}, 859_500_000, (40, 1)),
    ],
)
def test_batches_are_split_into_micro_batches_that_fit(options, parameters, expected):
    divided = Training(**{"iterations": 1, "batch": 40} | options).divided(parameters)
    assert (divided.batch, divided.accumulate) == expected
    assert divided.divided(parameters) == divided


def test_micro_batches_of_a_split_batch_are_at_different_steps():
    source = open_pipeline(tiny_pipeline())
    trajectories = Trajectories(
        source.denoiser,
        source.schedule(4),
        source.sample_shape,
        source.draw_conditions,
        batch=2,
        slots=2,
    )
    seen = [t for slot in range(2) for t in trajectories.next(slot, 0).timestep.tolist()]
    assert sorted(seen) == sorted(source.timesteps(4))


def test_training_reduces_the_error_and_does_not_change_the_teacher():
    torch.manual_seed(0)
    source = open_pipeline(tiny_pipeline())
    model, method = objective(source, lora=0.3)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith((".weight", ".bias"))}
    optimizer = torch.optim.AdamW(method.parameter_groups())
    losses = []
    for iteration in range(60):
        loss = method.loss(model, 0, iteration)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_update()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapter_rates_are_per_layer_and_eight_bit_layers_have_no_adapters():
    model, method = objective(open_pipeline(tiny_pipeline()))
    groups = method.parameter_groups()
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = set()
    for _, layer in model.layers():
        if layer.lora_A is None:
            assert not any(id(p) in rates for p in layer.parameters())
            continue
        rate = 0.01 * layer.weight_scale.mean().item()
        assert rates[id(layer.lora_A)] == rates[id(layer.lora_B)] == pytest.approx(rate)
        expected.add(rate)
    assert len(expected) > 10


def test_staggered_items_are_at_different_steps_and_advance():
    _, method = objective(open_pipeline(tiny_pipeline()))
    method.loss(method.model, 0, 0)
    (pool,) = method.trajectories._pools
    # Eight items over four steps, each advanced by one step after the first loss.
    assert pool.position.tolist() == [1, 1, 2, 2, 3, 3, 0, 0]


def test_staggered_trajectories_follow_the_teacher():
    source = open_pipeline(tiny_pipeline())
    _, method = objective(source, eta=0.0)
    walked = method.trajectories
    pool = walked._new_pool(0)
    x = torch.randn((8, *source.sample_shape), generator=walked._generator(0, -1))
    for item, position in enumerate(pool.position.tolist()):
        y, conditions = x[item : item + 1], pool.conditions.take(slice(item, item + 1))
        for step in range(position):
            place = torch.tensor([step])
            y = walked.schedule.step(y, walked._teach(y, place, conditions), place)
        torch.testing.assert_close(pool.x[item : item + 1], y, rtol=1e-4, atol=1e-4)


def test_scales_stay_near_their_calibrated_values():
    model, method = objective(open_pipeline(tiny_pipeline()))
    name, layer = next(iter(model.layers()))
    with torch.no_grad():
        layer.activation.scale[0] = -5.0
        layer.activation.scale[1] = 99.0
    method.after_update()
    assert layer.activation.scale.tolist() == pytest.approx([0.05, 0.8, 0.2, 0.2]), name


def test_nan_in_training_names_the_layer(tmp_path):
    from accelerate import Accelerator

    from trtq.train.loop import fit

    model, method = objective(open_pipeline(tiny_pipeline()))
    name, layer = next((n, m) for n, m in model.layers() if "mid_block" in n and m.rank)
    with torch.no_grad():
        layer.lora_A.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=name):
        fit(
            model,
            method,
            iterations=1,
            accumulate=1,
            weight_decay=0.0,
            accelerator=Accelerator(cpu=True),
            checkpoints=None,
            checkpoint_every=1,
            fingerprint="",
        )


@pytest.mark.slow
def test_two_processes_equal_one_with_two_micro_batches(tmp_path):
    """Each micro-batch has a separate random stream, so both runs use the same eight images."""
    from diffusers import DDIMPipeline

    pipeline = tiny_pipeline()
    DDIMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path / "model")
    text = """
    method = "efficientdm"
    steps = 4
    calibration = {{ images = 8, samples_per_step = 256 }}

    [training]
    iterations = 4
    batch = 4
    rank = 4
    accumulate = {}
    checkpoint_every = 2
    lora_travel = 0.01
    activation_lr = 1e-4
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for processes, accumulate in ((1, 2), (2, 1)):
        path = tmp_path / f"{processes}.toml"
        path.write_text(text.format(accumulate))
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
        launch += ["--num_processes", str(processes), "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", "0", "-m", "trtq.cli", "quantize"]
        arguments = [tmp_path / "model", "-o", tmp_path / f"run{processes}", "--recipe", path]
        done = subprocess.run(
            [*launch, *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    single, double = (load_file(tmp_path / f"run{n}" / FILE) for n in (1, 2))
    assert single.keys() == double.keys()
    codes = [name for name in single if name.endswith("codes")]
    # A layer of 144 bytes cannot show a share of 2 %, so all layers count together.
    changed = torch.cat([(single[name] != double[name]).flatten() for name in codes])
    assert changed.float().mean() < 0.02
    for name, tensor in single.items():
        if name.endswith("codes"):
            # Rounding ties: a code differs by one level, in the low or the high half of a byte.
            assert set((tensor.int() - double[name].int()).abs().unique().tolist()) <= {
                0,
                1,
                15,
                16,
                17,
            }
        elif name.endswith("activation.scale"):
            # Adam turns a noisy gradient into a full update; four updates stay below this bound.
            torch.testing.assert_close(tensor, double[name], rtol=1e-3, atol=0)


def test_recomputed_blocks_give_the_same_loss_and_gradients():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model, _ = objective(open_pipeline(tiny_pipeline()))
        if recompute:
            assert recompute_blocks(model)
        trainable = [p for n, p in model.named_parameters() if "lora" in n or n.endswith(".scale")]
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        arguments = {
            "timestep": torch.tensor([1, 400, 900]),
            "class_labels": torch.tensor([0, 1, 2]),
        }
        out = model(x, **arguments).sample
        loss = (out - model.teacher(x, **arguments).sample).square().mean()
        torch.autograd.backward(loss)
        results.append((loss.item(), [p.grad.clone() for p in trainable if p.grad is not None]))
    (loss, gradients), (again, recomputed) = results
    assert loss == again
    assert len(gradients) == len(recomputed) > 50
    for expected, actual in zip(gradients, recomputed, strict=True):
        torch.testing.assert_close(expected, actual, rtol=0, atol=0)
