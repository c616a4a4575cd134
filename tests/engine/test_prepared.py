"""Prepared graphs: made once, by a child process, and cached where no other user can write."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from trtq import processes
from trtq.engine import prepared
from trtq.engine.openvino import OpenVinoEngine
from trtq.engine.ort import OrtEngine
from trtq.engine.prepared import cache as cache_module
from trtq.engine.prepared import child, prepare_in_process, prepared_graph
from trtq.errors import ArtefactError, UsageError
from trtq.processes import Child, Exit
from trtq.processor import FEATURES, has_vnni, processor_features


@pytest.fixture
def graph(digits_onnx):
    return digits_onnx / "unet" / "model.onnx"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A separate cache for each test, in a process in which onnx_ir is not loaded."""
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "onnx_ir")
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def children(monkeypatch, tmp_path):
    """The list of child processes, which are faked: the work is done faster in this process."""
    count = []

    class InProcess(Child):
        def __init__(self, module, *arguments):
            self.answer_file = tmp_path / str(len(count)) / "answer.json"
            self.answer_file.parent.mkdir()
            count.append(arguments)
            self.arguments = [str(value) for value in (*arguments, self.answer_file)]

        def wait(self, timeout=None):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", ["child", *self.arguments])
                code = child.main()
            # The rewrites import onnx_ir again.
            sys.modules.pop("onnx_ir", None)
            return Exit(code)

        def close(self):
            shutil.rmtree(self.answer_file.parent)

    onnx_ir = sys.modules["onnx_ir"]

    def main(path, runtime):
        sys.modules["onnx_ir"] = onnx_ir
        return prepare_in_process(path, runtime)

    monkeypatch.setattr(child, "prepare_in_process", main)
    monkeypatch.setattr(prepared, "prepare_in_process", main)
    monkeypatch.setattr(child, "Child", InProcess)
    yield count
    sys.modules["onnx_ir"] = onnx_ir


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_graph_is_prepared_once_by_a_child_and_then_cached(graph, children, cache, runtime, vnni):
    first = prepared_graph(graph, runtime)
    again = prepared_graph(graph, runtime)
    assert len(children) == 1
    assert first == again
    assert first == prepared.prepare_in_process(graph, runtime)
    sys.modules.pop("onnx_ir", None)
    (entry,) = cache.iterdir()
    assert all(not path.stat().st_mode & 0o077 for path in (cache, entry, *entry.iterdir()))


def test_each_kind_of_processor_has_its_own_graphs(graph, children, cache, monkeypatch):
    models = set()
    for setting in ("+vnni", "-vnni"):
        monkeypatch.setenv("TRTQ_CPU", setting)
        models.add(prepared_graph(graph, "openvino").model)
    assert len(models) == len(children) == len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["graph", "record", "no json", "others write", "link"])
def test_an_entry_that_is_changed_or_writable_by_others_is_not_used(graph, children, cache, damage):
    expected = prepared_graph(graph, "openvino")
    (entry,) = cache.iterdir()
    if damage == "graph":
        (entry / "graph.onnx").write_bytes(b"other" + expected.model)
    elif damage == "record":
        record = json.loads((entry / "record.json").read_text())
        (entry / "record.json").write_text(json.dumps(record | {"inputs": 3}))
    elif damage == "no json":
        (entry / "record.json").write_text("[" * 100_000)
    elif damage == "others write":
        (entry / "graph.onnx").chmod(0o666)
    else:
        moved = entry.with_name("elsewhere")
        entry.rename(moved)
        entry.symlink_to(moved)
    assert prepared_graph(graph, "openvino") == expected
    assert len(children) == 2


@pytest.mark.parametrize("way", ["off", "a file", "others write"])
def test_without_a_cache_a_graph_is_prepared_each_time(
    graph, children, cache, way, tmp_path, monkeypatch
):
    if way == "off":
        monkeypatch.setenv("TRTQ_CACHE", "off")
    elif way == "a file":
        cache.parent.write_text("")
    else:
        cache.mkdir(parents=True)
        cache.chmod(0o777)
    for count in (1, 2):
        assert prepared_graph(graph, "openvino").model
        assert len(children) == count
    assert way != "others write" or not list(cache.iterdir())
    assert not (tmp_path / "off").exists()


def test_the_cache_evicts_the_graph_with_the_oldest_use(graph, children, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "_MAX_GRAPHS", 1)
    prepared_graph(graph, "openvino")
    (old,) = cache.iterdir()
    os.utime(old, (0, 0))
    prepared_graph(graph, "onnxruntime")
    (new,) = cache.iterdir()
    assert new != old


def test_a_graph_that_cannot_be_prepared_raises_a_one_line_error(tmp_path):
    """Runs a real child process."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    code = (
        "from pathlib import Path; from trtq.engine.prepared import prepared_graph; import sys\n"
        f"try: prepared_graph(Path({str(path)!r}), 'openvino')\n"
        "except Exception as err: print(type(err).__name__, err)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, heavy = done.stdout.splitlines()
    assert message.startswith(f"ArtefactError cannot read {path}")
    assert heavy == "False"


def test_the_death_of_a_child_is_reported(graph, cache, monkeypatch):
    body = "import os, sys; sys.stderr.write('last words'); sys.stderr.flush(); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(processes, "worker_command", lambda *_: [sys.executable, "-c", body])
    with pytest.raises(
        ArtefactError, match=r"rewrites \S+ was killed, .*; last output: last words"
    ):
        prepared_graph(graph, "openvino")


def test_engines_of_cached_graphs_compute_the_same(graph, children, cache, computed_vnni):
    feeds = {
        "sample": np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32),
        "timestep": np.array([1, 700], np.float32),
        "class_labels": np.array([1, 2]),
    }
    for kind in (OrtEngine, OpenVinoEngine):
        first, second = (kind(graph, threads=1) for _ in range(2))
        assert dict(first.inputs) == dict(second.inputs)
        assert first.inputs["sample"].shape == ("batch", 1, 8, 8)
        assert "trtq.timesteps" in first.metadata or first.metadata == second.metadata
        np.testing.assert_array_equal(*(e.run(feeds)["out_sample"] for e in (first, second)))


def test_the_processor_features_are_one_setting(monkeypatch):
    for setting, expected in (("+vnni", True), ("-vnni", False), ("vnni, -bf16", True)):
        monkeypatch.setenv("TRTQ_CPU", setting)
        assert has_vnni() is expected
        assert processor_features() <= set(FEATURES)
    monkeypatch.setenv("TRTQ_CPU", "-avx999")
    with pytest.raises(UsageError, match=r"TRTQ_CPU holds '-avx999'; write \+NAME or -NAME"):
        has_vnni()


@pytest.mark.parametrize(
    "file",
    ["graph/passes/step_values.py", "engine/prepared/child.py", "engine/prepared/graph.py"],
)
def test_the_key_depends_on_the_code_of_every_rewrite(file, monkeypatch):
    before = cache_module.rewrites_id()
    assert cache_module.rewrites_id.__wrapped__() == before
    hashed = cache_module.sha256
    changed = cache_module._PACKAGE / file
    assert changed.is_file()
    monkeypatch.setattr(
        cache_module, "sha256", lambda path: "other" if path == changed else hashed(path)
    )
    assert cache_module.rewrites_id.__wrapped__() != before
