"""Files whose layers ComfyUI quantised: opened as floats, or refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.original_layout import tensors_of, unet
from tests.families.pipelines import build
from trtq.checkpoint.tensor_file import open_tensor_file
from trtq.comfy.encode import encode_fp8, encode_int8, encode_nvfp4, store_int8
from trtq.diffusion.loading import open_pipeline
from trtq.errors import ArtefactError, TrtqError
from trtq.runs.quantize import quantize

PREFIX = "model.diffusion_model."
LAYER = f"{PREFIX}time_embed.2"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline, the folder of its configurations, and its tensors in the original layout."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    pipeline = build("sd_1")
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    tensors = {n: t.detach().clone().contiguous() for n, t in tensors_of(pipeline).items()}
    return folder, tensors


@pytest.fixture
def written(made, tmp_path):
    """A function that writes the file with changed tensors and metadata."""
    folder, tensors = made

    def write(change, metadata=None):
        changed = dict(tensors)
        change(changed)
        save_file(changed, tmp_path / "x.safetensors", metadata)
        return tmp_path / "x.safetensors", folder

    return write


def refusal(file, folder):
    with pytest.raises(TrtqError) as caught:
        open_pipeline(file, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, ArtefactError)
    return message


def state_of(pipeline):
    """The tensors of a pipeline by their names in the original layout."""
    tensors = tensors_of(pipeline)
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def test_every_component_may_be_quantised(made, written, caplog):
    """Also text encoders, as in whole checkpoints, and each layer in a format of its own."""
    _, tensors = made
    expected = {}

    def change(changed):
        for index, name in enumerate(sorted(n for n in tensors if n.startswith(PREFIX))):
            weight = changed[name]
            if weight.ndim != 2:
                continue
            if index % 2 and all(size % 16 == 0 for size in weight.shape):
                stored = encode_nvfp4(weight)
            else:
                stored = store_int8(encode_int8(weight))
            changed.pop(name)
            changed.update(stored.entries(name.removesuffix(".weight")))
            expected[name] = stored
        changed.pop(f"{TEXT}.weight")
        expected[f"{TEXT}.weight"] = encode_fp8(tensors[f"{TEXT}.weight"])
        changed.update(expected[f"{TEXT}.weight"].entries(TEXT))
        changed[f"{TEXT}.input_scale"] = torch.tensor(0.5)
        changed[f"{PREFIX}out.comfy_attention.config"] = torch.zeros(3, dtype=torch.uint8)

    from trtq.comfy.decode import decode

    file, folder = written(change)
    state = state_of(open_pipeline(file, folder).pipeline)
    assert f"{len(expected)} layers are quantised" in caplog.text
    assert "1 in float8_e4m3fn" in caplog.text
    kinds = {stored.format.name for stored in expected.values()}
    assert kinds == {"nvfp4", "int8_tensorwise", "float8_e4m3fn"}
    for name, stored in expected.items():
        assert torch.equal(state[name], decode(stored)), name
    formats = open_tensor_file(file).formats
    assert formats[TEXT] == "float8_e4m3fn"
    assert len(formats) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_the_older_form_of_float8_files_is_read(dtype, made, written):
    weight = made[1][f"{LAYER}.weight"]
    scale = weight.abs().max() / torch.finfo(dtype).max
    codes = (weight / scale).to(dtype)

    def change(tensors):
        tensors[f"{LAYER}.weight"] = codes
        tensors[f"{LAYER}.scale_weight"] = scale
        tensors[f"{LAYER}.scale_input"] = torch.tensor(2.0)
        tensors[f"{PREFIX}scaled_fp8"] = torch.zeros(2, dtype=dtype)

    state = state_of(open_pipeline(*written(change)).pipeline)
    assert torch.equal(state[f"{LAYER}.weight"], codes.float() * scale)


def test_layers_that_the_metadata_describes_are_read(made, written):
    stored = encode_fp8(made[1][f"{LAYER}.weight"])

    def change(tensors):
        tensors[f"{LAYER}.weight"] = stored.tensors["weight"]
        tensors[f"{LAYER}.weight_scale"] = stored.tensors["weight_scale"]

    described = {"format_version": "1.0", "layers": {LAYER: {"format": "float8_e4m3fn"}}}
    metadata = {"_quantization_metadata": json.dumps(described)}
    state = state_of(open_pipeline(*written(change, metadata)).pipeline)
    expected = stored.tensors["weight"].float() * stored.tensors["weight_scale"]
    assert torch.equal(state[f"{LAYER}.weight"], expected)


def int8(tensors, **changes):
    """Quantise a layer; `changes` replace its tensors, None removes one."""
    named = store_int8(encode_int8(tensors.pop(f"{LAYER}.weight"))).entries(LAYER)
    tensors.update(named)
    for leaf, tensor in changes.items():
        tensors.pop(f"{LAYER}.{leaf}", None)
        if tensor is not None:
            tensors[f"{LAYER}.{leaf}"] = tensor


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight_scale": None},
            "its format int8_tensorwise needs 'weight_scale', which the file lacks",
        ),
        ({"weight": None}, "needs 'weight', which the file lacks"),
        (
            {"comfy_quant": text('{"format": "asym_w4a8_int8"}')},
            "its format is 'asym_w4a8_int8', which trtq does",
        ),
        ({"comfy_quant": text('{"format": "nvfp4"}')}, "needs 'weight_scale_2'"),
        ({"comfy_quant": text("nonsense")}, "entry is not JSON"),
        ({"comfy_quant": text('{"format": "float8_e4m3fn"}')}, "its codes are I8 [32, 32], but"),
        (
            {"comfy_quant": text('{"format": "int8_tensorwise", "convrot": true}')},
            "its rotation of 256 channels does not fit a weight [32, 32]",
        ),
        ({"weight_scale": torch.ones(7)}, "1 or 32 floating-point numbers are required"),
        (
            {"weight_scale": torch.full((32, 1), torch.inf)},
            "holds inf, which is no positive number",
        ),
        ({"weight": torch.zeros(32, 16, dtype=torch.int8)}, "have another shape"),
        ({"comfy_quant": None}, "are not floating-point numbers"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_damaged_layer_is_named(changes, message, written):
    refused = refusal(*written(lambda tensors: int8(tensors, **changes)))
    assert message in refused
    assert "time_embed" in refused or "time_embedding" in refused


@pytest.mark.parametrize(
    "described",
    ["{", "[]", '{"layers": []}', '{"layers": {"a": 1}}', '{"format_version": "1.0"}', "9" * 5000],
)
def test_damaged_metadata_is_refused(described, written):
    file, folder = written(lambda tensors: None, {"_quantization_metadata": described})
    assert "does not describe layers" in refusal(file, folder)


def test_a_file_of_another_model_is_refused_and_no_run_is_written(made, tmp_path):
    folder, _ = made
    other = {f"{PREFIX}{n}": t.detach().contiguous() for n, t in unet(build("sd_xl").unet).items()}
    name = f"{PREFIX}input_blocks.3.1.proj_in"
    other |= store_int8(encode_int8(other.pop(f"{name}.weight"))).entries(name)
    save_file(other, tmp_path / "x.safetensors")
    recipe = {"method": "minmax", "bits": "w8a8", "steps": 2}
    with pytest.raises(ArtefactError, match="another architecture") as caught:
        quantize(tmp_path / "x.safetensors", recipe, tmp_path / "run", config=folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_of_float_layers_is_read_as_before(made, written):
    file, _ = written(lambda tensors: None)
    opened = open_tensor_file(file)
    assert opened.formats == {}
    assert opened.header.keys() == made[1].keys()
    copy = shutil.copy(file, file.with_name("y.safetensors"))
    name = f"{LAYER}.weight"
    assert torch.equal(open_tensor_file(copy).read([name])[name], made[1][name])
