"""Trials of graphs in a separate process: every failure there is reported in one line."""

import os
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trtq import processes
from trtq.engine import trial
from trtq.engine.trial import try_graph
from trtq.errors import UsageError
from trtq.processes import Exit


def write(folder, *nodes, axes=("batch", 4), constants=None, **changes):
    """Write a graph from x to y with these nodes."""
    tensors = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("Neg", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    for name, value in changes.items():
        setattr(model, name, value)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def test_a_graph_is_opened_and_called(tmp_path):
    result = try_graph(write(tmp_path), {"batch": 3})
    assert result.problem is None
    assert result.inputs["x"].shape == ("batch", 4)
    assert result.given == {"y": (3, 4)}


def body():
    """Body of a Loop that never ends."""
    number, flag = ([name, kind, []] for name, kind in (("i", 7), ("c", 9)))
    return helper.make_graph(
        [helper.make_node("Identity", ["c"], ["co"]), helper.make_node("Identity", ["s"], ["so"])],
        "body",
        [helper.make_tensor_value_info(*what) for what in (number, flag, ["s", 1, None])],
        [helper.make_tensor_value_info(*what) for what in (["co", 9, []], ["so", 1, None])],
    )


def test_a_loop_is_refused_before_it_is_called(tmp_path):
    endless = helper.make_node("Loop", ["", "true", "x"], ["y"], body=body())
    path = write(tmp_path, endless, constants={"true": np.array(True)})
    assert "holds a Loop, which may never end" in try_graph(path, {"batch": 1}).problem


def test_an_endless_call_is_ended(tmp_path, monkeypatch):
    sleep = ["-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(processes, "worker_command", lambda *_: [sys.executable, *sleep])
    problem = try_graph(write(tmp_path), {"batch": 1}, seconds=2).problem
    assert "took more than 2 s and was ended" in problem
    assert "--timeout raises the limit" in problem


def test_a_graph_that_needs_too_much_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_BASE_BYTES", 1 << 30)
    monkeypatch.setattr(trial, "_MIN_BYTES", 1 << 29)
    nodes = (
        helper.make_node("Expand", ["x", "shape"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["y"], keepdims=0),
    )
    shape = np.array([1 << 20, 1 << 16, 1], np.int64)
    path = write(tmp_path, *nodes, constants={"shape": shape}, axes=("batch", 1))
    assert "memory" in try_graph(path, {"batch": 1}).problem


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("operator", "No Op registered for EvilOp"),
        ("version", "max supported IR version"),
        ("empty", "No graph was found"),
        ("pipe", "is not a file"),
        ("missing", "is not a file"),
    ],
)
def test_a_graph_that_cannot_be_opened_is_reported_in_one_line(damage, message, tmp_path):
    nodes = [helper.make_node("EvilOp", ["x"], ["y"])] if damage == "operator" else []
    path = write(tmp_path, *nodes, ir_version=999 if damage == "version" else 10)
    if damage == "empty":
        path.write_bytes(b"")
    if damage in ("pipe", "missing"):
        path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    problem = try_graph(path, {"batch": 1}).problem
    assert message in problem or (damage == "empty" and "ModelProto" in problem)
    assert "\n" not in problem


def test_unknown_and_impossible_sizes_are_named(tmp_path):
    assert "free axis 'evil'" in try_graph(write(tmp_path, axes=("evil", 4)), {"batch": 1}).problem
    large = write(tmp_path, axes=(1 << 40, 4))
    assert "impossible shape [1099511627776, 4]" in try_graph(large, {}).problem


def test_a_crash_is_reported_in_one_line(tmp_path, monkeypatch):
    crash = ["-c", "import os, sys; sys.stderr.write('boom'); os.kill(os.getpid(), 11)"]
    monkeypatch.setattr(processes, "worker_command", lambda *_: [sys.executable, *crash])
    problem = try_graph(write(tmp_path), {"batch": 1}).problem
    assert problem == "the runtime's process crashed (SIGSEGV); last output: boom"


def test_ctrl_c_ends_the_child_too(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is not None:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait()

    sleep = ["-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(processes, "worker_command", lambda *_: [sys.executable, *sleep])
    monkeypatch.setattr(processes.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        try_graph(write(tmp_path), {"batch": 1})
    (child,) = started
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_an_impossible_time_limit_is_refused(seconds, tmp_path):
    with pytest.raises(UsageError, match="time limit"):
        try_graph(write(tmp_path), {}, seconds=seconds)


def test_how_a_child_died_is_reported_on_systems_without_its_signal(monkeypatch):
    assert "crashed (signal 62)" in trial._explain(Exit(-62, "boom"), 1 << 30, 1.0)
    monkeypatch.delattr(signal, "SIGKILL")
    monkeypatch.delattr(signal, "SIGXCPU")
    assert "killed, most likely because memory ran out" in trial._explain(Exit(-9), 1 << 30, 1.0)
    assert "crashed (0xC0000005)" in trial._explain(Exit(0xC0000005, "boom"), 1 << 30, 1.0)
