"""Untrusted manifests: typed and complete, or refused in one line that names the entry."""

import copy
import hashlib
import json
import os
import random
import shutil

import pytest

from trtq.artefact.manifest_file import artefact_kind
from trtq.artefact.opened import open_folder
from trtq.errors import ArtefactError, IntegrityError, TrtqError

DIGEST = hashlib.sha256(b"").hexdigest()


def row(name, kind="conv2d", **changes):
    bits = {"weight_bits": 4, "activation_bits": 8, "right_bits": None}
    if kind == "product":
        bits = {"weight_bits": None, "activation_bits": 8, "right_bits": 4}
    return {"name": name, "kind": kind, **bits, "adapters": True, "reason": "target"} | changes


def valid(kind="run"):
    """A manifest with a value in every entry."""
    options = {"target": "qdq", "precision": "fp32", "batch": [1, 8], "size": "8x8"}
    if kind == "engine":
        options |= {
            "backend": "tensorrt-rtx",
            "version": "1.1",
            "architectures": ["sm86"],
            "profiles": {"unet": {"sample": [[1, 1], [2, 1], [8, 1]]}},
            "graph_metadata": {"trtq.timesteps": "[1.0]"},
            "workspace_bytes": 1 << 30,
        }
    return {
        "format_version": 2,
        "kind": kind,
        "files": {"unet/config.json": DIGEST},
        "source": {"name": "digits", "files": {"a/b.json": DIGEST}},
        "denoiser": "unet",
        "recipe": {
            "method": "efficientdm",
            "bits": "w4a8",
            "tables": "per-step",
            "steps": 3,
            "guidance": 1.5,
            "prompts": None,
            "size": "8x8",
            "seed": 0,
            "policy": None,
            "budget": None,
            "split_skips": False,
            "attention": {"quantize": True, "probability_bits": 8},
            "calibration": {"images": 8, "batch": 8, "share_inputs": True},
            "training": {"iterations": 5, "batch": 4, "rank": 8, "base": "fp"},
            "quest": None,
        },
        "timesteps": [1.0, 251.0, 501],
        "layers": [
            row("conv_in"),
            row("a.to_q", "linear"),
            row("a.to_k", "linear", input_of="a.to_q"),
            row("a.scores", "product"),
            row("conv_out", weight_bits=None, activation_bits=None),
        ],
        "structure": {"attention": ["a"], "splits": {"up.0": 3}},
        "loras": [{"file": "x.safetensors", "sha256": DIGEST, "scale": 0.5, "modules": 3}],
        "options": options if kind != "run" else {},
        "metrics": {
            "bytes_before": 10,
            "bytes_after": 5,
            "engines": [{"name": "unet", "engine_bytes": 3, "build_seconds": 1.5}],
        },
        "packages": {"trtq": "0.1"},
    }


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "run"
    (made / "unet").mkdir(parents=True)
    (made / "unet" / "config.json").touch()
    return made


def write(folder, record):
    (folder / "manifest.json").write_text(json.dumps(record))
    return folder


def places(value, place=()):
    """The path of every entry of a JSON value."""
    if place:
        yield place
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*place, key))


def changed(record, place, value):
    record = copy.deepcopy(record)
    owner = record
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    return record


def sparse(path):
    path.touch()
    os.truncate(path, 10 << 30)


def refusal(folder):
    """The error message for a manifest; None if it is accepted. Other exceptions are not caught."""
    try:
        open_folder(folder)
    except TrtqError as err:
        return str(err)
    return None


WRONG: tuple = (
    *(None, True, False, 0, 1, -1, 3.5, 2**31, 2**63 - 1, -(2**63), 1e300, -0.0),
    *(
        "",
        "x",
        "0",
        "..",
        "a/../b",
        "/etc/passwd",
        "a\x00b",
        "é\u202e",
        "x" * 5000,
        "8x8",
        "1e5x1e5",
    ),
    *([], [1], ["x"], [[]], [[[[]]]], {}, {"a": 1}, {"a": {"b": []}}, [None], [{}], [0.5, 0.25]),
)


@pytest.mark.parametrize("kind", ["run", "onnx", "engine"])
def test_a_valid_manifest_is_read(folder, kind):
    record = valid(kind)
    manifest = open_folder(write(folder, record), kind).manifest
    assert artefact_kind(folder) == kind
    # Recipe and options are unchanged.
    assert manifest.recipe.to_json() == record["recipe"]
    assert manifest.options.to_json() == record["options"]
    assert manifest.layer_kinds()["a.scores"] == "product a8a4"
    assert manifest.layer_kinds()["conv_out"] == "conv2d float"


@pytest.mark.parametrize("kind", ["run", "onnx", "engine"])
def test_every_wrong_value_in_every_entry_is_accepted_or_refused(folder, kind):
    record = valid(kind)
    rng = random.Random(kind)
    every = [(place, value) for place in places(record) for value in WRONG]
    refused = 0
    for place, value in rng.sample(every, 500):
        write(folder, changed(record, place, value))
        message = refusal(folder)
        refused += message is not None
        assert message is None or ("\n" not in message and len(message) < 1000), (place, message)
    assert refused > 300


@pytest.mark.parametrize("kind", ["run", "onnx", "engine"])
def test_every_entry_can_be_missing_or_surplus(folder, kind):
    record = valid(kind)
    for place in places(record):
        lacking = copy.deepcopy(record)
        owner = lacking
        for key in place[:-1]:
            owner = owner[key]
        del owner[place[-1]]
        write(folder, lacking)
        assert "\n" not in (refusal(folder) or "")


REFUSED = {
    "version text": (("format_version",), "2", "format_version is a number, got '2'"),
    "version float": (("format_version",), 2.0, "format_version is a number"),
    "version true": (("format_version",), True, "format_version is a number"),
    "version none": (("format_version",), None, "format_version is a number"),
    "kind": (("kind",), "model", "kind"),
    "descending": (("timesteps",), [501, 251, 1], "got 251 after 501"),
    "doubled": (("timesteps",), [1, 1, 501], "got 1 after 1"),
    "negative": (("timesteps", 0), -1, r"timesteps\.0"),
    "text": (("timesteps", 0), "1", r"timesteps\.0"),
    "truth": (("timesteps", 0), True, r"timesteps\.0"),
    "no timesteps": (("timesteps",), [], "timesteps"),
    "timesteps none": (("timesteps",), None, "timesteps: must be there if there is a recipe"),
    "recipe none": (("recipe",), None, "recipe: is missing, a run has one"),
    "steps": (("recipe", "steps"), "x", "recipe: steps"),
    "steps none": (("recipe", "steps"), None, r"recipe\.steps: is missing"),
    "steps many": (("recipe", "steps"), 10**9, "recipe: steps"),
    "guidance": (("recipe", "guidance"), "x", "recipe: guidance"),
    "recipe size": (("recipe", "size"), 7, "recipe: size"),
    "recipe size huge": (("recipe", "size"), "99999x8", "recipe: size: a size is HEIGHTxWIDTH"),
    "recipe bits": (("recipe", "bits"), "w99a4", "recipe: bits"),
    "rank": (("recipe", "training", "rank"), -1, r"recipe: training\.rank"),
    "bits": (("layers", 0, "activation_bits"), 10**9, r"layers\.0\.activation_bits"),
    "bits one": (("layers", 0, "weight_bits"), 1, r"layers\.0\.weight_bits"),
    "bits text": (("layers", 0, "weight_bits"), "4", r"layers\.0\.weight_bits"),
    "bits half": (("layers", 0, "weight_bits"), None, "'conv_in' is of kind 'conv2d'"),
    "right": (("layers", 0, "right_bits"), 4, "'conv_in' is of kind 'conv2d'"),
    "product": (("layers", 0, "kind"), "product", "'conv_in' is of kind 'product'"),
    "layer kind": (("layers", 0, "kind"), "norm", r"layers\.0\.kind"),
    "twice": (("layers", 1, "name"), "conv_in", "'conv_in' is listed twice"),
    "layer name": (("layers", 0, "name"), "../x", r"layers\.0\.name"),
    "layer name empty": (("layers", 0, "name"), "", r"layers\.0\.name"),
    "input of none": (("layers", 2, "input_of"), "b", "input of 'b', which is no layer before"),
    "input of later": (("layers", 1, "input_of"), "a.to_k", "no layer before it"),
    "input of itself": (("layers", 2, "input_of"), "a.to_k", "no layer before it"),
    "input of float": (("layers", 4, "input_of"), "conv_in", "quantises no single input"),
    "all float": (
        ("layers",),
        [row("x", weight_bits=None, activation_bits=None)],
        "none is low-bit",
    ),
    "denoiser": (("denoiser",), "../unet", "denoiser"),
    "digest": (("files", "unet/config.json"), "0", r"files\.unet/config\.json"),
    "lora": (("loras", 0, "scale"), "x", r"loras\.0: scale"),
    "split": (("structure", "splits", "up.0"), 0, r"structure\.splits\.up\.0"),
    "bytes": (("metrics", "bytes_before"), "x", "metrics: bytes_before"),
    "surplus": (("surprise",), 1, "surprise: unknown key"),
}


@pytest.mark.parametrize(("place", "value", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_entry_is_named(folder, place, value, message):
    write(folder, changed(valid(), place, value))
    with pytest.raises(IntegrityError, match=message):
        open_folder(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("options", "size"), 7, "options: size"),
        (("options", "size"), "16x16:8x8", "largest size is smaller"),
        (("options", "precision"), "fp8", "options: precision"),
        (("options", "batch"), [8, 1], "options: batch must be the smallest and"),
        (("options", "batch"), [1, 10**12], r"options: batch\.1"),
        (("options", "backend"), "cpu", "options: backend"),
        (("options", "backend"), None, r"options\.backend: is missing"),
        (("options", "architectures"), "sm86", "options: architectures"),
        (("options", "profiles", "unet", "sample"), [[1], [2]], "options: profiles"),
        (
            ("options", "profiles", "unet", "sample"),
            [[9, 1], [2, 1], [8, 1]],
            "profiles.unet.sample",
        ),
        (("options", "graph_metadata"), {"a": 1}, "options: graph_metadata"),
        (("metrics", "engines", 0, "build_seconds"), "x", r"metrics: engines\.0\.build_seconds"),
    ],
)
def test_a_wrong_option_is_named(folder, place, value, message):
    write(folder, changed(valid("engine"), place, value))
    with pytest.raises(IntegrityError, match=message):
        open_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x",
            "/etc/passwd",
            "a/../../x",
            "..",
            "a\\b",
            "\\\\host\\share\\x",
            "C:/x",
            "C:x",
            "//host/x",
        ),
        *(
            "a\0b",
            "a\nb",
            "a\x1b[2J",
            "a\u202eb",
            "CON",
            "unet/nul.json",
            "com1",
            "a.",
            "a ",
            "a//b",
        ),
        *("./a", "a/", "", "a?", "x" * 300, "manifest.json", "a/" * 2000 + "a"),
    ],
)
def test_an_invalid_file_name_is_refused(folder, name):
    write(folder, changed(valid(), ("files", name), DIGEST))
    with pytest.raises(IntegrityError, match=r"manifest\.json") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(tmp_path / "secret")
    write(folder, changed(valid(), ("files", "link"), DIGEST))
    with pytest.raises(IntegrityError, match="leaves the folder"):
        open_folder(folder)


TEXTS = {
    "empty": b"",
    "nul": b"\0" * 100,
    "deep": b'{"format_version":2,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nan": b'{"format_version": 2, "timesteps": [NaN]}',
    "twice": b'{"format_version": 1, "format_version": 2}',
    "list": b"[]",
    "latin": b'{"format_version": 2, "kind": "\xe9"}',
    "utf-16": '{"format_version": 2}'.encode("utf-16"),
    "digits": b'{"format_version": ' + b"9" * 10_000 + b"}",
    "surrogate": b'{"format_version": 2, "denoiser": "\\ud800"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_file_that_is_not_a_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_bytes(text)
    for read in (open_folder, artefact_kind):
        with pytest.raises(ArtefactError, match=r"manifest\.json") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "it is a folder"),
        (os.mkfifo, "it is a named pipe"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (sparse, "10,737,418,240 bytes"),
    ],
)
def test_a_manifest_that_is_not_a_file_is_refused(folder, make, message):
    make(folder / "manifest.json")
    for read in (open_folder, artefact_kind):
        with pytest.raises(ArtefactError, match=message):
            read(folder)


def test_a_byte_order_mark_in_a_manifest_is_accepted(folder):
    (folder / "manifest.json").write_text(json.dumps(valid()), encoding="utf-8-sig")
    assert open_folder(folder).manifest.kind == "run"


def test_a_folder_without_a_manifest_is_not_an_artefact(folder):
    assert artefact_kind(folder) is None
    shutil.rmtree(folder)
    assert artefact_kind(folder) is None
