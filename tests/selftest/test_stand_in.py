"""The whole command on the recording driver: real child processes, cuda-bindings, NVRTC and kernels.

The kernels run as PTX on the CPU, so a test chooses few of stage 2's cases.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import shared
from tests.plugins.ptx import needs_ptx
from tests.plugins.recording_driver import HERE, ROOT, RecordingDriver, needs_recording
from tests.plugins.recording_driver import recording as recording
from trtq.cli import app
from trtq.plugins.variants import all_variants
from trtq.selftest import run as running
from trtq.selftest.cases import CHECKS
from trtq.selftest.loading import listed
from trtq.selftest.record import MAX_FILE_BYTES, read_selftest

pytestmark = [needs_recording, needs_ptx]

CASE = "two launches/w8a8-odd-nhwc"
"""A case whose builds tests/plugins/test_ptx_kernels.py has, too."""


@pytest.fixture
def run(recording: RecordingDriver, tmp_path, tmp_path_factory, monkeypatch):
    """Runs the command with the driver in its children; returns exit code, output and file."""
    builds = shared(tmp_path_factory, "ptx", lambda _: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    site = os.pathsep.join([str(HERE / "site"), str(ROOT)])

    def call(*arguments, gpus="80", **settings):
        settings |= {"gpus": gpus, "builds": builds, "exact": 1, "PYTHONMALLOC": "debug"}
        for name, value in recording.environment(PYTHONPATH=site, **settings).items():
            monkeypatch.setenv(name, value)
        path = tmp_path / "selftest.json"
        options = ["--quick", "--overwrite", "-o", str(path), *arguments]
        done = CliRunner().invoke(app, ["selftest", *options])
        return done, read_selftest(path) if path.exists() else None

    return call


def test_all_stages_pass_and_the_file_says_what_ran(run, tmp_path):
    done, record = run("--cases", CASE)
    assert (done.exit_code, record.failed) == (0, [])
    assert record.complete
    assert {row.stage for row in record.checks} == {0, 1, 2}
    assert [row.name for row in record.checks if row.stage == 2] == [CASE]
    assert record.options == ["--quick", f"--cases {CASE}"]
    (gpu,) = record.gpus
    assert (gpu.name, gpu.architecture, gpu.processors) == ("Recording GPU 0", "sm80", 128)
    assert [row.variant for row in record.kernels] == [str(v) for v in all_variants("sm80")]
    for row in record.kernels:
        values = (row.registers, row.local_bytes, row.shared_bytes, row.blocks_per_sm)
        assert values == dataclasses.astuple(listed()[1]["sm80"][row.variant])
    assert not any(row.detail for row in record.checks if row.stage == 1)
    lines = done.stdout.splitlines()
    assert 5 <= len(lines) <= 12
    assert "2 integers: 1 passed" in done.stdout
    assert lines[-2:][0] == "all well"
    assert "attach" in lines[-1]
    text = (tmp_path / "selftest.json").read_text()
    assert len(text) < MAX_FILE_BYTES
    assert socket.gethostname() not in text
    assert not re.search(r"/(home|tmp|work|root|usr)\b", text)
    assert str(Path.home()) not in text


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (
            "value",
            r"1 of 600 values are wrong, first at image 0, channel 5, row 0, column 0 \(block 0, 0, 0, "
            r"warp 0, lane 2\): nan in place of ",
        ),
        (
            "outside",
            r"a kernel wrote outside its outputs: 1 bytes, first 3 bytes before the start of `out`",
        ),
        (
            "moving",
            r"the result moves: 1 bytes differ between two runs, first at \(0, 0, 0, 5\) of \[2, 5",
        ),
        pytest.param("crash", r"the process crashed \(SIGABRT\)", marks=pytest.mark.slow),
        pytest.param(
            "address",
            r"the GPU failed: CUDA_ERROR_ILLEGAL_ADDRESS: a kernel accessed memory out of",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fault_is_recorded_with_its_place(plant, message, run):
    done, record = run("--cases", CASE, plant=plant)
    assert done.exit_code == 1
    (row,) = record.failed
    assert (row.stage, row.name) == (2, CASE)
    assert re.match(message, row.error), row.error
    assert f"! {CASE}: {row.error[:60]}" in done.stdout
    assert record.complete


@pytest.mark.slow
def test_a_kernel_that_never_ends_is_stopped_at_the_time_limit(run, monkeypatch):
    stages = [
        dataclasses.replace(stage, seconds=15 if stage.number == 2 else stage.seconds)
        for stage in running.STAGES
    ]
    monkeypatch.setattr(running, "STAGES", stages)
    done, record = run("--cases", CASE, plant="hang")
    assert done.exit_code == 1
    (row,) = record.failed
    assert (row.name, row.error) == (CASE, "the process took more than 15 s and was ended")


def test_a_kernel_that_differs_from_the_table_fails(run):
    done, record = run("--cases", CASE, properties="1,8,0,0")
    assert done.exit_code == 1
    assert len(record.failed) == len(all_variants("sm80"))
    row = record.failed[0]
    assert (row.stage, row.name) == (1, "quantize-f16-w4")
    assert re.match(r"not the kernel of the table for NVRTC [\d.]+: registers \d+, the", row.error)
    assert "local bytes 8, the table has 0" in row.error


def test_other_blocks_and_shared_memory_are_recorded_but_are_no_failure(run):
    done, record = run("--cases", CASE, properties="0,0,1024,1")
    assert done.exit_code == 0
    details = [row.detail["differs"] for row in record.checks if row.stage == 1]
    assert len(details) == len(all_variants("sm80"))
    assert all(len(texts) == 2 for texts in details)


def test_the_chosen_gpu_is_tested_and_all_are_listed(run):
    done, record = run("--cases", "tokens/native", "--device", "1", gpus="89,90")
    assert done.exit_code == 0
    assert [(gpu.architecture, gpu.tested) for gpu in record.gpus] == [
        ("sm89", False),
        ("sm90", True),
    ]
    assert [row.variant for row in record.kernels] == [str(v) for v in all_variants("sm90")]
    assert not [row for row in record.checks if row.stage == 2], "sm90 has no products of nibbles"


@pytest.mark.parametrize(
    ("settings", "arguments", "code", "message"),
    [
        ({"cuda": 12040}, (), 1, "driver 580 or later is needed for CUDA 13, you have 550"),
        ({"gpus": ""}, (), 1, "there is no NVIDIA GPU that this process may use"),
        ({}, ("--device", "1"), 2, "there is no GPU 1; this process may use 1, counted from 0"),
    ],
    ids=["old driver", "no GPU", "no such GPU"],
)
def test_without_a_usable_gpu_there_is_one_line_and_no_file(
    settings, arguments, code, message, run, tmp_path
):
    done, record = run(*arguments, **settings)
    assert (done.exit_code, record) == (code, None)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_case_of_two_launches_passes(run):
    done, record = run("--cases", "two launches/*")
    assert (done.exit_code, record.failed) == (0, [])
    names = [check.full_name for check in CHECKS if check.group == "two launches"]
    assert [row.name for row in record.checks if row.stage == 2] == names


def test_json_is_the_content_of_the_file(run):
    done, record = run("--cases", "tokens/native", "--json", gpus="90")
    assert json.loads(done.stdout) == record.to_json()
