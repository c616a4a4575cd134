"""Files for ComfyUI: the integers of a run under the names of the authors, run by comfy-kitchen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import comfy_kitchen as ck
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.calls.zoo import ZOO
from tests.checkpoint import original_layout
from tests.families.pipelines import build
from tests.graph.test_fp8_nodes import fp8
from tests.graph.test_nvfp4_nodes import nvfp4
from trtq.checkpoint.tensor_file import open_tensor_file
from trtq.comfy.decode import decode
from trtq.comfy.encode import encode_int4, encode_int8, store_int4, store_int8
from trtq.comfy.formats import LayerFormat
from trtq.comfy.rotation import rotate
from trtq.diffusion.loading import open_pipeline
from trtq.errors import ArtefactError, UsageError
from trtq.exporter.comfy import export_comfy
from trtq.exporter.comfy_weights import comfy_weights
from trtq.exporter.export import export
from trtq.quant.deployed import DeployedLayer
from trtq.quant.formats.weight_only import GroupedWeight, WeightOnlyTensors
from trtq.quant.input_transform import TransformTensors
from trtq.quant.packing import PackedWeight
from trtq.quant.tensors import ActivationTensors, LayerTensors
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize

RECIPE = {
    "method": "minmax",
    "steps": 2,
    "smooth": False,
    "calibration": {"images": 2, "samples_per_step": 16},
}
BITS = {"sd_1": "w8a8", "flux": "w4a8", "dit": "w8a8"}
INT8 = "TensorWiseINT8Layout"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Per family: folder of the pipeline, run, and file for ComfyUI."""
    place = tmp_path_factory.mktemp("comfy")
    results = {}
    for name, bits in BITS.items():
        folder, run, file = place / f"{name}_model", place / name, place / f"{name}.safetensors"
        build(name).save_pretrained(folder)
        extra = {"attention": {"quantize": True}} if name == "sd_1" else {}
        quantize(folder, RECIPE | {"bits": bits} | extra, run)
        result = export(run, file, target="comfy")
        results[name] = SimpleNamespace(folder=folder, run=run, file=file, result=result)
    return results


def values_of(run):
    """The weights that a run computes with, by name in diffusers."""
    stored = open_run(run).stored
    values = dict(stored.floats)
    for name, layer in stored.layers.items():
        if isinstance(layer, LayerTensors):
            values[f"{name}.weight"] = layer.weight.dequantize()
            if layer.bias is not None:
                values[f"{name}.bias"] = layer.bias
    for path in open_run(run).denoisers[0].structure.splits:
        parts = [values.pop(f"{path}.parts.{index}.weight") for index in (0, 1)]
        values[f"{path}.weight"] = torch.cat(parts, 1)
        values[f"{path}.bias"] = values.pop(f"{path}.parts.0.bias")
    return values


@pytest.mark.parametrize("name", BITS)
def test_a_file_holds_the_weights_of_the_run_to_the_last_bit(name, made):
    """Read with the names that diffusers' conversion gives them, also for a Flux of other sizes."""
    this = made[name]
    state = open_pipeline(this.file, this.folder, recorded=True).denoiser.state_dict()
    expected = values_of(this.run)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    (file,) = this.result.files
    assert file.names == ("diffusers" if name == "dit" else "original")
    assert file.layers_quantized == file.formats["int8_tensorwise"]
    assert file.bytes == this.file.stat().st_size


def test_the_names_of_a_unet_are_those_of_latent_diffusion(made):
    unet = build("sd_1").unet
    unet.load_state_dict(values_of(made["sd_1"].run))
    expected = {f"model.diffusion_model.{n}": t for n, t in original_layout.unet(unet).items()}
    stored = open_tensor_file(made["sd_1"].file)
    tensors = stored.read(stored.header)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_the_codes_of_a_layer_are_the_runs_integers(made):
    run, tensors = open_run(made["sd_1"].run).stored, load_file(made["sd_1"].file)
    place = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    weight = run.layers["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"].weight
    assert torch.equal(tensors[f"{place}.weight"], weight.integers())
    assert torch.equal(tensors[f"{place}.weight_scale"], weight.scale)
    assert json.loads(bytes(tensors[f"{place}.comfy_quant"].tolist())) == {
        "format": "int8_tensorwise"
    }


def test_joined_and_swapped_layers_of_flux_keep_their_integers(made):
    """4-bit weights, whose integers with a zero point are int8 values without one."""
    run, tensors = open_run(made["flux"].run).stored, load_file(made["flux"].file)
    layers = [run.layers[f"transformer_blocks.0.attn.to_{part}"].weight for part in "qkv"]
    name = "double_blocks.0.img_attn.qkv"
    assert torch.equal(tensors[f"{name}.weight"], torch.cat([w.integers() for w in layers]))
    assert torch.equal(tensors[f"{name}.weight_scale"], torch.cat([w.scale for w in layers]))
    swapped = run.layers["norm_out.linear"].weight
    shift, scale = tensors["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(torch.cat([scale, shift]), swapped.integers())
    shift, scale = tensors["final_layer.adaLN_modulation.1.weight_scale"].chunk(2)
    assert torch.equal(torch.cat([scale, shift]), swapped.scale)


class RowScaled(nn.Module):
    """Our own forward of an integer layer with one scale per row of its input."""

    def __init__(self, codes, scale, bias, rotation):
        super().__init__()
        self.codes, self.scale, self.bias, self.rotation = codes, scale, bias, rotation

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        turned = rotate(rows, self.rotation) if self.rotation else rows
        step = (turned.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        product = (turned / step).round() @ self.codes.float().T
        out = product * (step * self.scale.T)
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], -1)


def run_by_comfy_kitchen(model, entries, tensors):
    """Put the file's layers into a model as comfy-kitchen's tensors; `entries`: file's name by ours."""
    for ours, theirs in entries.items():
        entry = json.loads(bytes(tensors[f"{theirs}.comfy_quant"].tolist()))
        codes = tensors[f"{theirs}.weight"]
        params = get_layout_class(INT8).Params(
            scale=tensors[f"{theirs}.weight_scale"],
            orig_dtype=torch.float32,
            orig_shape=tuple(codes.shape),
            **{key: value for key, value in entry.items() if key != "format"},
        )
        module = model.get_submodule(ours)
        module.weight = nn.Parameter(QuantizedTensor(codes, INT8, params), requires_grad=False)
    return model


def own_forward(model, entries, tensors, rotation=0):
    """Put `RowScaled` layers into a model."""
    for ours, theirs in entries.items():
        parent, _, leaf = ours.rpartition(".")
        bias = model.get_submodule(ours).bias
        weight, scale = tensors[f"{theirs}.weight"], tensors[f"{theirs}.weight_scale"]
        owner = model.get_submodule(parent)
        new = RowScaled(weight, scale, bias, rotation)
        if leaf.isdigit():
            owner[int(leaf)] = new
        else:
            setattr(owner, leaf, new)
    return model


def unet_entries(unet, tensors):
    """Name in the file of each quantised layer of a UNet, by its name in diffusers."""
    places = {tensor.data_ptr(): name for name, tensor in original_layout.unet(unet).items()}
    linears = {
        name: f"model.diffusion_model.{places[module.weight.data_ptr()].removesuffix('.weight')}"
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear)
    }
    return {ours: name for ours, name in linears.items() if f"{name}.comfy_quant" in tensors}


@torch.no_grad()
def test_comfy_kitchen_runs_the_file_as_our_own_forward(made):
    this, tensors = made["sd_1"], load_file(made["sd_1"].file)
    unets = [open_pipeline(this.file, this.folder).denoiser for _ in range(3)]
    entries = unet_entries(unets[0], tensors)
    assert len(entries) == this.result.files[0].layers_quantized
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 64, generator=generator)
    expected = own_forward(unets[0], entries, tensors)(x, 500, text).sample
    with ck.registry.use_backend("eager"):
        theirs = run_by_comfy_kitchen(unets[1], entries, tensors)(x, 500, text).sample
    assert torch.allclose(theirs, expected, rtol=1e-5, atol=1e-6)
    # Integers are close to floats, and not equal to them.
    floats = unets[2](x, 500, text).sample
    assert 1e-6 < float((theirs - floats).norm() / floats.norm()) < 0.05


def test_what_the_file_does_not_hold_is_said(made):
    (unet,), (flux,), (dit,) = (made[name].result.files for name in BITS)
    assert "scales per denoising step are not in the file" in unet.notes[0]
    assert "low-bit convolutions are in float" in unet.notes[1]
    assert "low-bit products of attention" in unet.notes[2]
    assert len(flux.notes) == 1
    assert "for a DiTTransformer2DModel, diffusers has no table" in dit.notes[-1]
    with safe_open(made["dit"].file, "pt") as file:
        metadata = json.loads(file.metadata()["trtq"])
    assert metadata == {"run": "dit", "notes": dit.notes}


def test_equal_runs_give_equal_files(made, tmp_path):
    again = tmp_path / "again.safetensors"
    export_comfy(made["flux"].run, again)
    assert again.read_bytes() == made["flux"].file.read_bytes()


def test_half_precision_keeps_integers_and_scales(made, tmp_path):
    half = tmp_path / "half.safetensors"
    export_comfy(made["sd_1"].run, half, precision="fp16")
    assert half.stat().st_size < 0.8 * made["sd_1"].file.stat().st_size
    whole, halved = load_file(made["sd_1"].file), load_file(half)
    for name, tensor in whole.items():
        if tensor.dtype == torch.float32 and not name.endswith("weight_scale"):
            assert halved[name].dtype == torch.float16
            assert torch.equal(halved[name], tensor.half())
        else:
            assert torch.equal(halved[name], tensor)


def test_a_folder_gets_a_file_of_the_runs_name_and_keeps_its_files(made, tmp_path):
    folder = tmp_path / "models"
    (result,) = export_comfy(made["flux"].run, folder).files
    assert [path.name for path in folder.iterdir()] == ["flux.safetensors"]
    assert result.path == str(folder / "flux.safetensors")
    (folder / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        export_comfy(made["flux"].run, folder)
    export_comfy(made["flux"].run, folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["flux.safetensors", "mine.safetensors"]
    assert (folder / "mine.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["sd_1", "flux"])
def test_quantising_a_file_takes_its_8_bit_codes_over(name, made, tmp_path):
    """A file of `int8` with one scale per output is quantised to the same codes with `minmax`."""
    this, run = made[name], tmp_path / "run"
    quantize(this.file, RECIPE | {"bits": "w8a8"}, run, config=this.folder)
    first, second = open_run(this.run).stored.layers, open_run(run).stored.layers
    compared = 0
    for layer, tensors in second.items():
        if not isinstance(tensors, LayerTensors) or layer not in first:
            continue
        before = first[layer].weight
        if before.bits == 8 and tensors.weight.bits == 8:
            assert torch.equal(before.integers(), tensors.weight.integers()), layer
            assert torch.allclose(before.scale, tensors.weight.scale, rtol=1e-6)
            compared += 1
    assert compared >= (20 if name == "sd_1" else 3)


def test_a_missing_or_wrong_tensor_of_a_joined_layer_is_named(made, tmp_path):
    tensors, folder = load_file(made["flux"].file), made["flux"].folder
    name = "double_blocks.0.img_attn.qkv"
    lacking = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(ArtefactError, match=r"missing: 'transformer_blocks\.0\.attn\.to_k\.bias'"):
        open_pipeline(tmp_path / "lacking.safetensors", folder, recorded=True)
    longer = tensors | {f"{name}.bias": torch.zeros(100)}
    save_file(longer, tmp_path / "longer.safetensors")
    with pytest.raises(ArtefactError, match=r"to_v\.bias' is \(36,\), expected \(32,\)"):
        open_pipeline(tmp_path / "longer.safetensors", folder, recorded=True)


def rotated(tensors, group, store, encode):
    """Tensors of a file with all matrices that a rotation fits quantised."""
    changed, layers = {}, {}
    for name, tensor in tensors.items():
        fits = (
            tensor.ndim == 2 and name.endswith(".weight") and tensor.shape[1] % max(group, 64) == 0
        )
        if fits:
            layers[name] = store(encode(tensor, group))
            changed |= layers[name].entries(name.removesuffix(".weight"))
        else:
            changed[name] = tensor
    return changed, layers


@pytest.mark.parametrize(
    ("group", "store", "encode"),
    [(16, store_int8, encode_int8), (64, store_int8, encode_int8), (64, store_int4, encode_int4)],
    ids=["int8 16", "int8 64", "int4 64"],
)
def test_a_rotated_file_opens_as_what_comfy_kitchen_dequantises(
    group, store, encode, made, tmp_path
):
    pipeline = build("sd_1")
    tensors = {
        f"model.diffusion_model.{n}": t.detach().clone().contiguous()
        for n, t in original_layout.unet(pipeline.unet).items()
    }
    changed, layers = rotated(tensors, group, store, encode)
    assert len(layers) >= 4
    save_file(changed, tmp_path / "x.safetensors")
    opened = open_pipeline(tmp_path / "x.safetensors", made["sd_1"].folder)
    state = {
        f"model.diffusion_model.{n}": t for n, t in original_layout.unet(opened.denoiser).items()
    }
    layout = INT8 if store is store_int8 else "TensorCoreConvRotW4A4Layout"
    for name, tensor in tensors.items():
        if name not in layers:
            assert torch.equal(state[name], tensor)
            continue
        options = {"convrot": True} if layout == INT8 else {}
        params = get_layout_class(layout).Params(
            scale=layers[name].tensors["weight_scale"],
            orig_dtype=torch.float32,
            orig_shape=tuple(tensor.shape),
            convrot_groupsize=group,
            **options,
        )
        with ck.registry.use_backend("eager"):
            theirs = QuantizedTensor(layers[name].tensors["weight"], layout, params).dequantize()
        assert torch.equal(state[name], theirs)


def layer(weight, *, bits=8, rotation=0, inverse=None):
    """The tensors of a low-bit layer, perhaps with a transform of its input."""
    codes = encode_int8(weight).integers if bits == 8 else encode_int4(weight, 16).integers
    scale = torch.rand(len(weight), 1) + 0.5
    middle = 2 ** (bits - 1)
    packed = PackedWeight.of(
        (codes.int() + middle).to(torch.uint8), scale, torch.full_like(scale, middle), bits
    )
    table = torch.ones(1)
    activation = ActivationTensors(table, table, -table.int(), table.int(), bits)
    return LayerTensors(packed, activation, None, TransformTensors(inverse, rotation))


def weights_of(**layers):
    return comfy_weights("NoSuchModel", {}, layers, {}, {})


def test_rotated_layers_of_a_run_are_written_with_their_rotation():
    turned, small = (
        layer(torch.randn(8, 64), rotation=16),
        layer(torch.randn(8, 64), bits=4, rotation=64),
    )
    plain, odd = layer(torch.randn(8, 64), bits=4), layer(torch.randn(8, 48), bits=4, rotation=16)
    made = weights_of(a=turned, b=small, c=plain, d=odd)
    names = {
        name: (stored.format.name, stored.format.rotation) for name, stored in made.layers.items()
    }
    assert names == {
        "a": ("int8_tensorwise", 16),
        "b": ("convrot_w4a4", 64),
        "c": ("int8_tensorwise", 0),
        "d": ("int8_tensorwise", 16),
    }
    assert torch.equal(made.layers["a"].tensors["weight"], turned.weight.integers())
    assert torch.equal(made.layers["d"].tensors["weight"], odd.weight.integers())


def weight_only(bits, group):
    """The tensors of a weight-only layer."""
    codes = torch.randint(0, 2**bits, (8, 64), generator=torch.Generator().manual_seed(bits))
    scale = (torch.rand(8, 64 // group if group else 1) + 0.5).half().float()
    middle = torch.full_like(scale, 2 ** (bits - 1))
    return WeightOnlyTensors(
        GroupedWeight.of(codes.to(torch.uint8), scale, middle, bits, group=group), None
    )


def test_weight_only_layers_keep_their_codes_and_a_float_input():
    layers = {"a": weight_only(4, 32), "b": weight_only(8, None), "c": weight_only(8, 32)}
    made = weights_of(**layers)
    assert made.layers["a"].format == LayerFormat("awq_w4a16", group=32)
    assert made.layers["b"].format == LayerFormat("int8_tensorwise", float_input=True)
    for name in "ab":
        assert torch.equal(decode(made.layers[name]), layers[name].weight.dequantize())
    assert torch.equal(made.floats["c.weight"], layers["c"].weight.dequantize())


def turned_back(tensors):
    """The weight that a layer of a run computes with, without its transform."""
    weight = tensors.weight.dequantize()
    if tensors.transform is None:
        return weight
    rotation, inverse = tensors.transform.rotation, tensors.transform.inv_channels
    weight = rotate(weight, rotation) if rotation else weight
    return weight if inverse is None else weight * inverse


def test_float_formats_and_groups_of_8_bits_are_written_in_float_without_their_transform():
    transform = TransformTensors(torch.tensor([1, 0.5, 4, 0.125] * 16), 16)
    layers = {"a": fp8(torch.nn.Linear(64, 8)), "b": nvfp4(), "c": weight_only(8, 32)}
    layers = {name: replace(tensors, transform=transform) for name, tensors in layers.items()}
    made = weights_of(**layers)
    assert made.layers == {}
    for name, tensors in layers.items():
        torch.testing.assert_close(made.floats[f"{name}.weight"], turned_back(tensors))


@pytest.mark.parametrize("smooth", [False, True])
def test_a_rotated_run_is_written_rotated(smooth, made, tmp_path):
    run, file = tmp_path / "run", tmp_path / "x.safetensors"
    recipe = {"bits": "w8a8", "rotate": 16, "scales": "row", "smooth": smooth}
    quantize(made["flux"].folder, RECIPE | recipe, run)
    (result,) = export(run, file, target="comfy").files
    layers, tensors = open_run(run).stored.layers, load_file(file)
    state = open_pipeline(file, made["flux"].folder, recorded=True).denoiser.state_dict()
    assert any(
        tensors.transform is not None and tensors.transform.rotation for tensors in layers.values()
    )
    for name, layer_tensors in layers.items():
        expected, transform = turned_back(layer_tensors), layer_tensors.transform
        if transform is None or transform.inv_channels is None:
            assert torch.equal(state[f"{name}.weight"], expected)
        else:
            error = (state[f"{name}.weight"] - expected).norm() / expected.norm()
            assert float(error) < 0.01
    assert ("quantised again" in " ".join(result.notes)) == smooth
    entries = [bytes(t.tolist()) for n, t in tensors.items() if n.endswith("comfy_quant")]
    assert smooth or any(b'"convrot_groupsize": 16' in entry for entry in entries)


@torch.no_grad()
@pytest.mark.parametrize("rotation", [0, 16])
def test_comfy_kitchen_computes_a_rotated_layer_as_the_run_with_scales_per_row(rotation):
    """Codes agree; a scale per row may differ in its last bit, since a run multiplies by 1 / 127."""
    weight = layer(torch.randn(48, 64), rotation=rotation)
    activation = replace(weight.activation, policy="row", low=-127 * torch.ones(1).int())
    activation = replace(activation, high=127 * torch.ones(1).int())
    run = DeployedLayer(replace(weight, activation=activation, bias=torch.randn(48)), None)
    x = torch.randn(32, 64) * 3
    with ck.registry.use_backend("eager"):
        theirs = ck.int8_linear(
            x,
            weight.weight.integers(),
            weight.weight.scale,
            run.bias,
            torch.float32,
            convrot=bool(rotation),
            convrot_groupsize=rotation or 256,
        )
    torch.testing.assert_close(
        run(x, torch.zeros(1, dtype=torch.long)), theirs, rtol=1e-5, atol=1e-4
    )


def test_smoothing_is_undone_and_said():
    inverse = torch.tensor([1, 0.5, 4, 0.125] * 16)
    smooth = layer(torch.randn(8, 64), rotation=16, inverse=inverse)
    made = weights_of(a=smooth)
    assert made.requantized == ["a"]
    expected = rotate(smooth.weight.dequantize(), 16) * inverse
    again = made.layers["a"]
    decoded = rotate(again.tensors["weight"].float() * again.tensors["weight_scale"], 16)
    assert float((decoded - expected).norm() / expected.norm()) < 0.02


def test_a_run_with_two_denoisers_gives_two_files(tmp_path):
    """Wan 2.2, recorded inside its pipeline's call."""
    case, run = ZOO["wan_22"], tmp_path / "wan"
    quantize(case.pipeline(), RECIPE | {"bits": "w8a8"}, run, calls=[case.arguments()])
    with pytest.raises(
        UsageError, match="transformer, transformer_2, one file each; give a folder"
    ):
        export(run, tmp_path / "x.safetensors", target="comfy")
    result = export(run, tmp_path / "out", target="comfy")
    names = [f"wan-{name}.safetensors" for name in ("transformer", "transformer_2")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for file, part in zip(result.files, open_run(run).denoisers, strict=True):
        assert file.names == "original"
        codes = load_file(file.path)["blocks.1.self_attn.q.weight"]
        assert torch.equal(codes, part.stored.layers["blocks.1.attn1.to_q"].weight.integers())


@pytest.mark.parametrize("name", ["float", "name"])
def test_only_a_run_is_exported(name, made, tmp_path):
    place = {"float": made["sd_1"].folder, "name": "digits"}[name]
    with pytest.raises(UsageError, match="a file for ComfyUI is made of a run"):
        export(place, tmp_path / "x.safetensors", target="comfy")
    assert not list(tmp_path.iterdir())


def test_wrong_options_are_refused_and_nothing_is_written(made, tmp_path):
    run = made["flux"].run
    with pytest.raises(UsageError, match="no image size and no call"):
        export(run, tmp_path / "x.safetensors", target="comfy", size="16x16")
    with pytest.raises(UsageError, match="unknown precision 'int4'; choose one of fp32, fp16"):
        export_comfy(run, tmp_path / "x.safetensors", precision="int4")
    with pytest.raises(UsageError, match="choose one of qdq, plugin, comfy"):
        export(run, tmp_path / "x", target="comfyui")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is not a folder"):
        export_comfy(run, tmp_path / "file")
    with pytest.raises(UsageError, match="lies inside"):
        export_comfy(run, made["sd_1"].run / "comfy")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_value_that_half_precision_cannot_hold_is_named(made, tmp_path):
    folder = shutil.copytree(made["flux"].folder, tmp_path / "model")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["x_embedder.bias"][0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    quantize(folder, RECIPE | {"bits": "w8a8"}, tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"'img_in\.bias' holds values that fp16 cannot"):
        export_comfy(tmp_path / "run", tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_and_reads_a_file(made, tmp_path):
    from typer.testing import CliRunner

    from trtq.cli import app

    file = tmp_path / "flux.safetensors"
    arguments = ["export", str(made["flux"].run), "--target", "comfy", "-o", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)["files"]
    assert entry["path"] == str(file)
    assert entry["names"] == "original"
    result = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert result.exit_code == 0, result.output
    assert "int8_tensorwise" in result.stdout
    config = ["--config", str(made["flux"].folder)]
    result = CliRunner().invoke(app, ["inspect", str(file), *config, "--json"])
    assert result.exit_code == 0, result.output
