"""Files that are not LoRAs, damaged or for another model are refused in one line."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tests.families import pipelines
from tests.lora.merged_by_diffusers import denoiser_of, parts, weights
from trtq.errors import ArtefactError, NonFiniteError, UsageError
from trtq.lora import LoraRequest, merge_loras, parse_lora

PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
KEY = f"unet.{PATH}"
FLAT = "lora_unet_" + PATH.replace(".", "_")
K = 16


@pytest.fixture(scope="module")
def pipe():
    return pipelines.build("sd_1")


def good(**changes):
    tensors = {
        f"{KEY}.lora_A.weight": torch.ones(2, K),
        f"{KEY}.lora_B.weight": torch.ones(K, 2),
    }
    for key, value in changes.items():
        name = {"A": f"{KEY}.lora_A.weight", "B": f"{KEY}.lora_B.weight"}[key]
        tensors[name] = value
        if value is None:
            del tensors[name]
    return tensors


def another(name, tensor):
    return good() | {name: tensor}


def both(dtype):
    return good(A=torch.ones(2, K).to(dtype), B=torch.ones(K, 2).to(dtype))


# name: (tensors, pattern of the message)
TENSORS = {
    "rank-0": (good(A=torch.zeros(0, K), B=torch.zeros(K, 0)), "the rank must be at least 1"),
    "int64": (both(torch.int64), "is of type I64; it must be float32"),
    "int8": (both(torch.int8), "is of type I8; it must be"),
    "bool": (both(torch.bool), "is of type BOOL; it must be"),
    "complex": (both(torch.complex64), "is of type C64; it must be"),
    "other-ranks": (good(B=torch.ones(K, 3)), "do not fit each other"),
    "without-B": (good(B=None), "lora_B/lora_up matrix is missing"),
    "without-A": (
        another(f"{KEY[:-1]}k.lora_B.weight", torch.ones(K, 2)),
        "lora_A/lora_down matrix is",
    ),
    "only-B": (good(A=None), "holds no matrices"),
    "alpha-alone": (another(f"{KEY[:-1]}k.alpha", torch.tensor(1.0)), "has only alpha"),
    "one-dimension": (good(A=torch.ones(K)), "a matrix has at least two dimensions"),
    "too-wide": (good(A=torch.ones(2, K + 1)), "does not fit"),
    "too-tall": (good(B=torch.ones(K + 1, 2)), "does not fit"),
    "transposed": (good(A=torch.ones(K, 2), B=torch.ones(2, K)), "does not fit"),
    "four-dimensions": (good(A=torch.ones(2, K, 3, 3)), "does not fit"),
    "kernel": (
        {
            f"unet.{CONV}.lora_A.weight": torch.ones(2, K, 1, 9),
            f"unet.{CONV}.lora_B.weight": torch.ones(K, 2, 1, 1),
        },
        "does not fit",
    ),
    "kernel-in-up": (
        {
            f"unet.{CONV}.lora_A.weight": torch.ones(2, K, 3, 3),
            f"unet.{CONV}.lora_B.weight": torch.ones(K, 2, 3, 3),
        },
        "does not fit",
    ),
    "bias-of-a-layer-without": (
        another(f"{KEY}.lora_B.bias", torch.ones(K)),
        "has a bias for .* but the layer has no bias",
    ),
    "magnitude-of-inputs": (
        {
            "unet.time_embedding.linear_1.lora_A.weight": torch.ones(2, 8),
            "unet.time_embedding.linear_1.lora_B.weight": torch.ones(32, 2),
            "unet.time_embedding.linear_1.dora_scale": torch.ones(1, 8),
        },
        "DoRA's magnitude .* one number for each of its 32 output channels",
    ),
    "magnitude-alone": (another(f"{FLAT}.dora_scale", torch.ones(K, 1)), "has only dora_scale"),
    "alpha-of-two": (another(f"{KEY}.alpha", torch.ones(2)), "an alpha is one number"),
    "alpha-bool": (another(f"{KEY}.alpha", torch.tensor(True)), "is of type BOOL"),
    "twice-by-prefix": (
        good() | {k.removeprefix("unet."): v.clone() for k, v in good().items()},
        "twice",
    ),
    "twice-by-kohya": (
        good()
        | {
            f"{FLAT}.lora_down.weight": torch.ones(2, K),
            f"{FLAT}.lora_up.weight": torch.ones(K, 2),
        },
        "twice",
    ),
    "twice-in-one-spelling": (another(f"{KEY}.lora_down.weight", torch.ones(2, K)), "twice"),
    "two-adapters": (another(f"{KEY}.lora_A.second.weight", torch.ones(2, K)), "twice"),
    "no-such-layer": (
        {
            "unet.down_blocks.7.to_q.lora_A.weight": torch.ones(2, K),
            "unet.down_blocks.7.to_q.lora_B.weight": torch.ones(K, 2),
        },
        "another architecture: 1 of its 1 layers are not in this model",
    ),
    "sdxl": (
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_down.weight": torch.ones(
                2, 2048
            ),
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_up.weight": torch.ones(
                640, 2
            ),
        },
        "looks like a LoRA for Stable Diffusion XL; this model's unet is a UNet2DConditionModel",
    ),
    "second-text-encoder": (
        {
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(
                2, 64
            ),
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(
                64, 2
            ),
        },
        "this model has no text_encoder_2",
    ),
    "flux": (
        {
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, K),
            "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(K, 2),
        },
        "looks like a LoRA for Flux",
    ),
    "wan": (
        {
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, K),
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.ones(K, 2),
        },
        "looks like a LoRA for Wan",
    ),
    "checkpoint": (
        {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3)},
        "not a LoRA: none of its 1 tensors .* looks like a whole checkpoint",
    ),
    "vae": ({"encoder.conv_in.weight": torch.ones(8, 4, 3, 3)}, "looks like a VAE"),
    "unet": ({"conv_in.weight": torch.ones(8, 4, 3, 3)}, "looks like weights of a model"),
    "embedding": ({"emb_params": torch.ones(1, 8)}, "textual inversion"),
    "embedding-xl": ({"clip_l": torch.ones(1, 8), "clip_g": torch.ones(1, 8)}, "textual inversion"),
    "loha": (another(f"{FLAT}.hada_w1_a", torch.ones(2, 2)), "holds LoHa"),
    "lokr": ({f"{FLAT}.lokr_w1": torch.ones(2, 2)}, "holds LoKr"),
    "oft": ({f"{FLAT}.oft_blocks": torch.ones(2, 2, 2)}, "holds OFT"),
    "boft": ({f"unet.{PATH}.boft_R.weight": torch.ones(2, 2)}, "holds OFT"),
    "glora": ({f"{FLAT}.a1.weight": torch.ones(2, 2)}, "holds GLoRA"),
    "ia3": ({f"{FLAT}.on_input": torch.tensor(1.0)}, "holds IA3"),
    "vera": ({f"unet.{PATH}.vera_lambda_b": torch.ones(K)}, "holds VeRA"),
    "difference": (another(f"{FLAT}.diff", torch.ones(K, K)), "full differences of weights"),
    "difference-of-bias": (another(f"{FLAT}.diff_b", torch.ones(K)), "full differences of weights"),
    "set-weight": (another(f"{FLAT}.set_weight", torch.ones(K, K)), "set_weight"),
    "embedding-layer": (another("x.lora_embedding_A", torch.ones(2, K)), "LoRA of an embedding"),
    "control-lora": ({"lora_controlnet": torch.ones(1)}, "Control-LoRA"),
    "modules-to-save": (
        another("base_model.model.conv_in.modules_to_save.weight", torch.ones(8, 4, 3, 3)),
        "modules_to_save",
    ),
    "norm": (
        another("unet.conv_norm_out.weight", torch.ones(8)),
        "1 tensors that are not part of a LoRA",
    ),
    "scaled-fp8": (another(f"{KEY}.scale_weight", torch.tensor(1.0)), "not part of a LoRA"),
    "nothing": ({}, "holds no tensors"),
}


def refused(pipe, path, error, message, scale=1.0):
    """Assert that a LoRA is refused in one line and no weight has changed."""
    before = weights(pipe)
    with pytest.raises(error, match=message) as caught:
        merge_loras(parts(pipe), [LoraRequest(path, scale)], denoiser_of(pipe))
    assert "\n" not in str(caught.value)
    after = weights(pipe)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", TENSORS)
def test_invalid_tensors_are_refused(name, pipe, tmp_path):
    tensors, message = TENSORS[name]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    refused(pipe, path, ArtefactError, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "where", ["lora_A.weight", "lora_B.weight", "alpha", "lora_magnitude_vector"]
)
def test_nan_and_infinity_are_refused(value, where, pipe, tmp_path):
    tensors = good() | {
        f"{KEY}.alpha": torch.tensor(1.0),
        f"{KEY}.lora_magnitude_vector": torch.ones(K),
    }
    tensors[f"{KEY}.{where}"].flatten()[0] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    refused(pipe, tmp_path / "bad.safetensors", NonFiniteError, f"{where}' holds NaN or infinity")


@pytest.mark.parametrize("scale", [1e38, -1e300])
def test_a_scale_that_makes_weights_infinite_is_refused(scale, pipe, tmp_path):
    save_file({k: v * 1e3 for k, v in good().items()}, tmp_path / "style.safetensors")
    refused(pipe, tmp_path / "style.safetensors", NonFiniteError, "give it a smaller scale", scale)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale, pipe, tmp_path):
    save_file(good(), tmp_path / "style.safetensors")
    refused(pipe, tmp_path / "style.safetensors", UsageError, "finite number", scale)


def header(text, rest=b""):
    return len(text).to_bytes(8, "little") + text + rest


def pickled(folder, name):
    torch.save(good(), folder / name)
    return folder / name


def written(content):
    def make(folder):
        path = folder / "bad.safetensors"
        path.write_bytes(content)
        return path

    return make


def whole(folder):
    save_file(good(), folder / "good.safetensors")
    return (folder / "good.safetensors").read_bytes()


def fifo(folder):
    os.mkfifo(folder / "pipe.safetensors")
    return folder / "pipe.safetensors"


def folder_with(*names):
    def make(folder):
        for name in names:
            path = folder / "adapter" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"{}")
        return folder / "adapter"

    return make


def folder_of_pipes(folder):
    (folder / "adapter").mkdir()
    os.mkfifo(folder / "adapter" / "adapter_model.safetensors")
    return folder / "adapter"


def settings_in_a_pipe(folder):
    save_file(good(), folder / "adapter_model.safetensors")
    os.mkfifo(folder / "adapter_config.json")
    return folder


def settings_of_a_terabyte(folder):
    save_file(good(), folder / "adapter_model.safetensors")
    with (folder / "adapter_config.json").open("wb") as file:
        file.truncate(1 << 40)  # A sparse file, which takes no space on the disk.
    return folder


def cut(kept):
    def make(folder):
        content = whole(folder)
        return written(content[: kept if kept > 0 else len(content) + kept])(folder)

    return make


def empty_folder(folder):
    (folder / "adapter").mkdir()
    return folder / "adapter"


TENSOR = b'"x.lora_A.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}'
FILES = {
    "missing": (lambda folder: folder / "no.safetensors", "there is no LoRA file"),
    "nul": (lambda folder: folder / "a\0b", "there is no LoRA file"),
    "long-name": (lambda folder: folder / ("a" * 5000), "there is no LoRA file"),
    "empty": (written(b""), "is empty"),
    "five-bytes": (written(b"12345"), "not a safetensors file, or is cut short"),
    "lfs": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "cut-in-header": (cut(20), "cut short"),
    "cut-in-data": (cut(-4), "cut short"),
    "too-long": (lambda f: written(whole(f) + b"1234")(f), "not a safetensors file"),
    "nonsense": (written(header(b"{nonsense")), "its header is damaged"),
    "binary": (written(header(bytes(range(256)))), "its header is damaged"),
    "deep": (
        written(header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
        "its header is damaged",
    ),
    "list": (written(header(b"[1, 2]")), "its header is not a table of tensors"),
    "numbers": (written(header(b'{"a": 1}')), "its header is not a table of tensors"),
    "same-name-twice": (
        written(header(b"{" + TENSOR + b"," + TENSOR + b"}", b"1234")),
        "a name appears twice",
    ),
    "negative-shape": (
        written(header(b"{" + TENSOR.replace(b"[1,1]", b"[-1,1]") + b"}", b"1234")),
        "has no shape",
    ),
    "no-type": (written(header(b'{"x.lora_A.weight":{}}', b"")), "is of type None"),
    "object-for-type": (
        written(header(b"{" + TENSOR.replace(b'"F32"', b"{}") + b"}", b"1234")),
        r"is of type \{\}",
    ),
    "offsets": (
        written(header(b"{" + TENSOR.replace(b"[0,4]", b"[0,4000]") + b"}", b"1234")),
        "not a safetensors file",
    ),
    "bin": (lambda folder: pickled(folder, "pytorch_lora_weights.bin"), "is a pickle"),
    "pt": (lambda folder: pickled(folder, "a.pt"), "is a pickle"),
    "ckpt": (lambda folder: pickled(folder, "a.ckpt"), "is a pickle"),
    "pickle-in-disguise": (lambda folder: pickled(folder, "a.safetensors"), "is a pickle"),
    "old-pickle": (written(b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01."), "is a pickle"),
    "picture": (written(b"\x89PNG\r\n\x1a\n" + bytes(100)), "not a safetensors file"),
    "fifo": (fifo, "is not a file"),
    "device": (lambda folder: type(folder)("/dev/zero"), "is not a file"),
    "folder": (empty_folder, "holds no adapter_model.safetensors: give a .safetensors file"),
    "folder-of-pickles": (folder_with("adapter_model.bin", "adapter_config.json"), "is a pickle"),
    "folder-of-several": (
        folder_with("a.safetensors", "b.safetensors"),
        "give one of them: a.safet",
    ),
    "folder-of-adapters": (folder_with("unet/adapter_config.json"), "its adapters are in folders"),
    "folder-of-pipes": (folder_of_pipes, "is not a file"),
    "settings-in-a-pipe": (settings_in_a_pipe, "is not a file"),
    "settings-of-a-terabyte": (settings_of_a_terabyte, "bytes; at most 67,108,864 are read"),
}


@pytest.mark.parametrize("name", FILES)
def test_invalid_files_are_refused(name, pipe, tmp_path):
    make, message = FILES[name]
    refused(pipe, make(tmp_path), ArtefactError, message)


DEEP = '{"r": ' + "[" * 100_000 + "]" * 100_000 + "}"
# Content of adapter_config.json, as text or as additional settings.
SETTINGS = {
    "no-json": ("{", "is not JSON"),
    "empty": ("", "is not JSON"),
    "binary": (b"\xff\xfe\x00", "is not JSON"),
    "deep": (DEEP, "is not JSON"),
    "list": ("[1]", "holds list, not a JSON object"),
    "huge": ('{"r": ' + "9" * 10_000 + "}", "is not JSON"),
    "rank-text": ({"r": "2"}, "r is '2'; it must be a whole number"),
    "rank-flag": ({"r": True}, "r is 'True'; it must be a whole number"),
    "rank-0": ({"r": 0}, "r is '0'; it must be a whole number of at least 1"),
    "rank-negative": ({"r": -2}, "it must be a whole number"),
    "rank-huge": ({"r": 10**300}, "r is 'a huge number'"),
    "other-rank": ({"r": 4}, "gives .* rank 4, but its matrices have rank 2"),
    "alpha-text": ({"lora_alpha": "16"}, "lora_alpha is '16'; it must be a finite number"),
    "alpha-null": ({"lora_alpha": None}, "lora_alpha is 'None'"),
    "alpha-nan": ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
    "alpha-infinite": ({"lora_alpha": float("inf")}, "lora_alpha is 'inf'"),
    "alpha-huge": ({"lora_alpha": 10**400}, "lora_alpha is 'a huge number'"),
    "alpha-list": ({"lora_alpha": [1, 2]}, "lora_alpha is"),
    "rslora-text": ({"use_rslora": "yes"}, "use_rslora is 'yes'; it must be true or false"),
    "dora-text": ({"use_dora": "yes"}, "use_dora is 'yes'; it must be true or false"),
    "dora-without-magnitude": ({"use_dora": True}, "use_dora true, but the file has no magnitude"),
    "pattern-list": ({"rank_pattern": [2]}, "rank_pattern is .* an object of layer names"),
    "pattern-text": ({"alpha_pattern": {"to_q": "4"}}, r"alpha_pattern\['to_q'\] is '4'"),
    "pattern-rank": ({"rank_pattern": {"to_q": 3}}, "rank 3, but its matrices have rank 2"),
    "pattern-broken": ({"alpha_pattern": {"to_(q": 4}}, "a regular expression"),
    "pattern-slow": ({"alpha_pattern": {"(a+)+b": 4}}, "a plain regular expression"),
    "pattern-slow-too": ({"alpha_pattern": {".*.*.*.*.*.*.*x": 4}}, "a plain regular expression"),
    "pattern-long": ({"alpha_pattern": {"a" * 1000: 4}}, "a plain regular expression"),
    "loha": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; it must be LORA"),
    "peft-type-list": ({"peft_type": ["LORA"]}, "peft_type is"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "also changes the base model's weights"),
    "olora": ({"init_lora_weights": "olora"}, "also changes the base model's weights"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication changes the adapter"),
    "parameters": ({"target_parameters": ["x.weight"]}, "target_parameters changes the adapter"),
    "of-the-future": ({"use_wonder": True}, "use_wonder changes the adapter"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_invalid_settings_of_peft_are_refused(name, pipe, tmp_path):
    content, message = SETTINGS[name]
    tensors = {key.replace("unet.", "base_model.model."): value for key, value in good().items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if isinstance(content, dict):
        content = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | content)
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "adapter_config.json").write_bytes(content)
    refused(pipe, tmp_path, ArtefactError, message)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "binary"])
def test_invalid_settings_in_the_metadata_are_refused(name, pipe, tmp_path):
    content, message = SETTINGS[name]
    if isinstance(content, dict):
        made = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | content
        content = json.dumps({f"unet.{key}": value for key, value in made.items()})
    elif name == "huge":
        content = content.replace('"r"', '"unet.r"')
    save_file(good(), tmp_path / "style.safetensors", metadata={"lora_adapter_metadata": content})
    refused(pipe, tmp_path / "style.safetensors", ArtefactError, message)


def test_an_adapter_of_peft_without_its_settings_is_refused(pipe, tmp_path):
    tensors = {key.replace("unet.", "base_model.model."): value for key, value in good().items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused(pipe, tmp_path, ArtefactError, "strength is in adapter_config.json; that file is")


def test_contradictory_strengths_are_refused(pipe, tmp_path):
    note = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 8})}
    path = tmp_path / "style.safetensors"
    save_file(another(f"{KEY}.alpha", torch.tensor(2.0)), path, metadata=note)
    refused(pipe, path, ArtefactError, "two strengths: alpha / rank is 1 by its alpha and 4 by")


def test_a_file_of_an_ambiguous_text_encoder_is_refused(tmp_path):
    pipe = pipelines.build("sd_xl")
    tensors = {
        "encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64),
        "encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(64, 2),
    }
    save_file(tensors, tmp_path / "style.safetensors")
    refused(pipe, tmp_path / "style.safetensors", ArtefactError, "another architecture")


def test_nothing_is_merged_unless_all_loras_fit(pipe, tmp_path):
    save_file(good(), tmp_path / "good.safetensors")
    save_file(good(B=torch.ones(K, 3)), tmp_path / "bad.safetensors")
    before = weights(pipe)
    requests = [LoraRequest(tmp_path / f"{name}.safetensors") for name in ("good", "bad")]
    with pytest.raises(ArtefactError, match="do not fit each other"):
        merge_loras(parts(pipe), requests, "unet")
    assert all(torch.equal(before[key], value) for key, value in weights(pipe).items())


def test_the_same_file_twice_is_refused(pipe, tmp_path):
    save_file(good(), tmp_path / "a.safetensors")
    requests = [
        LoraRequest(tmp_path / "a.safetensors"),
        LoraRequest(tmp_path / "a.safetensors", 0.5),
    ]
    with pytest.raises(UsageError, match="given twice"):
        merge_loras(parts(pipe), requests, "unet")


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("b/a.safetensors:0.7", "b/a.safetensors", 0.7),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:0", "a.safetensors", 0.0),
        ("a:b.safetensors:2", "a:b.safetensors", 2.0),
    ],
)
def test_requests_are_parsed(text, path, scale):
    request = parse_lora(text)
    assert (str(request.path), request.scale) == (path, scale)


@pytest.mark.parametrize(
    "number", ["strong", "nan", "inf", "-inf", "", "1e999", "0,5", "0x1", "1 2", "a\0b"]
)
def test_invalid_requests_are_refused(number):
    with pytest.raises(UsageError, match="is not a number"):
        parse_lora(f"a.safetensors:{number}")


def test_an_existing_name_that_ends_in_a_number_is_not_split(tmp_path):
    (tmp_path / "style:2").mkdir()
    assert parse_lora(f"{tmp_path}/style:2") == LoraRequest(tmp_path / "style:2", 1.0)
    assert parse_lora(f"{tmp_path}/style:2:0.5") == LoraRequest(tmp_path / "style:2", 0.5)
