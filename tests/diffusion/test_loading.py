"""Folders of many kinds, intact or damaged, are loaded correctly or refused in one line."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.pipelines import PIPELINES, build
from trtq.diffusion.loading import open_pipeline
from trtq.errors import ArtefactError, NonFiniteError, TrtqError, UsageError

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    build("sd_1").save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    return folder


def edit_tensors(model, file, change):
    tensors = load_file(model / file)
    save_file(change(tensors) or tensors, model / file, metadata={"format": "pt"})


def edit_json(model, file, **changes):
    document = json.loads((model / file).read_text())
    document.update(changes)
    (model / file).write_text(json.dumps(document))


def refusal(model, error=TrtqError):
    with pytest.raises(error) as caught:
        open_pipeline(model)
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) is not TrtqError
    return message


def test_loaded_tensors_equal_those_in_the_files(saved):
    loaded = open_pipeline(saved)
    for part, file in (("unet", UNET), ("text_encoder", TEXT), ("vae", VAE)):
        state = getattr(loaded.pipeline, part).state_dict()
        held = load_file(saved / file)
        assert state.keys() >= {n for n in held if n in state}
        for name in state.keys() & held.keys():
            assert torch.equal(state[name], held[name])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_each_family_passes_the_checks(name, tmp_path):
    pipeline = build(name)
    pipeline.save_pretrained(tmp_path)
    loaded = open_pipeline(tmp_path)
    expected = getattr(pipeline, loaded.denoiser_name).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.denoiser.state_dict().items())


@pytest.mark.parametrize("file", [UNET, TEXT, VAE])
@pytest.mark.parametrize("kind", ["missing", "stray", "shape"])
def test_tensors_that_do_not_fit_are_named(file, kind, model):
    name = sorted(n for n in load_file(model / file) if n.endswith("weight"))[0]

    def change(tensors):
        if kind == "missing":
            del tensors[name]
        elif kind == "stray":
            tensors["of_another.weight"] = torch.zeros(2)
        else:
            tensors[name] = torch.zeros(*tensors[name].shape, 2)

    edit_tensors(model, file, change)
    message = refusal(model, ArtefactError)
    assert file.partition("/")[0] in message
    assert ("of_another.weight" if kind == "stray" else name.split(".")[-2]) in message


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "model.", "unet.", "_orig_mod.module."]
)
@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_prefixed_names_are_refused_with_a_remedy(prefix, file, model):
    edit_tensors(model, file, lambda tensors: {prefix + n: t for n, t in tensors.items()})
    message = refusal(model, ArtefactError)
    assert repr(prefix) in message
    assert "removeprefix" in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("file", [UNET, TEXT])
def test_weights_that_are_not_floats_are_refused(dtype, file, model):
    name = next(n for n, t in load_file(model / file).items() if t.ndim == 2)
    edit_tensors(model, file, lambda t: t.update({name: t[name].to(dtype)}))
    assert "not floating-point" in refusal(model, ArtefactError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("file", [UNET, TEXT, VAE])
def test_weights_that_are_not_finite_are_named(value, file, model):
    name = next(n for n, t in load_file(model / file).items() if t.ndim >= 2)
    edit_tensors(model, file, lambda t: t[name].view(-1)[3:4].fill_(value) and None)
    assert name.split(".")[-2] in refusal(model, NonFiniteError)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_float_weights_are_read_as_float32(dtype, model):
    held = {}
    for file in (UNET, TEXT, VAE):
        edit_tensors(model, file, lambda t: {n: v.to(dtype) for n, v in t.items()})
        held[file] = load_file(model / file)
    loaded = open_pipeline(model)
    for name, tensor in loaded.denoiser.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, held[UNET][name].float())


def test_an_only_variant_is_read_with_a_warning(saved, tmp_path, caplog):
    model = tmp_path / "model"
    build("sd_1").save_pretrained(model, variant="fp16")
    loaded = open_pipeline(model)
    assert "reading the variant 'fp16', the only one present" in caplog.text
    expected = open_pipeline(saved).denoiser.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.denoiser.state_dict().items())
    other = model / "unet/diffusion_pytorch_model.bf16.safetensors"
    shutil.copy(model / "unet/diffusion_pytorch_model.fp16.safetensors", other)
    assert "bf16, fp16" in refusal(model, ArtefactError)


def test_a_plain_file_takes_precedence_over_variants(model, caplog):
    shutil.copy(model / UNET, model / "unet/diffusion_pytorch_model.fp16.safetensors")
    open_pipeline(model)
    assert "variant" not in caplog.text


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_and_a_missing_shard_is_named(variant, saved, tmp_path):
    model = tmp_path / "model"
    build("sd_1").save_pretrained(model, max_shard_size="40KB", variant=variant)
    shards = sorted((model / "unet").glob("*-of-*"))
    assert len(shards) > 1
    expected = open_pipeline(saved).denoiser.state_dict()
    state = open_pipeline(model).denoiser.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    shards[1].unlink()
    assert shards[1].name in refusal(model, ArtefactError)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight_map": {}},
        {"weight_map": {"conv_in.weight": "../../secret.safetensors"}},
        {"weight_map": {"conv_in.weight": "none.safetensors"}},
        {"weight_map": {"conv_in.weight": 3}},
        [],
    ],
    ids=["nothing", "empty", "outside", "absent", "number", "list"],
)
def test_an_invalid_index_of_shards_is_refused(content, model):
    index = model / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(content))
    assert "index.json" in refusal(model, ArtefactError)


def test_pickles_are_refused_with_code_to_convert_them(tmp_path):
    model = tmp_path / "model"
    build("sd_1").save_pretrained(model, safe_serialization=False)
    message = refusal(model, ArtefactError)
    assert "pickle" in message
    assert "safe_serialization=True" in message


@pytest.mark.parametrize(
    "file", [UNET, TEXT, "unet/config.json", "tokenizer/tokenizer.json", "model_index.json"]
)
def test_pointers_of_git_lfs_are_named(file, model):
    (model / file).write_text(POINTER)
    message = refusal(model, ArtefactError)
    assert "Git LFS pointer" in message
    assert file.rpartition("/")[2] in message


@pytest.mark.parametrize("suffix", [".ckpt", ".gguf", ".PT", ".pt", ".bin"])
@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
def test_single_files_of_other_formats_are_refused_with_code_to_convert_them(
    suffix, inside, tmp_path
):
    file = tmp_path / f"dream{suffix}"
    save_file({"model.diffusion_model.x.weight": torch.zeros(2)}, file)
    message = refusal(tmp_path if inside else file, ArtefactError)
    assert "single-file" in message
    if suffix == ".gguf":
        assert "already quantised" in message
    else:
        assert "can run any code" in message
        assert "from diffusers import" in message
        assert f"from_single_file({str(file)!r}).save_pretrained('FOLDER')" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".SAFETENSORS", ".sft"])
def test_a_folder_around_a_single_file_is_refused_with_the_path_of_the_file(suffix, tmp_path):
    file = tmp_path / f"dream{suffix}"
    save_file({"model.diffusion_model.x.weight": torch.zeros(2)}, file)
    (tmp_path / "another.ckpt").write_bytes(b"x")
    assert f"give the file itself: {file}" in refusal(tmp_path, ArtefactError)


def test_a_lora_given_as_the_model_is_recognised(tmp_path):
    file = tmp_path / "style.safetensors"
    save_file(
        {"unet.a.lora_A.weight": torch.zeros(2), "unet.a.lora_B.weight": torch.zeros(2)}, file
    )
    assert "--lora" in refusal(file, ArtefactError)


def header_of(file):
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def damage(kind, file):
    header, data = header_of(file)
    name = next(n for n in header if n != "__metadata__")
    entry = header[name]
    if kind == "offset":
        entry["data_offsets"] = [10**12, 10**12 + entry["data_offsets"][1]]
    elif kind == "shape":
        entry["shape"] = [*entry["shape"], 10**6]
    elif kind == "negative":
        entry["shape"] = [-1]
    elif kind == "dtype":
        entry["dtype"] = "F3"
    elif kind == "list":
        header[name] = [1, 2]
    elif kind == "deep":
        return write_header(file, b"[" * 100_000, data)
    elif kind == "twice":
        raw = json.dumps(header)[:-1] + f', "{name}": {json.dumps(entry)}}}'
        return write_header(file, raw.encode(), data)
    elif kind == "text":
        return file.write_text("<html>404</html> and more text")
    elif kind == "empty":
        return file.write_bytes(b"")
    elif kind == "short":
        return file.write_bytes(b"\0" * 9)
    elif kind == "huge":
        return file.write_bytes(struct.pack("<Q", 2**62) + b"{}" * 20)
    elif kind == "cut":
        return file.write_bytes(file.read_bytes()[:-100])
    elif kind == "pickle":
        return torch.save({"a": torch.zeros(3)}, file)
    return write_header(file, header, data)


@pytest.mark.parametrize("file", [UNET, TEXT])
@pytest.mark.parametrize(
    "kind",
    [
        "offset",
        "shape",
        "negative",
        "dtype",
        "list",
        "deep",
        "twice",
        "text",
        "empty",
        "short",
        "huge",
        "cut",
        "pickle",
    ],
)
def test_damaged_safetensors_are_refused_by_name(kind, file, model):
    damage(kind, model / file)
    assert file in refusal(model, ArtefactError)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "scheduler", "tokenizer"])
def test_a_missing_folder_is_named(part, model):
    shutil.rmtree(model / part)
    message = refusal(model, ArtefactError)
    assert repr(part) in message
    assert "[null, null]" in message


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_missing_weights_and_configurations_are_named(part, model):
    (model / part / "config.json").unlink()
    assert "config.json" in refusal(model, ArtefactError)
    shutil.rmtree(model / part)
    (model / part).mkdir()
    assert part in refusal(model, ArtefactError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "NoSuchPipeline"}, "diffusers does not have"),
        ({"_class_name": "UNet2DModel"}, "diffusers does not have"),
        ({"_class_name": ["my_pipeline", "Mine"]}, "custom pipeline"),
        ({"_class_name": None}, "name of a pipeline"),
        ({"_class_name": 3}, "name of a pipeline"),
        ({"_class_name": {}}, "name of a pipeline"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "NoSuchModel"),
        ({"unet": ["my_code", "Mine"]}, "my_code"),
        ({"unet": ["os", "system"]}, "only diffusers and transformers"),
        ({"unet": ["diffusers", None]}, "null"),
        ({"unet": [None, None]}, "no denoiser"),
        ({"unet": ["diffusers", "StableDiffusionPipeline"]}, "as its component"),
        ({"text_encoder": ["transformers", "NoSuchEncoder"]}, "NoSuchEncoder"),
        ({"text_encoder": [None, None]}, "has no text_encoder"),
        ({"tokenizer": [None, None]}, "has no tokenizer"),
        ({"vae": [None, None]}, ""),
        ({"scheduler": ["diffusers", "NoSuchScheduler"]}, "NoSuchScheduler"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "no component 'controlnet'"),
        ({"../x": ["diffusers", "UNet2DModel"]}, "not a valid folder name"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "UNet2DConditionModel"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder"),
    ],
    ids=str,
)
def test_an_invalid_model_index_is_refused(changes, message, model):
    edit_json(model, "model_index.json", **changes)
    assert message in refusal(model)


def test_class_names_that_transformers_dropped_still_load(model):
    edit_json(model, "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    folder = model / "feature_extractor"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPFeatureExtractor", "crop_size": 8, "size": 8})
    )
    assert open_pipeline(model).pipeline.feature_extractor is not None


@pytest.mark.parametrize(
    ("file", "changes", "key"),
    [
        ("unet/config.json", {"block_out_channels": []}, "block_out_channels"),
        ("unet/config.json", {"sample_size": "big"}, "sample_size"),
        ("unet/config.json", {"sample_size": 0}, "sample_size"),
        ("unet/config.json", {"sample_size": -8}, "sample_size"),
        ("unet/config.json", {"sample_size": 10**9}, "sample_size"),
        ("unet/config.json", {"sample_size": [8, 8, 8]}, "sample_size"),
        ("unet/config.json", {"sample_size": 8.5}, "sample_size"),
        ("unet/config.json", {"sample_size": {"a": 1}}, "sample_size"),
        ("unet/config.json", {"sample_size": True}, "sample_size"),
        ("unet/config.json", {"in_channels": "4"}, "in_channels"),
        ("unet/config.json", {"in_channels": None}, "in_channels"),
        ("unet/config.json", {"in_channels": 10**30}, "in_channels"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
        ("unet/config.json", {"layers_per_block": -1}, "layers_per_block"),
        ("unet/config.json", {"layers_per_block": [1]}, "layers_per_block"),
        ("unet/config.json", {"transformer_layers_per_block": 10**8}, "transformer_layers"),
        ("unet/config.json", {"cross_attention_dim": 10**8}, "cross_attention_dim"),
        ("unet/config.json", {"cross_attention_dim": 32}, "shape"),
        ("unet/config.json", {"block_out_channels": [8, "x"]}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": [8, 16, 32]}, "config.json"),
        ("unet/config.json", {"block_out_channels": [2**20, 2**20]}, "block_out_channels"),
        ("unet/config.json", {"down_block_types": ["Nothing", "DownBlock2D"]}, "Nothing"),
        ("unet/config.json", {"norm_num_groups": 7}, "config.json"),
        ("unet/config.json", {"norm_eps": float("nan")}, "norm_eps"),
        ("unet/config.json", {"act_fn": "no-such"}, "no-such"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandb"),
        ("vae/config.json", {"block_out_channels": "x"}, "block_out_channels"),
        ("vae/config.json", {"latent_channels": -4}, "latent_channels"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder/config.json", {"hidden_size": -1}, "hidden_size"),
        ("text_encoder/config.json", {"hidden_size": "x"}, "hidden_size"),
        ("text_encoder/config.json", {"vocab_size": 10**9}, "vocab_size"),
        (
            "text_encoder/config.json",
            {"max_position_embeddings": 10**10},
            "max_position_embeddings",
        ),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("text_encoder/config.json", {"hidden_act": "no-such"}, "no-such"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "no-such"}, "no-such"),
    ],
    ids=str,
)
def test_an_invalid_configuration_is_refused_by_file_and_key(file, changes, key, model):
    edit_json(model, file, **changes)
    message = refusal(model)
    assert key in message
    assert file.partition("/")[0] in message


def test_a_model_without_a_default_size_requires_one(model):
    edit_json(model, "unet/config.json", sample_size=None)
    loaded = open_pipeline(model)
    with pytest.raises(UsageError, match="--size HEIGHTxWIDTH"):
        _ = loaded.latent_size
    sized = loaded.sized("16x32")
    assert sized.image_size == (16, 32)
    assert sized.resized


def test_unknown_settings_are_reported(model, caplog):
    edit_json(model, "unet/config.json", use_ema_warmup=True)
    open_pipeline(model)
    assert "'use_ema_warmup'" in caplog.text
    assert "unet/config.json" in caplog.text


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\x00", '{"a": NaN'], ids=repr)
def test_invalid_json_is_refused_by_file(file, text, model):
    (model / file).write_text(text)
    assert file.rpartition("/")[2] in refusal(model, ArtefactError)


def test_a_byte_order_mark_is_accepted_where_trtq_reads(model):
    """diffusers does not support byte order marks, so they are refused in its files."""
    for file in ("model_index.json", "unet/config.json"):
        (model / file).write_bytes(b"\xef\xbb\xbf" + (model / file).read_bytes())
    assert "unet/config.json begins with a byte-order mark" in refusal(model, ArtefactError)
    edit = (model / "unet/config.json").read_bytes()
    (model / "unet/config.json").write_bytes(edit[3:])
    open_pipeline(model)


@pytest.mark.parametrize("file", [UNET, TEXT, "unet/config.json", "model_index.json"])
def test_a_named_pipe_instead_of_a_file_does_not_block(file, model):
    (model / file).unlink()
    os.mkfifo(model / file)
    refusal(model, ArtefactError)


def test_links_into_a_cache_are_followed(saved, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    for number, path in enumerate(p for p in sorted(saved.rglob("*")) if p.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    open_pipeline(snapshot)
    (blobs / "0").unlink()
    refusal(snapshot, ArtefactError)


def in_hub_cache(saved, folder, *names):
    """The layout `models--OWNER--NAME` of the hub's cache, with links to `blobs`, for some snapshots."""
    (folder / "blobs").mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(saved.rglob("*")) if p.is_file()):
        shutil.copy(path, folder / "blobs" / str(number))
        for name in names:
            link = folder / "snapshots" / name / path.relative_to(saved)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(folder / "blobs" / str(number), link.parent))
    return folder


@pytest.mark.parametrize("main", ["b\n", "a", None], ids=["b", "a", "none"])
def test_the_snapshot_of_the_main_branch_is_read_from_the_hubs_cache(main, saved, tmp_path):
    folder = in_hub_cache(saved, tmp_path / "models--owner--name", "a", "b")
    if main is None:
        message = refusal(folder, ArtefactError)
        assert "2 snapshots" in message
        assert str(folder / "snapshots" / "a") in message
        assert str(folder / "snapshots" / "b") in message
        return
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(main)
    assert open_pipeline(folder).folder == folder / "snapshots" / main.strip()


@pytest.mark.parametrize("main", ["of-another", None])
def test_the_only_snapshot_is_read_from_the_hubs_cache(main, saved, tmp_path):
    folder = in_hub_cache(saved, tmp_path / "models--owner--name", "a")
    if main is not None:
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(main)
    assert open_pipeline(folder).folder == folder / "snapshots" / "a"


def test_a_hub_cache_without_a_snapshot_is_refused(tmp_path):
    (tmp_path / "models--owner--name/snapshots").mkdir(parents=True)
    assert "no snapshot" in refusal(tmp_path / "models--owner--name", ArtefactError)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_in_a_pickle_are_refused_with_the_code_that_converts_them(part, model):
    file = next((model / part).glob("*.safetensors"))
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    message = refusal(model, ArtefactError)
    assert f"{file.stem}.bin" in message
    assert "can run any code" in message
    assert f"DiffusionPipeline.from_pretrained({str(model)!r}, use_safetensors=False)" in message
    assert "pipe.save_pretrained('NEW FOLDER', safe_serialization=True)" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/none-of-this-name", "from the hub"),
        ("a/b/c", "not a folder"),
        ("owner/", "not a folder"),
        ("/owner", "not a folder"),
        ("owner/na me", "not a folder"),
        ("owner/..", "not a folder"),
        ("owner--x/name", "not a folder"),
        ("", "no model_index|not a folder|holds no"),
        ("https://huggingface.co/owner/name", "not a folder"),
        ("x" * 5000, "not a folder|too long"),
        ("a\0b", "NUL"),
    ],
    ids=[
        "offline",
        "three",
        "half",
        "root",
        "space",
        "dots",
        "dashes",
        "none",
        "url",
        "long",
        "nul",
    ],
)
def test_names_without_a_model_are_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match=message) as caught:
        open_pipeline(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_folder_of_one_component_is_refused_as_incomplete(model):
    message = refusal(model / "unet", ArtefactError)
    assert "UNet2DConditionModel" in message
    assert "whole pipeline" in message


def test_a_pipeline_in_a_subfolder_is_suggested(model):
    assert "its subfolder 'model'" in refusal(model.parent, ArtefactError)


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "is a file" in refusal(tmp_path / "notes.txt", ArtefactError)


def test_old_names_of_attention_weights_are_read(model):
    """The autoencoders of Stable Diffusion 1.x are stored with these names."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    expected = open_pipeline(model).pipeline.vae.state_dict()

    def change(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, former in old.items():
                if f".attentions.0.{new}." in name:
                    name = name.replace(f".{new}.", f".{former}.")
            renamed[name] = tensor
        assert renamed.keys() != tensors.keys()
        return renamed

    edit_tensors(model, VAE, change)
    state = open_pipeline(model).pipeline.vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_old_names_of_text_encoder_weights_are_read(model):
    """transformers 4 wrote these names, and a buffer of positions."""
    expected = open_pipeline(model).pipeline.text_encoder.state_dict()

    def change(tensors):
        old = {f"text_model.{n}": t for n, t in tensors.items() if not n.startswith("text_model.")}
        return old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}

    edit_tensors(model, TEXT, change)
    state = open_pipeline(model).pipeline.text_encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_weights_with_fused_projections_are_refused_with_a_remedy(tmp_path):
    pipeline = build("sd_1")
    pipeline.fuse_qkv_projections()
    pipeline.save_pretrained(tmp_path)
    assert "unfuse_qkv_projections" in refusal(tmp_path, ArtefactError)


def test_a_tokenizer_without_a_length_is_refused(model):
    (model / "tokenizer/tokenizer_config.json").unlink()
    assert "model_max_length" in refusal(model, ArtefactError)


@pytest.mark.parametrize("files", [[], ["vocab.json"], ["added_tokens.json"]], ids=str)
def test_a_tokenizer_without_a_vocabulary_is_refused(files, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    for name in files:
        (folder / "tokenizer" / name).write_text("{}")
    with pytest.raises(ArtefactError, match=r"tokenizer holds no vocabulary: tokenizer\.json is"):
        open_pipeline(folder)
