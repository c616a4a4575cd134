"""`trtq serve --ray` as operators use it: start, SIGTERM under load and one-line errors."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from typer.testing import CliRunner

from tests.serve.http.test_app import PATH
from tests.serve.test_server import ROOT
from trtq.cli import app
from trtq.errors import UsageError
from trtq.serve.ray.local import parse_replicas

pytest.importorskip("ray")
KEY = "open-sesame-4452"


@pytest.mark.parametrize("text", ["", "2", "0:2", "3:2", "a:b", "1:2:3"], ids=repr)
def test_invalid_ranges_of_replicas_are_refused(text):
    with pytest.raises(UsageError, match="write MIN:MAX, e"):
        parse_replicas(text)
    assert parse_replicas("1:4") == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "address", "message"),
    [
        (("--replicas", "1:2"), "", "--replicas needs --ray"),
        (("--ray", "--replicas", "2"), "", "write MIN:MAX"),
        (("--ray",), "ray://elsewhere:10001", "use RAY_ADDRESS=auto"),
    ],
    ids=str,
)
def test_usage_errors_are_one_line(served_onnx, monkeypatch, arguments, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    result = CliRunner().invoke(app, ["serve", str(served_onnx), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_address_without_ray_is_one_line(served_onnx, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
    result = CliRunner().invoke(app, ["serve", str(served_onnx), "--ray"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "there is no Ray at RAY_ADDRESS=127.0.0.1:" in line


def start(*arguments):
    """Run the command in another process, which starts its own Ray."""
    command = [sys.executable, "-m", "trtq.cli", "serve", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_ADDRESS": "", "TRTQ_API_KEY": KEY}
    return subprocess.Popen(
        [*command, "--ray", "--port", "0", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drain_s", "signals", "statuses"),
    [(60, 1, {200}), (0.5, 1, {200, 503}), (60, 2, {200, 503})],
    ids=["finished", "given up after the time limit", "given up at the second signal"],
)
def test_sigterm_answers_all_accepted_requests(served_onnx, drain_s, signals, statuses):
    process = start(
        served_onnx, "--replicas", "1:1", "--threads", 1, "--max-batch", 2, "--max-steps", 500,
        "--drain-seconds", drain_s,
    )  # fmt: skip
    try:
        ready = json.loads(process.stdout.readline())
        assert (ready["models"], ready["replicas"]) == (["onnx"], [1, 1])
        answers = []

        def ask(seed):
            body = {"prompt": "1", "seed": seed, "steps": 500}
            headers = {"Authorization": f"Bearer {KEY}"}
            url = ready["url"] + PATH
            answers.append(httpx.post(url, json=body, headers=headers, timeout=60))

        assert httpx.post(ready["url"] + PATH, json={"prompt": "1"}).status_code == 401
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        out, _ = process.communicate(timeout=90)
    finally:
        process.kill()
        process.communicate()
    assert len(answers) == 12
    assert {answer.status_code for answer in answers} <= statuses
    if 503 in statuses:
        codes = [a.json()["error"]["code"] for a in answers if a.status_code == 503]
        assert set(codes) == {"draining"}
    assert process.returncode == 0
    assert out == ""


@pytest.mark.slow
def test_a_model_that_cannot_be_served_is_one_line(tmp_path):
    process = start(tmp_path / "nowhere")
    _, log = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = (line for line in log.splitlines() if line.startswith("error: "))
    assert "the replicas do not start: there is no model" in line
    assert "Traceback" not in log
