"""Every verb against inputs that nobody sane gives it: one line that says what came, and nothing of the user's changed.

Each case says what stands where, which arguments follow, and what the message names. After each, whatever the
verb answered: no traceback, no internal error, no hang, every file beside the output as it was, and after
a refusal nothing new at all, not even hidden.
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

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.conftest import tiny_pipeline
from trtq.cli import app
from trtq.stages.export import export_onnx
from trtq.stages.quantize import quantize

MOST_SECONDS = 60
RECIPE = {
    "method": "minmax",
    "bits": "w4a8",
    "steps": 2,
    "calibration": {"images": 4, "batch": 4, "samples_per_step": 64},
}
QUICK = '[calibration]\nimages=4\nbatch=4\nsamples_per_step=64\n'
ANY = (0, 1, 2)
REFUSED = (1, 2)
ROOT = os.getuid() == 0 if hasattr(os, "getuid") else False


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny class-conditional model as folders: float, run and onnx."""
    place = tmp_path_factory.mktemp("made")
    model = place / "float"
    tiny_pipeline().save_pretrained(model)
    index = json.loads((model / "model_index.json").read_text())
    index = {key: value for key, value in index.items() if key != "null_class"}
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDIMPipeline"}))
    classes = {"labels": ["a", "b", "c"], "null_class": 3}
    (model / "classes.json").write_text(json.dumps(classes))
    quantize(str(model), RECIPE, place / "run")
    export_onnx(place / "run", place / "onnx")
    _move_weights_out(place / "onnx")
    return place


def _move_weights_out(folder: Path) -> None:
    """Into the file beside the graph, where those of larger models are."""
    import onnx

    place = folder / "unet/model.onnx"
    model = onnx.load(str(place))
    (folder / "unet/model.onnx_data").unlink(missing_ok=True)
    onnx.save_model(
        model,
        str(place),
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=64,
    )
    rehash(folder)


class World:
    """A user's folder: what the case makes, precious files beside it, and copies of artefacts."""

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

    def edited(self, kind: str, change: Callable[[dict[str, Any]], object], file="manifest.json") -> Path:
        """A copy whose document was changed, with all hashes made again."""
        folder = self.copy(kind)
        document = json.loads((folder / file).read_text())
        change(document)
        (folder / file).write_text(json.dumps(document))
        return folder if file == "manifest.json" else rehash(folder)

    def replaced(self, kind: str, file: str, content: str | bytes) -> Path:
        """A copy in which a file holds something else, with all hashes made again."""
        folder = self.copy(kind)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        return rehash(folder)

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """A run whose packed tensors were changed, with all hashes made again."""
        folder = self.copy("run")
        place = folder / "quantized.safetensors"
        with safe_open(str(place), "pt") as file:
            metadata = file.metadata()
        found = load_file(str(place))
        change(found)
        save_file(found, str(place), metadata)
        return rehash(folder)

    def graph(self, change: Callable[[Any], object]) -> Path:
        """An ONNX folder whose graph was changed, with all hashes made again."""
        import onnx

        folder = self.copy("onnx")
        place = folder / "unet/model.onnx"
        model = onnx.load(str(place), load_external_data=False)
        change(model)
        place.write_bytes(model.SerializeToString())
        return rehash(folder)


def rehash(folder: Path) -> Path:
    """What an attacker does after editing."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """What each file, link and folder below one is."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            key = os.fsencode(path.relative_to(folder)).decode("ascii", "backslashreplace")
            if path.is_symlink():
                found[key] = f"link to {os.readlink(path)}"
            elif path.is_file():
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[key] = "folder" if path.is_dir() else "special"
    return found


class _HungError(BaseException):
    """No verb catches it."""


@contextlib.contextmanager
def at_most(seconds):
    def ring(number, frame):
        raise _HungError(f"ran past {seconds} s")

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def invoke(*arguments) -> tuple[int, str]:
    """Exit code and all that was printed, in this process."""
    with at_most(MOST_SECONDS):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return result.exit_code, result.output


def start(*arguments, env=None, **how) -> tuple[int, str]:
    """Exit code and all that was printed, in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-c", "from trtq.cli import app; app()", *map(str, arguments)]
    how = {"stdin": subprocess.DEVNULL} | how
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        timeout=MOST_SECONDS,
        check=False,
        **how,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace")


def judge(world: World, answer: tuple[int, str], before: dict[str, str], codes, says: str) -> None:
    code, text = answer
    said = " ".join(text.split())
    assert "Traceback" not in text, text
    assert "internal error" not in text, text
    assert code in codes, (code, said)
    assert says in said, (code, said)
    after = snapshot(world.path)
    changed = [name for name, what in before.items() if after.get(name) != what]
    assert changed == [], said
    new = [name for name in after if name not in before]
    if code:
        assert new == [], said
    else:
        strange = [n for n in new if n != "out" and not n.startswith(("out/", "out."))]
        assert strange == [], said


# --- Artefacts: damaged or edited, opened by every verb that opens one -----------------------------------


def by_end(end: str, change: Callable[[torch.Tensor], torch.Tensor]):
    """Change the first tensor of a layer whose name ends so."""

    def edit(found):
        key = next(key for key in sorted(found) if key.startswith("layer:") and key.endswith(end))
        found[key] = change(found[key].clone())

    return edit


def swap_tables(found):
    low, high = (next(k for k in sorted(found) if k.endswith(f"activation.{e}")) for e in ("low", "high"))
    found[low], found[high] = found[high], found[low]


def swap_layers(found):
    """Weights of two layers of one shape, exchanged: nothing but the hash can know."""
    one, two = [k for k in sorted(found) if k.endswith("resnets.0.conv2:weight.codes")][:2]
    found[one], found[two] = found[two], found[one]


def swap_unequal(found):
    one, two = "layer:conv_in:weight.codes", "layer:conv_out:weight.codes"
    found[one], found[two] = found[two], found[one]


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
    "artefact is empty": lambda w: (w.path / "run").mkdir() or w.path / "run",
    "no such": lambda w: w.path / "run",
    "name with a line end": lambda w: w.path / "no\nsuch\x1b[31m",
    "name of 300 characters": lambda w: w.path / ("x" * 300),
    "dangling link": lambda w: (w.path / "run").symlink_to("nowhere") or w.path / "run",
    "manifest is a folder": lambda w: as_folder(w, "run", "manifest.json"),
    "manifest is empty": lambda w: w.replaced("float", "model_index.json", "") if False else w.file(
        "run/manifest.json", ""
    ).parent,
    "manifest is no object": lambda w: w.file("run/manifest.json", "[1,2]").parent,
    "manifest is no UTF-8": lambda w: w.file("run/manifest.json", b"\xff\xfe{}").parent,
    "manifest with a key twice": lambda w: w.file("run/manifest.json", '{"kind":"run","kind":"onnx"}').parent,
    "weights missing": lambda w: without(w, "run", "quantized.safetensors"),
    "weights are a folder": lambda w: as_folder(w, "run", "quantized.safetensors"),
    "weights cut": lambda w: cut(w, "run", "quantized.safetensors"),
    "weights cut, hash kept": lambda w: cut(w, "run", "quantized.safetensors", again=False),
    "weights empty": lambda w: w.replaced("run", "quantized.safetensors", b""),
    "weights are text": lambda w: w.replaced("run", "quantized.safetensors", "hello, I am no tensor"),
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
    "high beyond the bits": lambda w: w.tensors(by_end("activation.high", at(30000))),
    "zero point beyond the bits": lambda w: w.tensors(by_end("weight.zero_point", at(9999))),
    "bias NaN": lambda w: w.tensors(by_end(":bias", at(float("nan")))),
    "float part infinite": lambda w: w.tensors(
        lambda f: f.update({"float:conv_norm_out.weight": torch.full((8,), float("inf")).half()})
    ),
    "tables of 3 steps": lambda w: w.tensors(by_end("activation.scale", lambda t: torch.ones(3))),
    "tables of float64": lambda w: w.tensors(by_end("activation.scale", lambda t: t.double())),
    "codes of int64": lambda w: w.tensors(by_end("weight.codes", lambda t: t.long())),
    "codes of another shape": lambda w: w.tensors(swap_unequal),
    "tensor missing": lambda w: w.tensors(lambda f: f.pop("layer:conv_in:bias")),
    "tensor too many": lambda w: w.tensors(lambda f: f.update({"layer:evil:bias": torch.ones(2)})),
    "source is empty": lambda w: w.edited("run", key("source", {})),
    "source.files above": lambda w: w.edited(
        "run", lambda m: m["source"]["files"].update({"../../etc/passwd": "0" * 64})
    ),
    "source.files of no hash": lambda w: w.edited(
        "run", lambda m: m["source"]["files"].update({"unet/config.json": "x"})
    ),
    "denoiser above": lambda w: w.edited("run", key("denoiser", "../x")),
    "denoiser absolute": lambda w: w.edited("run", key("denoiser", "/etc")),
    "denoiser a scheduler": lambda w: w.edited("run", key("denoiser", "scheduler")),
    "denoiser empty": lambda w: w.edited("run", key("denoiser", "")),
    "files above": lambda w: w.edited("run", lambda m: m["files"].update({"../thesis.txt": "0" * 64})),
    "files absolute": lambda w: w.edited("run", lambda m: m["files"].update({"/etc/passwd": "0" * 64})),
    "files empty": lambda w: w.edited("run", key("files", {})),
    "files with a backslash": lambda w: w.edited("run", lambda m: m["files"].update({"..\\x": "0" * 64})),
    "kind unknown": lambda w: w.edited("run", key("kind", "mystery")),
    "kind onnx": lambda w: w.edited("run", key("kind", "onnx")),
    "kind engine": lambda w: w.edited("run", key("kind", "engine")),
    "format of tomorrow": lambda w: w.edited("run", key("format_version", 99)),
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
    "recipe of other bits": lambda w: w.edited("run", recipe(bits="w8a8")),
    "recipe of nonsense bits": lambda w: w.edited("run", recipe(bits="w99a99")),
    "recipe with other steps": lambda w: w.edited("run", recipe(steps=7)),
    "recipe static": lambda w: w.edited("run", recipe(tables="static")),
    "recipe with guidance -1": lambda w: w.edited("run", recipe(guidance=-1)),
    "recipe with a size": lambda w: w.edited("run", recipe(size="7x9")),
    "recipe with an unknown key": lambda w: w.edited("run", recipe(evil=1)),
    "recipe is a list": lambda w: w.edited("run", key("recipe", [])),
    "timesteps twice": lambda w: w.edited("run", key("timesteps", [1.0, 1.0])),
    "timesteps empty": lambda w: w.edited("run", key("timesteps", [])),
    "timesteps beyond": lambda w: w.edited("run", key("timesteps", [1.0, 1e300])),
    "structure unknown": lambda w: w.edited("run", key("structure", {"attention": ["evil"], "splits": {}})),
    "loras of nonsense": lambda w: w.edited("run", key("loras", [{"name": "x"}])),
    "metrics infinite": lambda w: w.edited("run", key("metrics", {"bytes": 10**400})),
    "classes of 10 MB": lambda w: w.replaced(
        "run", "classes.json", json.dumps({"labels": ["x" * (10 << 20), "b", "c"], "null_class": 3})
    ),
    "classes too few": lambda w: w.replaced("run", "classes.json", '{"labels": ["a"], "null_class": 3}'),
    "null class true": lambda w: w.replaced("run", "classes.json", '{"labels":["a"],"null_class":true}'),
    "config with huge channels": lambda w: w.edited(
        "run", key("block_out_channels", [1 << 40, 12]), "unet/config.json"
    ),
    "config of other channels": lambda w: w.edited("run", key("block_out_channels", [8, 16]), "unet/config.json"),
    "config with norm groups 0": lambda w: w.edited("run", key("norm_num_groups", 0), "unet/config.json"),
    "config of another class": lambda w: w.edited("run", key("_class_name", "os.system"), "unet/config.json"),
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
    "scheduler of text": lambda w: w.edited("run", key("beta_end", "big"), "scheduler/scheduler_config.json"),
    "scheduler beta NaN": lambda w: w.edited(
        "run", key("beta_end", float("nan")), "scheduler/scheduler_config.json"
    ),
    "index with a foreign part": lambda w: w.edited("run", key("unet", ["os", "system"]), "model_index.json"),
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
    "layers of no JSON": lambda w: w.graph(metadata("trtq.layers", "{")),
    "layers of a list": lambda w: w.graph(metadata("trtq.layers", "[]")),
    "layers of other bits": lambda w: w.graph(metadata("trtq.layers", '{"conv_in": "conv2d w2a2"}')),
    "timesteps of others": lambda w: w.graph(metadata("trtq.timesteps", "[1.0, 2.0]")),
    "timesteps of text": lambda w: w.graph(metadata("trtq.timesteps", "many")),
    "timesteps of NaN": lambda w: w.graph(metadata("trtq.timesteps", "[NaN, 1e999]")),
    "node that feeds itself": lambda w: w.graph(self_feeding),
    "input renamed": lambda w: w.graph(renamed_input),
    "weights of a petabyte": lambda w: w.graph(huge_dimension),
    "axis of a tera": lambda w: w.graph(huge_axis),
    "table NaN": lambda w: w.graph(nan_table),
    "operator of a foreign domain": lambda w: w.graph(custom_domain),
    "value made twice": lambda w: w.graph(duplicate_output),
    "no nodes": lambda w: w.graph(lambda m: m.graph.ClearField("node")),
    "options.batch of text": lambda w: w.edited("onnx", option(batch="1:8")),
    "options.batch upside down": lambda w: w.edited("onnx", option(batch=[8, 1])),
    "options.size of nonsense": lambda w: w.edited("onnx", option(size="evil")),
    "options.target unknown": lambda w: w.edited("onnx", option(target="evil")),
    "options.precision unknown": lambda w: w.edited("onnx", option(precision="fp2")),
    "options empty": lambda w: w.edited("onnx", key("options", {})),
    "options.backend unknown": lambda w: w.edited(
        "onnx", lambda m: m.update(kind="engine") or m["options"].update(backend="evil")
    ),
    "kind engine": lambda w: w.edited("onnx", key("kind", "engine")),
    "kind run": lambda w: w.edited("onnx", key("kind", "run")),
    "denoiser above": lambda w: w.edited("onnx", key("denoiser", "../onnx/unet")),
    "named pipe": lambda w: fifo(w, "onnx"),
    "link to itself": lambda w: loop(w, "onnx"),
}


def engine(w, content=b"plan", **changes):
    """What `trtq build` leaves, with a plan of somebody else."""
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
    "engine of somebody else": engine,
    "engine empty": lambda w: engine(w, b""),
    "engine for a tensorrt that is missing": lambda w: engine(w, backend="tensorrt"),
    "engine of an unknown backend": lambda w: engine(w, backend="evil"),
    "engine of no backend": lambda w: engine(w, backend=None),
    "engine of nonsense profiles": lambda w: engine(w, profiles={"unet": {"sample": "big"}}),
    "engine of no profiles": lambda w: engine(w, profiles={}),
    "engine of profiles above": lambda w: engine(w, profiles={"../x": {}}),
    "engine of a list of architectures": lambda w: engine(w, architectures=[[86]]),
    "engine of no architecture": lambda w: engine(w, architectures=[]),
    "engine of two": lambda w: engine(w, architectures=["sm86", "evil"]),
    "engine of architectures as text": lambda w: engine(w, architectures="sm86"),
}

ONE_BATCH = ("--batch", "1", "--images", "1", "--turns", "2", "--threads", "1")
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
