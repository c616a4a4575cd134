"""The process as operators use it: start, SIGTERM under load and one-line errors."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from trtq.cli import app
from trtq.errors import UsageError
from trtq.serve import server
from trtq.serve.hosting import open_model
from trtq.serve.models.torch_free import TorchFreeModel
from trtq.serve.options import read_api_key

ROOT = Path(__file__).resolve().parents[2]
PATH = "/v1/images/generations"


def run(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


class Process:
    """`trtq serve` in another process, on a free port."""

    def __init__(self, *arguments, probe="from trtq.cli import app; app()"):
        command = [sys.executable, "-c", probe, "serve", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready = json.loads(self.process.stdout.readline())
        self.client = httpx.Client(base_url=self.ready["url"], timeout=60)

    def end(self, *signals):
        """Send signals and return the exit code and the lines of the log."""
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.1)
        _, log = self.process.communicate(timeout=60)
        self.client.close()
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]


@pytest.fixture
def start():
    made = []

    def make(*arguments, **options):
        made.append(Process(*arguments, **options))
        return made[-1]

    yield make
    for process in made:
        if process.process.poll() is None:
            process.process.kill()
        process.process.communicate()
        process.client.close()


def under_load(process, requests, steps):
    """Send requests concurrently; return the threads and the list of their responses."""
    answers = []

    def ask(seed):
        body = {"prompt": "1", "seed": seed, "steps": steps}
        try:
            answers.append(process.client.post(PATH, json=body))
        except httpx.HTTPError as error:
            answers.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(requests)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while f'under_way{{model="{process.ready["models"][0]}"}} {requests}.0' not in (
        process.client.get("/metrics").text
    ):
        assert time.monotonic() < end
    return threads, answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_accepted_requests_are_finished_before_the_exit(served_onnx, start, number):
    process = start(served_onnx, "--max-batch", 2, "--max-steps", 500)
    threads, answers = under_load(process, 6, steps=100)
    code, log = process.end(number)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 6
    assert code == 0
    assert "draining" in [line["event"] for line in log]


def test_requests_that_do_not_end_in_time_are_answered_503(served_onnx, start):
    process = start(served_onnx, "--max-batch", 2, "--max-steps", 500, "--drain-seconds", 0.2)
    threads, answers = under_load(process, 5, steps=500)
    code, log = process.end(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} <= {200, 503}
    (error,) = {answer.json()["error"]["code"] for answer in answers if answer.status_code == 503}
    assert error == "draining"
    assert code == 0
    assert "giving up" in [line["event"] for line in log]


def test_a_second_signal_stops_the_server_at_once(served_onnx, start):
    process = start(served_onnx, "--max-batch", 2, "--max-steps", 500)
    threads, answers = under_load(process, 5, steps=500)
    code, _ = process.end(signal.SIGTERM, signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert 503 in {answer.status_code for answer in answers}
    assert code == 0


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_digits_are_served_without_torch_and_diffusers(served_onnx, start, provider, vnni):
    """This holds on any processor, and at the first start, when a child rewrites the graph."""
    probe = (
        "import atexit, sys; heavy = ('torch', 'diffusers', 'transformers', 'onnx', 'onnx_ir');"
        "atexit.register(lambda: print(*(name for name in heavy if name in sys.modules)));"
        "from trtq.cli import app; app()"
    )
    for _ in range(2):
        process = start(served_onnx, "--provider", provider, probe=probe)
        assert process.client.post(PATH, json={"prompt": "2"}).status_code == 200
        process.process.send_signal(signal.SIGTERM)
        assert process.process.stdout.read().strip() == ""


@pytest.mark.parametrize(
    "provider", ["cpu", "openvino", pytest.param("torch", marks=pytest.mark.slow)]
)
def test_a_model_draws_the_same_after_its_files_are_truncated(
    served_onnx, tmp_path, start, provider
):
    folder = tmp_path / "model"
    shutil.copytree(served_onnx.parent / ("run" if provider == "torch" else "onnx"), folder)
    process = start(folder, "--provider", provider, "--batch-sizes", "1,2")
    body = {"prompt": "1", "seed": 3}
    before = process.client.post(PATH, json=body).json()["data"]
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, min(10, path.stat().st_size))
    after = process.client.post(PATH, json=body)
    assert (after.status_code, after.json()["data"]) == (200, before)
    assert process.client.post(PATH, json=body | {"n": 2}).status_code == 200
    assert process.client.get("/readyz").status_code == 200
    assert process.end(signal.SIGTERM)[0] == 0


def test_a_process_that_crashes_prints_a_traceback(served_onnx, start):
    probe = (
        "import faulthandler; from trtq.serve.models.torch_free import TorchFreeModel;"
        "from trtq.cli import app;"
        "original = TorchFreeModel.denoise;"
        "TorchFreeModel.denoise = lambda self, x, *rest: faulthandler._sigsegv()"
        " if len(x) == 2 else original(self, x, *rest); app()"
    )
    process = start(served_onnx, probe=probe)
    with pytest.raises(httpx.HTTPError):
        process.client.post(PATH, json={"prompt": "1", "n": 2})
    _, log = process.process.communicate(timeout=60)
    assert process.process.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in log
    assert "denoise" in log or "_run" in log


def test_the_exit_code_reports_a_batcher_that_died(served_onnx, start):
    probe = (
        "from trtq.serve.models.torch_free import TorchFreeModel;"
        "from trtq.cli import app;"
        "original = TorchFreeModel.denoise;"
        "TorchFreeModel.denoise = lambda self, x, *rest: exit('gone')"
        " if len(x) == 2 else original(self, x, *rest); app()"
    )
    process = start(served_onnx, probe=probe)
    assert process.client.post(PATH, json={"prompt": "1", "n": 2}).status_code == 500
    assert process.client.get("/readyz").status_code == 503
    process.process.send_signal(signal.SIGTERM)
    _, log = process.process.communicate(timeout=60)
    assert process.process.returncode == 1
    assert '"event": "the batcher died' in log
    assert log.splitlines()[-1].startswith("error: a batcher died while it served")


def test_only_hosts_and_origins_that_are_allowed_are_answered(served_onnx, start):
    process = start(
        served_onnx, "--allowed-host", "images.example", "--allowed-host", "*.b.example",
        "--allowed-origin", "http://ui.example",
    )  # fmt: skip

    def status(**headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return process.client.post(
            PATH, json={"prompt": "1", "steps": 1}, headers=named
        ).status_code

    assert status() == status(Host="images.example:80") == status(Host="a.b.example") == 200
    assert status(Host="evil.example") == 421
    assert status(Origin="http://ui.example", Sec_Fetch_Site="cross-site") == 200
    assert status(Origin="http://evil.example") == 403
    with socket.create_connection(("127.0.0.1", process.client.base_url.port)) as connection:
        connection.sendall(b"NONSENSE\r\n")
        assert b'"code": "invalid_http"' in connection.recv(10_000)
    assert 'trtq_errors_total{code="invalid_http"} 1.0' in process.client.get("/metrics").text
    code, log = process.end(signal.SIGTERM)
    assert code == 0
    errors = [line.get("error") for line in log if line["event"] == "request"]
    assert [error for error in errors if error] == [
        "host_not_allowed", "origin_not_allowed", "invalid_http",
    ]  # fmt: skip


def test_allowing_all_hosts_or_origins_logs_warnings(served_onnx, start):
    process = start(served_onnx, "--allowed-host", "*", "--allowed-origin", "*")
    assert process.client.get("/v1/models", headers={"Host": "any.example"}).status_code == 200
    _, log = process.end(signal.SIGTERM)
    warnings = [line["event"] for line in log if line["level"] == "warning"]
    assert ["every host" in warnings[0], "every origin" in warnings[1]] == [True, True]


def test_openvino_serves_at_once_while_more_sizes_are_compiled(served_onnx, start):
    process = start(served_onnx, "--provider", "openvino", "--max-batch", 4)
    threads, answers = under_load(process, 5, steps=150)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 5
    model = process.client.get("/v1/models").json()["data"][0]
    assert (model["provider"], model["bits"]) == ("openvino", "w4a8")
    end = time.monotonic() + 60
    while True:
        process.client.post(PATH, json={"prompt": "1", "n": 4, "seed": 0})
        text = process.client.get("/metrics").text
        if 'trtq_batch_rows_bucket{le="2.0"' in text and _calls(text, "+Inf") > _calls(text, "2.0"):
            break
        assert time.monotonic() < end
    assert process.end(signal.SIGTERM)[0] == 0


def _calls(text, max_rows):
    (line,) = (
        line
        for line in text.splitlines()
        if line.startswith(f'trtq_batch_rows_bucket{{le="{max_rows}"')
    )
    return float(line.split()[-1])


def test_a_port_in_use_is_one_line(served_onnx):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run(served_onnx, "--port", port)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert f"cannot listen at 127.0.0.1 port {port}" in line
    assert "--port" in line


def test_a_port_that_is_taken_during_the_start_is_one_line(served_onnx, monkeypatch):
    with socket.socket() as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rival.bind(("127.0.0.1", 0))
        build_service = server.build_service

        def slowly(*arguments):
            rival.listen()
            return build_service(*arguments)

        monkeypatch.setattr(server, "build_service", slowly)
        result = run(served_onnx, "--port", rival.getsockname()[1])
    assert result.exit_code == 1
    assert "cannot listen at 127.0.0.1 port" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_engine_for_fewer_rows_is_refused(served_onnx, monkeypatch):
    monkeypatch.setattr(TorchFreeModel, "max_rows", 4)
    result = run(served_onnx, "--port", 0)
    assert result.exit_code == 2
    assert "takes up to 4 rows" in result.stderr
    assert "--max-batch 4" in result.stderr


def test_a_call_that_hangs_does_not_delay_the_exit(served_onnx, start):
    probe = (
        "import time; from trtq.serve.models.torch_free import TorchFreeModel;"
        "from trtq.cli import app;"
        "original = TorchFreeModel.denoise;"
        "TorchFreeModel.denoise = lambda self, x, t, *rest: "
        "(time.sleep(60 if len(x) == 2 else 0), original(self, x, t, *rest))[1]; app()"
    )
    process = start(served_onnx, "--drain-seconds", 1, probe=probe)
    body = {"prompt": "1", "n": 2, "seed": 0}
    statuses = []
    asking = threading.Thread(
        target=lambda: statuses.append(process.client.post(PATH, json=body).status_code)
    )
    asking.start()
    while "under_way" not in (text := process.client.get("/metrics").text) or "} 2.0" not in text:
        time.sleep(0.05)
    begun = time.monotonic()
    code, log = process.end(signal.SIGTERM)
    asking.join()
    assert (code, statuses) == (0, [503])
    assert time.monotonic() - begun < 30
    assert "leaving a call of the engine behind" in [line["event"] for line in log]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 1, "there is no model 'nowhere'"),
        (("{onnx}", "--provider", "gpu"), 2, "unknown provider 'gpu'"),
        (("{onnx}", "--provider", "cuda"), 2, "has no provider 'cuda'"),
        (("digits", "--provider", "cpu"), 2, "trtq export"),
        (("{onnx}", "--batching", "none"), 2, "step, request"),
        (("{onnx}", "--batch-sizes", "1,x"), 2, "not understood"),
        (("{onnx}", "--batch-sizes", "1,16"), 2, "from 1 to 8"),
        (("{onnx}", "--beside", "{onnx}"), 2, "--name"),
        (("{onnx}", "--name", "a/b"), 2, "cannot be called 'a/b'"),
        (("{onnx}", "--name", ""), 2, "cannot be called ''"),
        (("{onnx}", "--host", "256.0.0.1"), 1, "cannot listen"),
        (("{onnx}", "--host", "ü" * 70), 1, "cannot listen"),
        (("{onnx}", "--api-key-file", "nowhere"), 2, "cannot read the API key"),
        (("{onnx}", "--allowed-host", "http://a.example"), 2, "the host 'http://a.example' is not"),
        (("{onnx}", "--allowed-origin", "a.example"), 2, "the origin 'a.example' is not"),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_cannot_be_served_is_one_line(served_onnx, arguments, code, message):
    given = [argument.format(onnx=served_onnx) for argument in arguments]
    result = run("--port", 0, *given)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_changed_file_is_not_served(served_onnx, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(served_onnx, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    result = run(folder, "--port", 0)
    assert result.exit_code == 1
    assert "scheduler_config.json" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_extra_is_named(served_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run(served_onnx, "--port", 0)
    assert result.exit_code == 2
    assert "pip install 'trtq[serve]'" in result.stderr


@pytest.mark.parametrize("key", ["", "two words", "ключ", "line\nline"], ids=repr)
def test_keys_that_no_header_can_hold_are_refused(key, tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text(key, encoding="utf-8")
    with pytest.raises(UsageError, match="printable ASCII"):
        read_api_key(path)
    path.write_text("good\n")
    assert read_api_key(path) == "good"
    monkeypatch.setenv("TRTQ_API_KEY", "other")
    assert read_api_key(None) == "other"
    monkeypatch.delenv("TRTQ_API_KEY")
    assert read_api_key(None) is None


def test_prompts_that_name_no_class_are_refused(served_onnx):
    from trtq.serve.models.base import GenerationRequest

    model = open_model(str(served_onnx), "tiny")
    assert model.info.classes == ("0", "1", "2")
    for prompt in ("3", "-1", "cat", "", "²", "9" * 30):
        with pytest.raises(UsageError, match="one of 0, 1, 2, or a number from 0 to 2"):
            model.starts(GenerationRequest(prompt, 1, 0, 4, 1.0))
    with pytest.raises(UsageError, match=r"choose 1 \.\. 999"):
        model.starts(GenerationRequest("1", 1, 0, 1000, 1.0))
