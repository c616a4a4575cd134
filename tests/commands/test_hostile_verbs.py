"""Every command with hostile inputs: one line names the input, and the user's files do not change.

Each case creates files, passes arguments, and defines the text that the message must contain. After each
case, with any exit code: no traceback, no internal error, no hang, every file next to the output
unchanged, and after an error no new file, not even a hidden one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.conftest import tiny_pipeline
from trtq.cli import app
from trtq.exporter.export import export
from trtq.runs.quantize import quantize

# These loggers are bound to the stream that is current at their first use.
diffusers.utils.logging.get_logger()
transformers.utils.logging.get_logger()

MAX_SECONDS = 60
RECIPE = {
    "method": "minmax",
    "bits": "w4a8",
    "steps": 2,
    "calibration": {"images": 4, "batch": 4, "samples_per_step": 64},
}
SMALL_CALIBRATION = "[calibration]\nimages=4\nbatch=4\nsamples_per_step=64\n"
ANY = (0, 1, 2)
REFUSED = (1, 2)


def put(path, make):
    """A path at which `make` has created a file, folder, link or pipe."""
    make(path)
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folders of a tiny class-conditional model: float, run and onnx."""
    place = tmp_path_factory.mktemp("made")
    model = place / "float"
    tiny_pipeline().save_pretrained(model)
    index = json.loads((model / "model_index.json").read_text())
    index = {key: value for key, value in index.items() if key != "null_class"}
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDIMPipeline"}))
    classes = {"labels": ["a", "b", "c"], "null_class": 3}
    (model / "classes.json").write_text(json.dumps(classes))
    quantize(str(model), RECIPE, place / "run")
    export(place / "run", place / "onnx")
    _move_weights_out(place / "onnx")
    return place


def _move_weights_out(folder: Path) -> None:
    """Move the weights to a file next to the graph, where weights of larger models are."""
    import onnx

    place = folder / "unet/model.onnx"
    model = onnx.load(str(place))
    (folder / "unet/model.onnx_data").unlink(missing_ok=True)
    onnx.save_model(
        model,
        str(place),
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=1024,  # Runtimes require shapes in the graph itself.
    )
    rehash(folder)


class World:
    """A user's folder: the files of the case, files that must not change, and copies of artefacts."""

    def __init__(self, path: Path, made: Path) -> None:
        self.path, self.made = path, made
        self.out = path / "out"
        self.undo: list[Callable[[], object]] = []
        (path / "thesis.txt").write_text("precious")

    def file(self, name: str, content: str | bytes = "") -> Path:
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
        return place

    def copy(self, kind: str, name: str | None = None) -> Path:
        return Path(shutil.copytree(self.made / kind, self.path / (name or kind)))

    def edited(
        self, kind: str, change: Callable[[dict[str, Any]], object], file="manifest.json"
    ) -> Path:
        """A copy with a changed document and recomputed hashes."""
        folder = self.copy(kind)
        document = json.loads((folder / file).read_text())
        change(document)
        (folder / file).write_text(json.dumps(document))
        return folder if file == "manifest.json" else rehash(folder)

    def replaced(self, kind: str, file: str, content: str | bytes) -> Path:
        """A copy with different content in one file and recomputed hashes."""
        folder = self.copy(kind)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        return rehash(folder)

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """A run with changed packed tensors and recomputed hashes."""
        folder = self.copy("run")
        place = folder / "quantized.safetensors"
        with safe_open(str(place), "pt") as file:
            metadata = file.metadata()
        tensors = load_file(str(place))
        change(tensors)
        save_file(tensors, str(place), metadata)
        return rehash(folder)

    def graph(self, change: Callable[[Any], object]) -> Path:
        """An ONNX folder with a changed graph and recomputed hashes."""
        import onnx

        folder = self.copy("onnx")
        place = folder / "unet/model.onnx"
        model = onnx.load(str(place), load_external_data=False)
        change(model)
        place.write_bytes(model.SerializeToString())
        return rehash(folder)


def rehash(folder: Path) -> Path:
    """Recompute the hashes in the manifest, as an attacker would after an edit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """The content of each file, link and folder below a folder."""
    entries = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            key = os.fsencode(path.relative_to(folder)).decode("ascii", "backslashreplace")
            if path.is_symlink():
                entries[key] = f"link to {os.readlink(path)}"
            elif path.is_file():
                entries[key] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                entries[key] = "folder" if path.is_dir() else "special"
    return entries


class _HungError(BaseException):
    """Raised after the time limit; no command catches this error."""


@contextlib.contextmanager
def time_limit(seconds):
    def ring(number, frame):
        raise _HungError(f"ran past {seconds} s")

    former_handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former_handler)


def invoke(*arguments) -> tuple[int, str]:
    """Exit code and output of a command run in this process."""
    with time_limit(MAX_SECONDS):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return result.exit_code, result.output


def start(*arguments, env=None, **how) -> tuple[int, str]:
    """Exit code and output of a command run in a separate process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-c", "from trtq.cli import app; app()", *map(str, arguments)]
    how = {"stdin": subprocess.DEVNULL} | how
    done: Any = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        timeout=MAX_SECONDS,
        check=False,
        **how,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace")


def judge(world: World, answer: tuple[int, str], before: dict[str, str], codes, says: str) -> None:
    code, text = answer
    message = " ".join(text.split())
    assert "Traceback" not in text, text
    assert "internal error" not in text, text
    assert code in codes, (code, message)
    assert says in message, (code, message)
    after = snapshot(world.path)
    changed = [name for name, what in before.items() if after.get(name) != what]
    assert changed == [], message
    new = [name for name in after if name not in before]
    if code:
        assert new == [], message
    else:
        strange = [n for n in new if n != "out" and not n.startswith(("out/", "out."))]
        assert strange == [], message


# --- Artefacts: damaged or edited, opened by every verb that opens artefacts ----------------------


def by_end(end: str, change: Callable[[torch.Tensor], torch.Tensor]):
    """Change the first layer tensor whose key ends with a suffix."""

    def edit(tensors):
        key = next(key for key in sorted(tensors) if key.startswith("layer:") and key.endswith(end))
        tensors[key] = change(tensors[key].clone())

    return edit


def swap_tables(tensors):
    low, high = (
        next(k for k in sorted(tensors) if k.endswith(f"activation.{e}")) for e in ("low", "high")
    )
    tensors[low], tensors[high] = tensors[high], tensors[low]


def swap_layers(tensors):
    """Exchange the weights of two layers of equal shape, which only the hash can detect."""
    first, second = [k for k in sorted(tensors) if k.endswith("resnets.0.conv2:weight.codes")][:2]
    tensors[first], tensors[second] = tensors[second], tensors[first]


def swap_unequal(tensors):
    first, second = "layer:conv_in:weight.codes", "layer:conv_out:weight.codes"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def at(value):
    def edit(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return edit


def swap_rows(manifest):
    layers = manifest["layers"]
    layers[1]["name"], layers[4]["name"] = layers[4]["name"], layers[1]["name"]


def loop(w, kind="run"):
    folder = w.copy(kind)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").symlink_to("model_index.json")
    return folder


def fifo(w, kind="run"):
    folder = w.copy(kind)
    (folder / "unet/config.json").unlink()
    os.mkfifo(folder / "unet/config.json")
    return folder


def without(w, kind, name):
    folder = w.copy(kind)
    (folder / name).unlink()
    return folder


def cut(w, kind, name, share=0.5, again=True):
    folder = w.copy(kind)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    return rehash(folder) if again else folder


def as_folder(w, kind, name):
    folder = without(w, kind, name)
    (folder / name).mkdir()
    return folder


def huge_header(w):
    return w.replaced("run", "quantized.safetensors", struct.pack("<Q", 1 << 62) + b"{}")


def key(name, value):
    return lambda m: m.update({name: value})


def row(**changes):
    return lambda m: m["layers"][3].update(changes)


def recipe(**changes):
    return lambda m: m["recipe"].update(changes)


def option(**changes):
    return lambda m: m["options"].update(changes)


RUNS: dict[str, Callable[[World], Path]] = {
    "link to itself": loop,
    "named pipe": fifo,
    "artefact is a file": lambda w: w.file("run", "not a folder"),
    "artefact is empty": lambda w: put(w.path / "run", Path.mkdir),
    "missing folder": lambda w: w.path / "run",
    "name with a line end": lambda w: w.path / "no\nsuch\x1b[31m",
    "name of 300 characters": lambda w: w.path / ("x" * 300),
    "dangling link": lambda w: put(w.path / "run", lambda path: path.symlink_to("nowhere")),
    "manifest is a folder": lambda w: as_folder(w, "run", "manifest.json"),
    "manifest is empty": lambda w: w.file("run/manifest.json", "").parent,
    "manifest is not an object": lambda w: w.file("run/manifest.json", "[1,2]").parent,
    "manifest is not UTF-8": lambda w: w.file("run/manifest.json", b"\xff\xfe{}").parent,
    "manifest with a key twice": lambda w: (
        w.file("run/manifest.json", '{"kind":"run","kind":"onnx"}').parent
    ),
    "weights missing": lambda w: without(w, "run", "quantized.safetensors"),
    "weights are a folder": lambda w: as_folder(w, "run", "quantized.safetensors"),
    "weights cut": lambda w: cut(w, "run", "quantized.safetensors"),
    "weights cut, hash kept": lambda w: cut(w, "run", "quantized.safetensors", again=False),
    "weights empty": lambda w: w.replaced("run", "quantized.safetensors", b""),
    "weights are text": lambda w: w.replaced(
        "run", "quantized.safetensors", "hello, I am no tensor"
    ),
    "weights with a huge header": huge_header,
    "trained cut": lambda w: cut(w, "run", "trained.safetensors"),
    "NaN in a scale": lambda w: w.tensors(by_end("activation.scale", at(float("nan")))),
    "infinite scale": lambda w: w.tensors(by_end("activation.scale", at(float("inf")))),
    "negative scale": lambda w: w.tensors(by_end("activation.scale", at(-0.1))),
    "scale 0": lambda w: w.tensors(by_end("activation.scale", at(0.0))),
    "weight scale 0": lambda w: w.tensors(by_end("weight.scale", at(0.0))),
    "weight scale negative": lambda w: w.tensors(by_end("weight.scale", at(-1.0))),
    "weight scale NaN": lambda w: w.tensors(by_end("weight.scale", at(float("nan")))),
    "inverse scale of another": lambda w: w.tensors(by_end("activation.inv_scale", at(1.5))),
    "low above high": lambda w: w.tensors(swap_tables),
    "high out of range of the bits": lambda w: w.tensors(by_end("activation.high", at(30000))),
    "zero point out of range of the bits": lambda w: w.tensors(
        by_end("weight.zero_point", at(9999))
    ),
    "bias NaN": lambda w: w.tensors(by_end(":bias", at(float("nan")))),
    "float part infinite": lambda w: w.tensors(
        lambda f: f.update({"float:conv_norm_out.weight": torch.full((8,), float("inf")).half()})
    ),
    "tables of 3 steps": lambda w: w.tensors(by_end("activation.scale", lambda t: torch.ones(3))),
    "tables of float64": lambda w: w.tensors(by_end("activation.scale", lambda t: t.double())),
    "codes of int64": lambda w: w.tensors(by_end("weight.codes", lambda t: t.long())),
    "codes of another shape": lambda w: w.tensors(swap_unequal),
    "tensor missing": lambda w: w.tensors(lambda f: f.pop("layer:conv_in:bias")),
    "surplus tensor": lambda w: w.tensors(lambda f: f.update({"layer:evil:bias": torch.ones(2)})),
    "source is empty": lambda w: w.edited("run", key("source", {})),
    "source.files in the parent folder": lambda w: w.edited(
        "run", lambda m: m["source"]["files"].update({"../../etc/passwd": "0" * 64})
    ),
    "source.files without a hash": lambda w: w.edited(
        "run", lambda m: m["source"]["files"].update({"unet/config.json": "x"})
    ),
    "denoiser in the parent folder": lambda w: w.edited("run", key("denoiser", "../x")),
    "denoiser absolute": lambda w: w.edited("run", key("denoiser", "/etc")),
    "denoiser is a scheduler": lambda w: w.edited("run", key("denoiser", "scheduler")),
    "denoiser empty": lambda w: w.edited("run", key("denoiser", "")),
    "files in the parent folder": lambda w: w.edited(
        "run", lambda m: m["files"].update({"../thesis.txt": "0" * 64})
    ),
    "files absolute": lambda w: w.edited(
        "run", lambda m: m["files"].update({"/etc/passwd": "0" * 64})
    ),
    "files empty": lambda w: w.edited("run", key("files", {})),
    "files with a backslash": lambda w: w.edited(
        "run", lambda m: m["files"].update({"..\\x": "0" * 64})
    ),
    "kind unknown": lambda w: w.edited("run", key("kind", "mystery")),
    "kind onnx": lambda w: w.edited("run", key("kind", "onnx")),
    "kind engine": lambda w: w.edited("run", key("kind", "engine")),
    "future format version": lambda w: w.edited("run", key("format_version", 99)),
    "format true": lambda w: w.edited("run", key("format_version", True)),
    "layers swapped": lambda w: w.edited("run", swap_rows),
    "layers twice": lambda w: w.edited("run", lambda m: m["layers"].append(m["layers"][0])),
    "layers empty": lambda w: w.edited("run", key("layers", [])),
    "layer with a line end": lambda w: w.edited("run", row(name="conv\nin\x1b[2J")),
    "layer with 0 bits": lambda w: w.edited("run", row(weight_bits=0)),
    "layer bits as text": lambda w: w.edited("run", row(weight_bits="4")),
    "layer input of itself": lambda w: w.edited(
        "run", lambda m: m["layers"][3].update(input_of=m["layers"][3]["name"])
    ),
    "reason of a megabyte": lambda w: w.edited("run", row(reason="x" * (1 << 20))),
    "recipe with other bits": lambda w: w.edited("run", recipe(bits="w8a8")),
    "recipe with invalid bits": lambda w: w.edited("run", recipe(bits="w99a99")),
    "recipe with other steps": lambda w: w.edited("run", recipe(steps=7)),
    "recipe static": lambda w: w.edited("run", recipe(tables="static")),
    "recipe with guidance -1": lambda w: w.edited("run", recipe(guidance=-1)),
    "recipe with a size": lambda w: w.edited("run", recipe(size="7x9")),
    "recipe with an unknown key": lambda w: w.edited("run", recipe(evil=1)),
    "recipe is a list": lambda w: w.edited("run", key("recipe", [])),
    "timesteps twice": lambda w: w.edited("run", key("timesteps", [1.0, 1.0])),
    "timesteps empty": lambda w: w.edited("run", key("timesteps", [])),
    "timesteps beyond": lambda w: w.edited("run", key("timesteps", [1.0, 1e300])),
    "structure unknown": lambda w: w.edited(
        "run", key("structure", {"attention": ["evil"], "splits": {}})
    ),
    "invalid loras": lambda w: w.edited("run", key("loras", [{"name": "x"}])),
    "metrics infinite": lambda w: w.edited("run", key("metrics", {"bytes": 10**400})),
    "classes of 10 MB": lambda w: w.replaced(
        "run", "classes.json", json.dumps({"labels": ["x" * (10 << 20), "b", "c"], "null_class": 3})
    ),
    "classes too few": lambda w: w.replaced(
        "run", "classes.json", '{"labels": ["a"], "null_class": 3}'
    ),
    "null class true": lambda w: w.replaced(
        "run", "classes.json", '{"labels":["a"],"null_class":true}'
    ),
    "config with huge channels": lambda w: w.edited(
        "run", key("block_out_channels", [1 << 40, 12]), "unet/config.json"
    ),
    "config of other channels": lambda w: w.edited(
        "run", key("block_out_channels", [8, 16]), "unet/config.json"
    ),
    "config with norm groups 0": lambda w: w.edited(
        "run", key("norm_num_groups", 0), "unet/config.json"
    ),
    "config of another class": lambda w: w.edited(
        "run", key("_class_name", "os.system"), "unet/config.json"
    ),
    "config size -8": lambda w: w.edited("run", key("sample_size", -8), "unet/config.json"),
    "scheduler unknown": lambda w: w.edited(
        "run", key("_class_name", "EvilScheduler"), "scheduler/scheduler_config.json"
    ),
    "scheduler of 0 steps": lambda w: w.edited(
        "run", key("num_train_timesteps", 0), "scheduler/scheduler_config.json"
    ),
    "scheduler of 10^9 steps": lambda w: w.edited(
        "run", key("num_train_timesteps", 10**9), "scheduler/scheduler_config.json"
    ),
    "scheduler of text": lambda w: w.edited(
        "run", key("beta_end", "big"), "scheduler/scheduler_config.json"
    ),
    "scheduler beta NaN": lambda w: w.edited(
        "run", key("beta_end", float("nan")), "scheduler/scheduler_config.json"
    ),
    "index with a foreign part": lambda w: w.edited(
        "run", key("unet", ["os", "system"]), "model_index.json"
    ),
    "index with a path": lambda w: w.edited(
        "run", key("../x", ["diffusers", "UNet2DModel"]), "model_index.json"
    ),
}


def first_external(model):
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def external(**values):
    def change(model):
        for entry in first_external(model).external_data:
            if entry.key in values:
                entry.value = values[entry.key]

    return change


def metadata(name, value):
    def change(model):
        for entry in model.metadata_props:
            if entry.key == name:
                entry.value = value

    return change


def no_metadata(model):
    del model.metadata_props[:]


def self_feeding(model):
    node = model.graph.node[3]
    node.input[0] = node.output[0]


def renamed_input(model):
    model.graph.input[0].name = "evil"


def huge_dimension(model):
    first_external(model).dims[:] = [1 << 40, 1 << 20]


def huge_axis(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1 << 40


def nan_table(model):
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if not tensor.external_data and tensor.data_type == 1 and len(tensor.dims):
            values = numpy_helper.to_array(tensor).copy()
            values[...] = float("nan")
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            return
    raise AssertionError("no table")


def custom_domain(model):
    model.graph.node[0].domain = "evil.example"


def duplicate_output(model):
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


GRAPHS: dict[str, Callable[[World], Path]] = {
    "graph is text": lambda w: w.replaced("onnx", "unet/model.onnx", "I am a text file\n" * 50),
    "graph is empty": lambda w: w.replaced("onnx", "unet/model.onnx", b""),
    "graph is zeros": lambda w: w.replaced("onnx", "unet/model.onnx", bytes(4096)),
    "graph cut": lambda w: cut(w, "onnx", "unet/model.onnx", 0.7),
    "graph is a folder": lambda w: as_folder(w, "onnx", "unet/model.onnx"),
    "graph missing": lambda w: without(w, "onnx", "unet/model.onnx"),
    "data missing": lambda w: without(w, "onnx", "unet/model.onnx_data"),
    "data cut": lambda w: cut(w, "onnx", "unet/model.onnx_data"),
    "data empty": lambda w: w.replaced("onnx", "unet/model.onnx_data", b""),
    "data elsewhere": lambda w: w.graph(external(location="../../thesis.txt")),
    "data at /etc/passwd": lambda w: w.graph(external(location="/etc/passwd")),
    "data length short": lambda w: w.graph(external(length="1")),
    "data length beyond": lambda w: w.graph(external(length=str(1 << 62))),
    "data length text": lambda w: w.graph(external(length="lots")),
    "data offset negative": lambda w: w.graph(external(offset="-4096")),
    "data offset beyond": lambda w: w.graph(external(offset=str(1 << 62))),
    "data offset text": lambda w: w.graph(external(offset="0x10")),
    "data not listed": lambda w: w.edited("onnx", lambda m: m["files"].pop("unet/model.onnx_data")),
    "metadata missing": lambda w: w.graph(no_metadata),
    "layers not JSON": lambda w: w.graph(metadata("trtq.layers", "{")),
    "layers of a list": lambda w: w.graph(metadata("trtq.layers", "[]")),
    "layers of other bits": lambda w: w.graph(
        metadata("trtq.layers", '{"conv_in": "conv2d w2a2"}')
    ),
    "timesteps of others": lambda w: w.graph(metadata("trtq.timesteps", "[1.0, 2.0]")),
    "timesteps of text": lambda w: w.graph(metadata("trtq.timesteps", "many")),
    "timesteps of NaN": lambda w: w.graph(metadata("trtq.timesteps", "[NaN, 1e999]")),
    "node that feeds itself": lambda w: w.graph(self_feeding),
    "input renamed": lambda w: w.graph(renamed_input),
    "weights of a petabyte": lambda w: w.graph(huge_dimension),
    "axis of 10^12": lambda w: w.graph(huge_axis),
    "table NaN": lambda w: w.graph(nan_table),
    "operator of a foreign domain": lambda w: w.graph(custom_domain),
    "value computed twice": lambda w: w.graph(duplicate_output),
    "no nodes": lambda w: w.graph(lambda m: m.graph.ClearField("node")),
    "options.batch of text": lambda w: w.edited("onnx", option(batch="1:8")),
    "options.batch reversed": lambda w: w.edited("onnx", option(batch=[8, 1])),
    "options.size invalid": lambda w: w.edited("onnx", option(size="evil")),
    "options.target unknown": lambda w: w.edited("onnx", option(target="evil")),
    "options.precision unknown": lambda w: w.edited("onnx", option(precision="fp2")),
    "options empty": lambda w: w.edited("onnx", key("options", {})),
    "options.backend unknown": lambda w: w.edited(
        "onnx", lambda m: m.update(kind="engine") or m["options"].update(backend="evil")
    ),
    "kind engine": lambda w: w.edited("onnx", key("kind", "engine")),
    "kind run": lambda w: w.edited("onnx", key("kind", "run")),
    "denoiser in the parent folder": lambda w: w.edited("onnx", key("denoiser", "../onnx/unet")),
    "named pipe": lambda w: fifo(w, "onnx"),
    "link to itself": lambda w: loop(w, "onnx"),
}


def engine(w, content=b"plan", **changes):
    """The output of `trtq build`, with a foreign plan."""
    folder = w.copy("onnx", "engine")
    (folder / "unet/model.onnx").rename(folder / "unet/model.engine")
    (folder / "unet/model.engine").write_bytes(content)
    (folder / "unet/model.onnx_data").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    profile = {"sample": [[1, 1, 8, 8], [1, 1, 8, 8], [8, 1, 8, 8]]}
    profile |= {"timestep": [[1], [1], [8]], "class_labels": [[1], [1], [8]]}
    manifest["kind"] = "engine"
    manifest["options"] |= {
        "backend": "tensorrt-rtx",
        "architectures": ["sm86"],
        "profiles": {"unet": profile},
    } | changes
    del manifest["files"]["unet/model.onnx"], manifest["files"]["unet/model.onnx_data"]
    manifest["files"]["unet/model.engine"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rehash(folder)


ENGINES: dict[str, Callable[[World], Path]] = {
    "foreign engine": engine,
    "engine empty": lambda w: engine(w, b""),
    "engine for a tensorrt that is missing": lambda w: engine(w, backend="tensorrt"),
    "engine of an unknown backend": lambda w: engine(w, backend="evil"),
    "engine without a backend": lambda w: engine(w, backend=None),
    "engine with invalid profiles": lambda w: engine(w, profiles={"unet": {"sample": "big"}}),
    "engine without profiles": lambda w: engine(w, profiles={}),
    "engine with profiles in the parent folder": lambda w: engine(w, profiles={"../x": {}}),
    "engine of a list of architectures": lambda w: engine(w, architectures=[[86]]),
    "engine without an architecture": lambda w: engine(w, architectures=[]),
    "engine of two": lambda w: engine(w, architectures=["sm86", "evil"]),
    "engine of architectures as text": lambda w: engine(w, architectures="sm86"),
}

ONE_BATCH = ("--batch-sizes", "1", "--images", "1", "--turns", "2", "--threads", "1")
OPENING: dict[str, Callable[[World, Path], list[Any]]] = {
    "inspect": lambda w, p: ["inspect", p],
    "verify": lambda w, p: ["verify", p, "--timeout", "20"],
    "generate": lambda w, p: ["generate", p, "-o", w.path / "out.png"],
    "export": lambda w, p: ["export", p, "-o", w.out],
    "build": lambda w, p: ["build", p, "-o", w.out, "--no-cache", "--arch", "sm86"],
    "eval": lambda w, p: ["eval", p, "--reference", w.made / "float", "--images", "2", "-o", w.out],
    "bench": lambda w, p: ["bench", p, w.made / "float", *ONE_BATCH, "-o", w.out],
    "package": lambda w, p: ["package", "triton", p, "-o", w.out],
    "quantize": lambda w, p: ["quantize", p, "-o", w.out, "--method", "minmax", "--steps", "2"],
}


# --- Arguments, places and the environment of a process -------------------------------------------


def small(w):
    return [
        "--recipe",
        w.file("recipe.toml", SMALL_CALIBRATION),
        "--method",
        "minmax",
        "--steps",
        "2",
    ]


def quantizing(*extra, out=None, model=None):
    def make(w):
        values = [value(w) if callable(value) else value for value in extra]
        return [
            "quantize",
            model or w.made / "float",
            "-o",
            out(w) if out else w.out,
            *small(w),
            *values,
        ]

    return make


def with_recipe(text):
    def make(w):
        return ["quantize", w.made / "float", "-o", w.out, "--recipe", w.file("hostile.toml", text)]

    return make


LAYER = "unet.mid_block.resnets.0.conv1"


def lora_tensors(**changes):
    tensors = {
        f"{LAYER}.lora_A.weight": torch.ones(2, 12, 3, 3),
        f"{LAYER}.lora_B.weight": torch.ones(12, 2, 1, 1),
    }
    return tensors | changes


def lora(w, name="style.safetensors", **changes):
    place = w.path / name
    save_file(lora_tensors(**changes), str(place))
    return place


def with_lora(*texts):
    """Values of `--lora`; FILE is replaced by the path of a valid LoRA file."""

    def make(w):
        good = lora(w)
        values = [text(w) if callable(text) else text.replace("FILE", str(good)) for text in texts]
        options = [part for value in values for part in ("--lora", value)]
        return ["quantize", w.made / "float", "-o", w.out, *small(w), *options]

    return make


def lora_of(content):
    return with_lora(lambda w: w.file("bad.safetensors", content))


def opening(verb, kind, *extra, path=None):
    def make(w):
        values = [value(w) if callable(value) else value for value in extra]
        place = path(w) if path else w.made / kind
        return [*OPENING[verb](w, place), *values]

    return make


def into(verb, kind, place):
    """A command with a hostile output path."""

    def make(w):
        arguments = OPENING[verb](w, w.made / kind)
        arguments[arguments.index("-o") + 1] = place(w)
        return arguments

    return make


def foreign(w):
    w.file("out/manifest.json", '{"manifest_version": 3}')
    w.file("out/src/thesis.txt", "precious")
    return w.out


def link_out(w):
    (w.path / "target").mkdir()
    w.out.symlink_to("target")
    return w.out


def loop_out(w):
    w.out.symlink_to("out")
    return w.out


def pipe_out(w):
    os.mkfifo(w.out)
    return w.out


def file_out(w):
    return w.file("out", "precious")


def below_file(w):
    return w.path / "thesis.txt" / "out"


PLACES: dict[str, Callable[[World], Any]] = {
    "a foreign folder": foreign,
    "a link": link_out,
    "a link to itself": loop_out,
    "a pipe": pipe_out,
    "a file": file_out,
    "below a file": below_file,
    "NUL": lambda w: f"{w.path}/o\0ut",
    "300 characters": lambda w: w.path / ("o" * 300),
    "empty": lambda w: "",
    "a dot": lambda w: ".",
    "the root": lambda w: "/",
    "home unexpanded": lambda w: "~/out",
    "/dev/full": lambda w: "/dev/full",
    "/proc": lambda w: "/proc/out",
    "inside an artefact": lambda w: w.copy("run") / "unet" / "out",
    "5000 characters": lambda w: w.path / "/".join(["o" * 200] * 25),
    "half of a surrogate": lambda w: f"{w.path}/o\udcff/\ud800",
}
WRITING = {
    "quantize": lambda w: ["quantize", w.made / "float", "-o", w.out, *small(w)],
    "export": lambda w: OPENING["export"](w, w.made / "run"),
    "build": lambda w: OPENING["build"](w, w.made / "onnx"),
    "generate": lambda w: OPENING["generate"](w, w.made / "run"),
    "eval": lambda w: OPENING["eval"](w, w.made / "run"),
    "bench": lambda w: OPENING["bench"](w, w.made / "run"),
    "package": lambda w: OPENING["package"](w, w.made / "onnx"),
    "demo": lambda w: ["demo", "-o", w.out, "--images", "20", "--iterations", "1"],
    "bench kernels": lambda w: ["bench", "kernels", "-o", w.out],
}


def other_shape(w):
    """A float model with another image size."""
    folder = w.copy("float", "other")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"sample_size": 16}))
    return folder


def other_classes(w):
    folder = w.copy("float", "other")
    place = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(str(place))
    key = "class_embedding.weight"
    tensors[key] = torch.cat([tensors[key], tensors[key][:2]])
    save_file(tensors, str(place))
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"num_class_embeds": 6}))
    (folder / "classes.json").write_text('{"labels": ["a","b","c","d","e"], "null_class": 5}')
    return folder


def busy_port(w):
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    w.undo.append(listening.close)
    return listening.getsockname()[1]


def serving(*extra, path=None):
    def make(w):
        values = [value(w) if callable(value) else value for value in extra]
        return ["serve", path(w) if path else w.made / "onnx", "--port", "0", *values]

    return make


def bench_json(change):
    def make(w):
        result = {
            "format_version": 2,
            "device": {},
            "date": None,
            "steps": 2,
            "guidance": 1.0,
            "model_class": "UNet2DModel",
            "shape": [1, 8, 8],
            "rows": [],
        }
        changed = change(result)
        return w.file("former.json", changed if isinstance(changed, str) else json.dumps(result))

    return make


def baseline(change):
    return opening("bench", "onnx", "--baseline", bench_json(change))


Make = Callable[[World], list[Any]]
CASES: list[tuple[str, Make, tuple[int, ...], str]] = [
    # quantize
    ("quantize: artefact is a file", quantizing(model=__file__), REFUSED, ""),
    ("quantize: a hub id with a quote", quantizing(model="evil'/\"model"), REFUSED, ""),
    (
        "quantize: a model like an option",
        lambda w: ["quantize", "--", "-rf", "-o", w.out],
        REFUSED,
        "",
    ),
    ("quantize: empty model", quantizing(model=" "), REFUSED, ""),
    ("quantize: NUL in the model", quantizing(model="a\0b"), REFUSED, ""),
    ("quantize: an emoji", quantizing(model="😀/😀"), REFUSED, ""),
    ("quantize: bits of nothing", quantizing("--bits", ""), REFUSED, ""),
    ("quantize: bits beyond", quantizing("--bits", "w9a999"), REFUSED, ""),
    ("quantize: Arabic digits", quantizing("--bits", "w٤a٨"), REFUSED, ""),
    ("quantize: method", quantizing("--method", "efficientdm;rm -rf ~"), REFUSED, ""),
    ("quantize: steps 0", quantizing("--steps", "0"), REFUSED, ""),
    ("quantize: steps 1e3", quantizing("--steps", "1e3"), REFUSED, ""),
    ("quantize: seed -1", quantizing("--seed", "-1"), REFUSED, ""),
    ("quantize: seed 2^64", quantizing("--seed", str(1 << 64)), REFUSED, ""),
    ("quantize: size 0x0", quantizing("--size", "0x0"), REFUSED, ""),
    ("quantize: size without end", quantizing("--size", "99999999x99999999"), REFUSED, ""),
    ("quantize: size of 5 numbers", quantizing("--size", "8x8x8:1"), REFUSED, ""),
    ("quantize: budget", quantizing("--budget", "size=-1x"), REFUSED, ""),
    ("quantize: budget NaN", quantizing("--budget", "size=nanx"), REFUSED, ""),
    ("quantize: budget 1e400", quantizing("--budget", "bitops=1e400x"), REFUSED, ""),
    ("quantize: budget impossible", quantizing("--budget", "size=0.0000001x"), REFUSED, ""),
    ("quantize: tables", quantizing("--tables", "none"), REFUSED, ""),
    ("quantize: resume of nothing", quantizing("--resume"), ANY, ""),
    ("quantize: a run again", lambda w: ["quantize", w.made / "run", "-o", w.out], REFUSED, ""),
    (
        "quantize: onto its own source",
        lambda w: ["quantize", (m := w.copy("float")), "-o", m, *small(w), "--overwrite"],
        REFUSED,
        "",
    ),
    (
        "quantize: into its own source",
        lambda w: ["quantize", (m := w.copy("float")), "-o", m / "unet", *small(w), "--overwrite"],
        REFUSED,
        "",
    ),
    ("quantize: base without LoRA", quantizing("--base", "/nonexistent"), ANY, ""),
    # recipes
    ("recipe: missing", quantizing("--recipe", lambda w: w.path / "no.toml"), REFUSED, ""),
    ("recipe: a folder", quantizing("--recipe", lambda w: w.path), REFUSED, ""),
    ("recipe: /dev/zero", quantizing("--recipe", "/dev/zero"), REFUSED, ""),
    (
        "recipe: a pipe",
        quantizing("--recipe", lambda w: put(w.path / "p", os.mkfifo)),
        REFUSED,
        "",
    ),
    ("recipe: empty", quantizing("--recipe", lambda w: w.file("e.toml")), ANY, ""),
    ("recipe: unknown key", with_recipe("mehtod = 'minmax'"), REFUSED, "mehtod"),
    ("recipe: unknown nested key", with_recipe("[calibration]\nimagse = 1"), REFUSED, "imagse"),
    ("recipe: a table as number", with_recipe("calibration = 3"), REFUSED, ""),
    ("recipe: a number as table", with_recipe("[steps]\nx=1"), REFUSED, ""),
    ("recipe: list of tables", with_recipe("[[calibration]]\nimages=1"), REFUSED, ""),
    ("recipe: key twice", with_recipe("steps=1\nsteps=2"), REFUSED, ""),
    ("recipe: images 10^18", with_recipe("[calibration]\nimages=1000000000000000000"), REFUSED, ""),
    ("recipe: images 0", with_recipe("[calibration]\nimages=0"), REFUSED, ""),
    ("recipe: a float for a number", with_recipe("steps=2.5"), REFUSED, ""),
    ("recipe: true for a number", with_recipe("steps=true"), REFUSED, ""),
    ("recipe: infinite guidance", with_recipe("guidance=inf"), REFUSED, ""),
    ("recipe: NaN", with_recipe("guidance=nan"), REFUSED, ""),
    ("recipe: a date", with_recipe("bits=2026-01-01"), REFUSED, ""),
    ("recipe: binary", with_recipe("\0\1\2"), REFUSED, ""),
    ("recipe: deep", with_recipe("a=" + "[" * 5000 + "]" * 5000), REFUSED, ""),
    ("recipe: policy missing", with_recipe("policy='/nonexistent/p.toml'"), REFUSED, ""),
    ("recipe: policy is itself", with_recipe("policy='hostile.toml'"), REFUSED, ""),
    ("recipe: policy of a folder", with_recipe("policy='/'"), REFUSED, ""),
    ("recipe: prompts for a model without", with_recipe("prompts='/etc/passwd'"), REFUSED, ""),
    (
        "recipe: policy that matches nothing",
        lambda w: [
            "quantize",
            w.made / "float",
            "-o",
            w.out,
            "--recipe",
            w.file("r.toml", f"policy = {json.dumps(str(w.file('p.toml', POLICY)))}"),
        ],
        REFUSED,
        "",
    ),
    ("recipe: training rank 0", with_recipe("[training]\nrank=0"), ANY, ""),
    ("recipe: training of 10^30", with_recipe(f"[training]\niterations={10**30}"), REFUSED, ""),
    # LoRA
    ("lora: twice", with_lora("FILE", "FILE"), ANY, ""),
    ("lora: 1e400", with_lora("FILE:1e400"), REFUSED, "1e400"),
    ("lora: NaN", with_lora("FILE:nan"), REFUSED, ""),
    ("lora: 1e38", with_lora("FILE:1e38"), ANY, ""),
    ("lora: no scale after the colon", with_lora("FILE:"), REFUSED, ""),
    ("lora: two scales", with_lora("FILE:1:2"), REFUSED, ""),
    ("lora: a Windows path", with_lora("C:\\x:0.5"), REFUSED, "C:\\x"),
    ("lora: a Windows path without scale", with_lora("C:\\x"), REFUSED, "C:\\x"),
    ("lora: empty", with_lora(""), REFUSED, ""),
    ("lora: only a scale", with_lora(":0.5"), REFUSED, ""),
    (
        "lora: an empty folder",
        with_lora(lambda w: (w.path / "f").mkdir() or w.path / "f"),
        REFUSED,
        "",
    ),
    ("lora: text", lora_of("hello" * 100), REFUSED, ""),
    ("lora: no bytes", lora_of(b""), REFUSED, ""),
    ("lora: huge header", lora_of(struct.pack("<Q", 1 << 60) + b"{}"), REFUSED, ""),
    ("lora: header of no object", lora_of(struct.pack("<Q", 2) + b"[]"), REFUSED, ""),
    (
        "lora: offsets beyond",
        lora_of(
            struct.pack("<Q", 70)
            + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8000000000000]}}'.ljust(70)
        ),
        REFUSED,
        "",
    ),
    ("lora: /dev/zero", with_lora("/dev/zero"), REFUSED, ""),
    (
        "lora: a pipe",
        with_lora(lambda w: str(put(w.path / "p", os.mkfifo))),
        REFUSED,
        "",
    ),
    ("lora: pickled", with_lora(lambda w: w.file("x.pt", b"\x80\x04.")), REFUSED, ""),
    (
        "lora: another shape",
        with_lora(
            lambda w: lora(
                w, "b.safetensors", **{f"{LAYER}.lora_A.weight": torch.ones(2, 99, 3, 3)}
            )
        ),
        REFUSED,
        "",
    ),
    (
        "lora: NaN inside",
        with_lora(
            lambda w: lora(
                w,
                "b.safetensors",
                **{f"{LAYER}.lora_A.weight": torch.full((2, 12, 3, 3), float("nan"))},
            )
        ),
        REFUSED,
        "",
    ),
    ("lora: name with an ESC", with_lora("/tmp/\x1b[31mred"), REFUSED, ""),
    (
        "lora: of a run without base",
        lambda w: [
            "quantize",
            w.copy("run"),
            "-o",
            w.out,
            "--lora",
            lora(w),
            "--base",
            w.path / "gone",
        ],
        REFUSED,
        "",
    ),
    (
        "lora: of a run with other options",
        lambda w: ["quantize", w.copy("run"), "-o", w.out, "--lora", lora(w), "--bits", "w8a8"],
        REFUSED,
        "keeps its recipe",
    ),
    # export
    ("export: target", opening("export", "run", "--target", "tpu"), REFUSED, "tpu"),
    ("export: precision", opening("export", "run", "--precision", "fp8"), REFUSED, "fp8"),
    ("export: batch upside down", opening("export", "run", "--batch-range", "8:1"), REFUSED, ""),
    ("export: batch 0", opening("export", "run", "--batch-range", "0:0"), REFUSED, ""),
    ("export: batch huge", opening("export", "run", "--batch-range", f"1:{10**30}"), REFUSED, ""),
    ("export: batch of three", opening("export", "run", "--batch-range", "1:2:3"), REFUSED, ""),
    ("export: batch of words", opening("export", "run", "--batch-range", "one:two"), REFUSED, ""),
    ("export: size upside down", opening("export", "run", "--size", "16x16:8x8"), REFUSED, ""),
    ("export: size huge", opening("export", "run", "--size", "8x8:99999999x99999999"), REFUSED, ""),
    ("export: size odd", opening("export", "run", "--size", "9x9"), REFUSED, ""),
    ("export: an ONNX folder", opening("export", "onnx"), REFUSED, ""),
    (
        "export: onto itself",
        lambda w: ["export", (r := w.copy("run")), "-o", r, "--overwrite"],
        REFUSED,
        "",
    ),
    # build
    ("build: backend", opening("build", "onnx", "--backend", "tvm"), REFUSED, "tvm"),
    ("build: arch", opening("build", "onnx", "--arch", "sm_99"), REFUSED, "cannot build for"),
    ("build: arch empty", opening("build", "onnx", "--arch", ""), REFUSED, ""),
    ("build: arch twice", opening("build", "onnx", "--arch", "sm86"), ANY, ""),
    ("build: batch beyond the export", opening("build", "onnx", "--batch-range", "1:64"), ANY, ""),
    ("build: batch 0", opening("build", "onnx", "--batch-range", "0"), REFUSED, ""),
    ("build: workspace 0", opening("build", "onnx", "--workspace", "0"), REFUSED, ""),
    ("build: workspace huge", opening("build", "onnx", "--workspace", str(1 << 40)), REFUSED, ""),
    ("build: a run", opening("build", "run"), REFUSED, ""),
    ("build: float folder", opening("build", "float"), REFUSED, ""),
    ("build: refit without a GPU", opening("build", "onnx", "--refit"), ANY, ""),
    (
        "build: onto its source",
        lambda w: ["build", (p := w.copy("onnx")), "-o", p, "--overwrite"],
        REFUSED,
        "",
    ),
    # generate
    ("generate: class", opening("generate", "run", "--class-label", "99"), REFUSED, ""),
    ("generate: class -1", opening("generate", "run", "--class-label", "-1"), REFUSED, ""),
    (
        "generate: class 2^70",
        opening("generate", "run", "--class-label", str(1 << 70)),
        REFUSED,
        "",
    ),
    ("generate: prompt", opening("generate", "run", "--prompt", "a dog"), REFUSED, ""),
    ("generate: guidance NaN", opening("generate", "run", "--guidance", "nan"), REFUSED, ""),
    ("generate: guidance -1", opening("generate", "run", "--guidance", "-1"), REFUSED, ""),
    ("generate: steps", opening("generate", "run", "--steps", "100000"), REFUSED, ""),
    ("generate: images", opening("generate", "run", "--images", "1000000000"), REFUSED, ""),
    ("generate: size", opening("generate", "onnx", "--size", "64x64"), REFUSED, ""),
    ("generate: provider", opening("generate", "onnx", "--provider", "tpu"), REFUSED, "tpu"),
    ("generate: cuda", opening("generate", "onnx", "--provider", "cuda"), REFUSED, ""),
    (
        "generate: torch for a graph",
        opening("generate", "onnx", "--provider", "torch"),
        REFUSED,
        "",
    ),
    ("generate: seed", opening("generate", "onnx", "--seed", "9" * 400), REFUSED, ""),
    (
        "generate: .jpg",
        lambda w: ["generate", w.made / "run", "-o", w.path / "out.jpg"],
        REFUSED,
        "",
    ),
    (
        "generate: onto a picture",
        lambda w: ["generate", w.made / "run", "-o", w.file("mine.png", "precious")],
        REFUSED,
        "",
    ),
    (
        "generate: into the artefact",
        lambda w: ["generate", (r := w.copy("run")), "-o", r / "x.png"],
        REFUSED,
        "",
    ),
    # eval
    (
        "eval: reference missing",
        lambda w: ["eval", w.made / "run", "--reference", w.path / "no", "--images", "2"],
        REFUSED,
        "",
    ),
    (
        "eval: reference of other classes",
        lambda w: ["eval", w.made / "run", "--reference", other_classes(w), "--images", "2"],
        REFUSED,
        "",
    ),
    (
        "eval: reference of another size",
        lambda w: ["eval", w.made / "run", "--reference", other_shape(w), "--images", "2"],
        REFUSED,
        "",
    ),
    (
        "eval: reference of another model",
        lambda w: [
            "eval",
            w.made / "run",
            "--reference",
            "shapes",
            "--images",
            "2",
            "--steps",
            "1",
        ],
        REFUSED,
        "",
    ),
    (
        "eval: digits as reference",
        lambda w: ["eval", w.made / "run", "--reference", "digits", "--images", "2"],
        REFUSED,
        "",
    ),
    ("eval: gate nonsense", opening("eval", "run", "--gate", "nonsense"), REFUSED, "nonsense"),
    ("eval: gate of an unknown metric", opening("eval", "run", "--gate", "joy>=1"), REFUSED, "joy"),
    ("eval: gate NaN", opening("eval", "run", "--gate", "fd<=nan"), REFUSED, ""),
    ("eval: gate empty", opening("eval", "run", "--gate", ""), REFUSED, ""),
    ("eval: gate of what is not computed", opening("eval", "run", "--gate", "fd<=1"), REFUSED, ""),
    ("eval: gate of 10^400", opening("eval", "run", "--gate", f"fd<={10**400}"), REFUSED, ""),
    ("eval: features missing", opening("eval", "run", "--features", "/nonexistent"), REFUSED, ""),
    ("eval: features a file", opening("eval", "run", "--features", __file__), REFUSED, ""),
    (
        "eval: features a model",
        opening("eval", "run", "--features", lambda w: w.made / "float"),
        REFUSED,
        "",
    ),
    ("eval: images 1", opening("eval", "run", "--images", "1"), REFUSED, ""),
    ("eval: provider", opening("eval", "run", "--provider", "openvino"), REFUSED, ""),
    (
        "eval: onto its artefact",
        lambda w: [
            "eval",
            (r := w.copy("run")),
            "--reference",
            w.made / "float",
            "-o",
            r,
            "--overwrite",
        ],
        REFUSED,
        "",
    ),
    # bench
    ("bench: the same twice", opening("bench", "onnx", lambda w: w.made / "onnx"), REFUSED, ""),
    (
        "bench: a provider that is none",
        lambda w: ["bench", f"{w.made / 'onnx'}@tpu", *ONE_BATCH],
        REFUSED,
        "tpu",
    ),
    (
        "bench: a provider that is not there",
        lambda w: ["bench", w.made / "onnx", "--provider", "evil", *ONE_BATCH],
        REFUSED,
        "evil",
    ),
    ("bench: batch 0", opening("bench", "onnx", "--batch-sizes", "0"), REFUSED, ""),
    ("bench: batch twice", opening("bench", "onnx", "--batch-sizes", "1,1,1"), REFUSED, ""),
    ("bench: batch empty", opening("bench", "onnx", "--batch-sizes", ""), REFUSED, ""),
    ("bench: batch huge", opening("bench", "onnx", "--batch-sizes", "1" * 5000), REFUSED, ""),
    ("bench: turns 1", opening("bench", "onnx", "--turns", "1"), REFUSED, ""),
    ("bench: threads 10^9", opening("bench", "onnx", "--threads", "1000000000"), REFUSED, ""),
    ("bench: no paths", lambda w: ["bench"], REFUSED, ""),
    ("bench: an at sign alone", lambda w: ["bench", "@", *ONE_BATCH], REFUSED, ""),
    (
        "bench: of other models",
        lambda w: ["bench", w.made / "onnx", "shapes", *ONE_BATCH],
        REFUSED,
        "",
    ),
    (
        "bench: baseline missing",
        opening("bench", "onnx", "--baseline", "/nonexistent"),
        REFUSED,
        "",
    ),
    ("bench: baseline text", baseline(lambda r: "hello"), REFUSED, ""),
    ("bench: baseline a list", baseline(lambda r: "[1]"), REFUSED, ""),
    ("bench: baseline rows of text", baseline(lambda r: r.update(rows=["x"])), REFUSED, ""),
    ("bench: baseline steps as text", baseline(lambda r: r.update(steps="two")), REFUSED, ""),
    ("bench: baseline NaN", baseline(lambda r: r.update(guidance=float("nan"))), REFUSED, ""),
    ("bench: baseline format 99", baseline(lambda r: r.update(format_version=99)), REFUSED, ""),
    ("bench: baseline a list of devices", baseline(lambda r: r.update(device=[1])), REFUSED, ""),
    ("bench: baseline deep JSON", baseline(lambda r: "[" * 100000), REFUSED, ""),
    ("bench kernels: no GPU", lambda w: ["bench", "kernels"], REFUSED, ""),
    ("bench kernels: form", lambda w: ["bench", "kernels", "--form", "w1a1"], REFUSED, ""),
    # inspect, verify
    ("inspect: digits", lambda w: ["inspect", "digits"], (0,), ""),
    ("inspect: a hub id", lambda w: ["inspect", "nobody/nothing"], REFUSED, ""),
    ("inspect: above", lambda w: ["inspect", w.made / "run/../run/unet"], REFUSED, ""),
    ("inspect: NUL", lambda w: ["inspect", "a\0b"], REFUSED, ""),
    ("inspect: half of a surrogate", lambda w: ["inspect", "a\udcff"], REFUSED, ""),
    ("verify: runtime", opening("verify", "onnx", "--runtime", "tvm"), REFUSED, ""),
    (
        "verify: itself as run",
        opening("verify", "onnx", "--run", lambda w: w.made / "onnx"),
        REFUSED,
        "",
    ),
    (
        "verify: another run",
        lambda w: [
            "verify",
            w.made / "onnx",
            "--run",
            w.edited("run", lambda m: m["recipe"].update(seed=7)),
        ],
        REFUSED,
        "",
    ),
    ("verify: layers alone", opening("verify", "onnx", "--layers"), REFUSED, ""),
    (
        "verify: a run of a run",
        opening("verify", "run", "--run", lambda w: w.made / "run"),
        REFUSED,
        "",
    ),
    ("verify: timeout 0", opening("verify", "onnx", "--timeout", "0"), REFUSED, ""),
    ("verify: timeout NaN", opening("verify", "onnx", "--timeout", "nan"), REFUSED, ""),
    ("verify: float folder", opening("verify", "float"), REFUSED, ""),
    ("verify: digits", lambda w: ["verify", "digits"], REFUSED, ""),
    ("verify: NUL", lambda w: ["verify", "a\0b"], REFUSED, ""),
    # serve
    (
        "serve: port in use",
        lambda w: ["serve", w.made / "onnx", "--port", busy_port(w)],
        REFUSED,
        "--port",
    ),
    ("serve: port 99999", lambda w: ["serve", w.made / "onnx", "--port", "99999"], REFUSED, ""),
    ("serve: host nonsense", serving("--host", "no such host!"), REFUSED, ""),
    ("serve: host empty", serving("--host", "", "--port", "-1"), REFUSED, ""),
    ("serve: host NUL", serving("--host", "a\0b"), REFUSED, ""),
    ("serve: host of 300 characters", serving("--host", "h" * 300), REFUSED, ""),
    ("serve: host of IPv6 nonsense", serving("--host", ":::::1"), REFUSED, ""),
    ("serve: another machine's address", serving("--host", "192.0.2.1"), REFUSED, ""),
    ("serve: key file empty", serving("--api-key-file", lambda w: w.file("key")), REFUSED, ""),
    ("serve: key file a folder", serving("--api-key-file", lambda w: w.path), REFUSED, ""),
    (
        "serve: key file binary",
        serving("--api-key-file", lambda w: w.file("key", b"\xff\0")),
        REFUSED,
        "",
    ),
    ("serve: key file /dev/zero", serving("--api-key-file", "/dev/zero"), REFUSED, ""),
    ("serve: name with a slash", serving("--name", "a/b"), REFUSED, ""),
    ("serve: name of nothing", serving("--name", ""), REFUSED, ""),
    ("serve: name with a line end", serving("--name", "a\nb"), REFUSED, ""),
    ("serve: batch sizes 0", serving("--batch-sizes", "0"), REFUSED, ""),
    ("serve: batch sizes of words", serving("--batch-sizes", "one"), REFUSED, ""),
    ("serve: batch sizes beyond", serving("--batch-sizes", "1,2,4096"), REFUSED, ""),
    ("serve: batching", serving("--batching", "sometimes"), REFUSED, ""),
    ("serve: replicas upside down", serving("--ray", "--replicas", "2:1"), REFUSED, ""),
    ("serve: replicas without Ray", serving("--replicas", "1:2"), REFUSED, "--ray"),
    ("serve: provider", serving("--provider", "tpu"), REFUSED, ""),
    ("serve: itself as second model", serving("--beside", lambda w: w.made / "onnx"), REFUSED, ""),
    ("serve: second model missing", serving("--beside", "/nonexistent"), REFUSED, ""),
    ("serve: deadline NaN", serving("--deadline-seconds", "nan"), REFUSED, ""),
    ("serve: allowed host", serving("--allowed-host", "http://x/y"), REFUSED, ""),
    ("serve: allowed origin", serving("--allowed-origin", "not an origin"), REFUSED, ""),
    ("serve: missing", serving(path=lambda w: w.path / "no"), REFUSED, ""),
    ("serve: a file", serving(path=lambda w: w.path / "thesis.txt"), REFUSED, ""),
    # package
    ("package: a run", opening("package", "run"), REFUSED, ""),
    ("package: float", opening("package", "float"), REFUSED, ""),
    (
        "package: --onnx of a graph",
        opening("package", "onnx", "--onnx", lambda w: w.made / "onnx"),
        ANY,
        "",
    ),
    (
        "package: --onnx missing",
        lambda w: ["package", "triton", engine(w), "-o", w.out, "--onnx", w.path / "no"],
        REFUSED,
        "",
    ),
    (
        "package: --onnx of a run",
        lambda w: ["package", "triton", engine(w), "-o", w.out, "--onnx", w.made / "run"],
        REFUSED,
        "",
    ),
    (
        "package: --onnx of another",
        lambda w: ["package", "triton", engine(w), "-o", w.out, "--onnx", w.made / "onnx"],
        REFUSED,
        "",
    ),
    (
        "package: onto itself",
        lambda w: ["package", "triton", (p := w.copy("onnx")), "-o", p, "--overwrite"],
        REFUSED,
        "",
    ),
    (
        "package: into itself",
        lambda w: ["package", "triton", (p := w.copy("onnx")), "-o", p / "x"],
        REFUSED,
        "",
    ),
    ("package: no verb", lambda w: ["package"], (0, 2), ""),
    ("package: another verb", lambda w: ["package", "torchserve", "x", "-o", w.out], REFUSED, ""),
    ("package: missing", opening("package", "onnx", path=lambda w: w.path / "no"), REFUSED, ""),
    ("package: NUL", opening("package", "onnx", path=lambda w: "a\0b"), REFUSED, ""),
    # plugins
    *(
        (
            f"plugins: arch {arch[:20]!r}",
            lambda w, arch=arch: ["plugins", "build", "--arch", arch],
            REFUSED,
            "",
        )
        for arch in (
            "sm_99",
            "",
            "sm9999",
            "sm",
            "SM89 ",
            "sm89;rm -rf",
            "../x",
            "compute_89",
            "sm-1",
            "x" * 5000,
            "sm٨٩",
            "a\0b",
            "\x1b[31m",
        )
    ),
    # demo
    ("demo: images 1", lambda w: ["demo", "-o", w.out, "--images", "1"], REFUSED, ""),
    ("demo: provider", lambda w: ["demo", "-o", w.out, "--provider", "tpu"], REFUSED, "tpu"),
    ("demo: iterations 0", lambda w: ["demo", "-o", w.out, "--iterations", "0"], REFUSED, ""),
    (
        "demo: foreign folder with overwrite",
        lambda w: ["demo", "-o", foreign(w), "--overwrite"],
        REFUSED,
        "",
    ),
    ("demo: a run", lambda w: ["demo", "-o", w.copy("run", "out"), "--overwrite"], REFUSED, ""),
    # doctor and the command itself
    ("doctor: an argument", lambda w: ["doctor", "now"], REFUSED, ""),
    ("doctor: plain", lambda w: ["doctor"], (0,), ""),
    ("no such verb", lambda w: ["quantise"], REFUSED, ""),
    ("an option alone", lambda w: ["--evil"], REFUSED, ""),
    ("an empty verb", lambda w: [""], REFUSED, ""),
    ("a verb with an ESC", lambda w: ["\x1b[31m"], REFUSED, ""),
]
POLICY = 'family = "UNet2DModel"\n'


# --- The environment of a process -----------------------------------------------------------------


def gone(w):
    """A working directory that is deleted while the process runs."""
    place = w.path.parent / "gone"
    place.mkdir()
    return {"preexec_fn": lambda: (os.chdir(place), place.rmdir())}


def limited(name, amount):
    def limit(w):
        import resource

        kind = getattr(resource, name)
        return {"preexec_fn": lambda: resource.setrlimit(kind, (amount, amount))}

    return limit


def closed(*descriptors):
    def close(w):
        return {"preexec_fn": lambda: [os.close(descriptor) for descriptor in descriptors]}

    return close


def variables(**values):
    def env(w):
        env = {name: value(w) if callable(value) else value for name, value in values.items()}
        return {"env": env}

    return env


SURROUNDINGS: dict[str, Callable[[World], dict[str, Any]]] = {
    "an impossible cache path": variables(TRTQ_CACHE="/proc/nonexistent"),
    "a cache that is a file": variables(TRTQ_CACHE=lambda w: str(w.file("cache", "precious"))),
    "an empty cache's name": variables(TRTQ_CACHE="", HOME=None, XDG_CACHE_HOME=None),
    "no home": variables(HOME=None, TRTQ_CACHE=None, XDG_CACHE_HOME="/proc/x"),
    "a home that is a file": variables(
        HOME=lambda w: str(w.file("home", "precious")), TRTQ_CACHE=None, XDG_CACHE_HOME=None
    ),
    "no folder for temporary files": variables(TMPDIR="/nonexistent"),
    "invalid number of threads": variables(OMP_NUM_THREADS="abc"),
    "columns below 0": variables(COLUMNS="-1", LINES="x"),
    "columns of 10^9": variables(COLUMNS="1000000000"),
    "an ASCII terminal": variables(LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
    "a dumb terminal": variables(TERM="dumb", FORCE_COLOR="1"),
    "an invalid processor": variables(TRTQ_CPU="z80"),
    "an API key with a line end": variables(TRTQ_API_KEY="a\nb"),
    "standard input closed": closed(0),
    "all streams closed": closed(0, 1, 2),
    "a deleted working directory": gone,
    "12 open files": limited("RLIMIT_NOFILE", 12),
    "no file above 200 bytes": limited("RLIMIT_FSIZE", 200),
    "no file above 20 kB": limited("RLIMIT_FSIZE", 20_000),
    "1 GB of addresses": limited("RLIMIT_AS", 1 << 30),
}
SURROUNDED: dict[str, Callable[[World], list[Any]]] = {
    "quantize": lambda w: ["quantize", w.made / "float", "-o", w.out, *small(w)],
    "generate": lambda w: ["generate", w.made / "onnx", "-o", w.path / "out.png"],
    "inspect": lambda w: ["inspect", w.made / "run"],
    "doctor": lambda w: ["doctor"],
    "verify": lambda w: ["verify", w.made / "onnx"],
}
FAST_SURROUNDED = (("inspect", "a deleted working directory"),)


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, made, monkeypatch):
    """The folder of a case, which also receives temporary files, so that leftovers are detected."""
    place = tmp_path / "world"
    place.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)
    world = World(place, made)
    yield world
    for undo in world.undo:
        undo()


def marked(keys, is_fast):
    """Test parameters by key; all except the fast ones are marked slow."""
    return [
        pytest.param(*key, marks=() if is_fast(*key) else pytest.mark.slow, id=" ".join(key))
        for key in keys
    ]


def check(world, arguments, codes=ANY, says="", how=None):
    before = snapshot(world.path)
    originals = snapshot(world.made)
    answer = invoke(*arguments) if how is None else start(*arguments, **how)
    judge(world, answer, before, codes, says)
    assert snapshot(world.made) == originals


@pytest.mark.parametrize(
    ("verb", "name"),
    marked(
        [(v, n) for v in OPENING if v != "bench" for n in RUNS],
        lambda verb, name: verb == "inspect",
    ),
)
def test_a_damaged_or_edited_run_is_refused_in_one_line(world, verb, name):
    place = RUNS[name](world)
    check(world, OPENING[verb](world, place), says=SAYS.get(name, "") if verb == "inspect" else "")


@pytest.mark.parametrize(
    ("verb", "name"),
    marked(
        [(v, n) for v in OPENING if v not in ("bench", "build") for n in GRAPHS],
        lambda verb, name: verb == "inspect" and name in list(GRAPHS)[-12:],
    ),
)
def test_a_damaged_or_edited_graph_is_refused_in_one_line(world, verb, name):
    place = GRAPHS[name](world)
    check(
        world, OPENING[verb](world, place), (1,) if verb == "verify" and name not in WELL else ANY
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_verify_accepts_no_run_that_cannot_generate(world, name):
    place = RUNS[name](world)
    check(world, ["verify", place], ANY if name in WELL else REFUSED)


@pytest.mark.parametrize(
    ("verb", "name"),
    marked(
        [(v, n) for v in OPENING for n in ENGINES if v != "bench" or n == "foreign engine"],
        lambda verb, name: verb == "inspect",
    ),
)
def test_a_foreign_engine_is_refused_in_one_line(world, verb, name):
    place = ENGINES[name](world)
    check(world, OPENING[verb](world, place))


@pytest.mark.parametrize(
    ("verb", "name"),
    marked(
        [(v, n) for v in WRITING for n in PLACES],
        lambda verb, name: verb in ("quantize", "bench kernels"),
    ),
)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_nothing_is_written_to_a_hostile_path(world, verb, name, overwrite):
    arguments = WRITING[verb](world)
    arguments[arguments.index("-o") + 1] = PLACES[name](world)
    if verb == "generate" and name in ("the root", "a foreign folder", "a link"):
        arguments += ["--class-label", "99"]  # `generate` adds images to the user's folders.
    check(world, arguments + ["--overwrite"] * overwrite, ANY if name in NEW else REFUSED)


def _first_of_their_verb(count):
    seen: dict[str, int] = {}
    names = set()
    for name, *_ in CASES:
        verb = name.partition(":")[0]
        seen[verb] = seen.get(verb, 0) + 1
        if seen[verb] <= count and name not in SLOW:
            names.add(name)
    return names


SLOW = (
    *(
        "build: arch twice",
        "lora: 1e38",
        "package: --onnx of a graph",
        "eval: reference of another model",
    ),
    *("verify: itself as run", "verify: another run", "bench: of other models"),
)
_FAST = _first_of_their_verb(4)


@pytest.mark.parametrize(
    ("make", "codes", "says"),
    [
        pytest.param(*case, id=name, marks=() if name in _FAST else pytest.mark.slow)
        for name, *case in CASES
    ],
)
def test_invalid_arguments_are_refused_in_one_line(world, make, codes, says):
    check(world, make(world), codes, says)


@pytest.mark.skipif(
    os.name != "posix", reason="resource limits and descriptors exist on POSIX only"
)
@pytest.mark.parametrize(
    ("verb", "name"),
    marked([(v, n) for v in SURROUNDED for n in SURROUNDINGS], lambda *key: key in FAST_SURROUNDED),
)
def test_a_hostile_environment_loses_no_file_and_prints_no_traceback(world, verb, name):
    how = SURROUNDINGS[name](world)
    check(world, SURROUNDED[verb](world), ANY, how=how)


@pytest.mark.parametrize("version", [None, "", "nonsense", "999.0", "\x1b[31m"])
def test_doctor_works_with_broken_packages(world, monkeypatch, version):
    from trtq.engine import doctor

    monkeypatch.setattr(doctor, "_version", lambda package: version)
    check(world, ["doctor"])
    check(world, ["doctor", "--json"])


def test_every_command_is_tested_with_twelve_or_more_hostile_inputs():
    met = {verb: set() for verb in VERBS}
    for name, *_ in CASES:
        verb = name.partition(":")[0].partition(" kernels")[0]
        met.setdefault(verb, set()).add(name)
    for table in (RUNS, GRAPHS, ENGINES):
        for verb in OPENING:
            met[verb] |= set(table)
    for verb in WRITING:
        met[verb.partition(" kernels")[0]] |= set(PLACES)
    for verb in SURROUNDED:
        met[verb] |= set(SURROUNDINGS)
    assert {
        verb: len(names) for verb, names in met.items() if verb in VERBS and len(names) < 12
    } == {}
    assert all(
        sum(name.startswith(kind) for name, *_ in CASES) >= 12 for kind in ("lora:", "recipe:")
    )


VERBS = (
    *("quantize", "export", "build", "generate", "eval", "bench", "inspect", "verify", "serve"),
    *("package", "plugins", "doctor", "demo"),
)
NEW = ("inside an artefact",)
# Changes that `verify` may accept, since the artefact still generates images.
WELL: tuple[str, ...] = (
    *(
        "trained cut",
        "source.files in the parent folder",
        "recipe with other bits",
        "recipe with an unknown key",
    ),
    *("classes of 10 MB", "classes too few", "scheduler unknown"),
    "metadata missing",  # Without metadata a graph is not compared with the manifest.
)
SAYS: dict[str, str] = {
    "link to itself": "is missing, though the manifest lists it",
    "named pipe": "is a named pipe",
    "manifest is a folder": "it is a folder",
    "manifest with a key twice": "'kind' is given twice",
    "weights cut, hash kept": "SHA-256 differs",
    "weights cut": "cannot read",
    "NaN in a scale": "layer 'conv_in': the table activation.scale",
    "negative scale": "positive finite numbers",
    "weight scale 0": "the weight's scale",
    "zero point out of range of the bits": "layer 'conv_in': 8-bit weights minus their zero points",
    "low above high": "are not a range around zero",
    "bias NaN": "layer 'conv_in': the bias holds NaN",
    "float part infinite": "'conv_norm_out.weight' holds NaN or infinity",
    "tables of 3 steps": "has shape (3,), though the manifest lists 2 timesteps",
    "tensor missing": "as bias, the file none",
    "surplus tensor": "['evil']",
    "denoiser in the parent folder": "got '../x'",
    "files in the parent folder": "'../thesis.txt' leaves the folder",
    "kind unknown": "got 'mystery'",
    "future format version": "format version 99",
    "layers twice": "'conv_in' is listed twice",
    "recipe with invalid bits": "got 'w99a99'",
    "recipe static": "static tables have one, got 2",
    "timesteps beyond": "the manifest was edited",
    "structure unknown": "'evil'",
    "index with a path": "'../x'",
}
