"""A replica on Ray Serve may die: every accepted request gets exactly one response."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
import types
from pathlib import Path

import httpx
import pytest

from tests.serve.http.test_app import PATH
from trtq.serve.http.errors import ApiError
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.options import Limits
from trtq.serve.ray.deployment import Ingress, app, replicas_wanted
from trtq.serve.ray.generator import RemoteGenerator
from trtq.serve.ray.options import RayOptions
from trtq.serve.requests import DrawOptions, Event
from trtq.serve.server import drain

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")
INFO = ModelInfo("toy", "class", ("zero",), (4, 4), 5, 1000, 1.0, True, "cpu", None)
REQUEST = GenerationRequest("zero", 3, 7, 2, 1.0)
ALL = [Event("accepted", 0, 0, 2), *(Event("image", index, 2, 2, b"png") for index in range(3))]


class Answers:
    """The events and the end of one replica's stream."""

    def __init__(self, events, end, *, hangs=False):
        self.events, self.end, self.hangs = events, end, hangs
        self.cancelled = False

    def cancel(self):
        self.cancelled = True

    async def __aiter__(self):
        for event in self.events:
            yield event
        if self.hangs:
            await asyncio.Event().wait()
        if self.end is not None:
            raise self.end


class Handle:
    """Replaces Ray's handle of the replicas."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = []
        self.draw = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, *arguments):
        self.calls.append(arguments)
        return self.answers[min(len(self.calls), len(self.answers)) - 1]


def draw(handle, monkeypatch, **options):
    monkeypatch.setattr("trtq.serve.ray.generator._PAUSE_S", 0.0)
    generator = RemoteGenerator(handle, {"toy": INFO}, Limits())
    events = generator.draw("toy", REQUEST, DrawOptions(**options))

    async def collect():
        return [event async for event in events]

    return asyncio.run(collect())


def test_a_lost_replica_is_replaced_and_no_event_is_repeated(monkeypatch):
    lost = ray.exceptions.RayActorError()
    first, second = Answers(ALL[:2], lost), Answers(ALL, None)
    handle = Handle(first, second)
    assert draw(handle, monkeypatch) == ALL
    assert [arguments[1] for arguments in handle.calls] == [REQUEST] * 2
    assert first.cancelled


def test_replicas_that_keep_failing_are_503(monkeypatch):
    handle = Handle(Answers([], ray.exceptions.RayActorError()))
    with pytest.raises(ApiError, match="keep failing") as caught:
        draw(handle, monkeypatch)
    assert caught.value.status == 503
    assert len(handle.calls) == 10


def test_an_error_of_a_replica_is_the_response(monkeypatch):
    import pickle

    refusal = ApiError(429, "queue_full", "later", param="n", retry_after=3)
    copy = pickle.loads(pickle.dumps(refusal))
    assert (copy.envelope, copy.headers) == (refusal.envelope, {"Retry-After": "3"})
    with pytest.raises(ApiError, match="later"):
        draw(Handle(Answers([copy], None)), monkeypatch)


def test_no_time_left_after_a_lost_replica_is_408(monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(
        "trtq.serve.ray.generator.time", types.SimpleNamespace(monotonic=clock.__next__)
    )
    handle = Handle(Answers([], ray.exceptions.RayActorError()))
    with pytest.raises(ApiError, match="within 5 s") as caught:
        draw(handle, monkeypatch, deadline_s=5)
    assert caught.value.status == 408
    left = [options.deadline_s for _, _, options in handle.calls]
    assert left == sorted(left, reverse=True)
    assert all(0 < seconds <= 5 for seconds in left)
    assert len(left) == 2


def test_a_replica_that_does_not_answer_is_408_in_time(monkeypatch):
    hung = Answers(ALL[:1], None, hangs=True)
    with pytest.raises(ApiError, match=r"within 0\.05 s"):
        draw(Handle(hung), monkeypatch, deadline_s=0.05)
    assert hung.cancelled


def test_cancelled_requests_are_503_and_no_image_stays_in_progress():
    hung = Answers(ALL[:1], None, hangs=True)
    generator = RemoteGenerator(Handle(hung), {"toy": INFO}, Limits())
    given_up = []

    async def ask():
        try:
            async for _ in generator.draw("toy", REQUEST, DrawOptions()):
                pass
        except ApiError as error:
            given_up.append((error.status, error.code))

    async def stop():
        asking = asyncio.create_task(ask())
        while not generator.under_way:
            await asyncio.sleep(0)
        assert generator.under_way == 3
        await drain(generator, 0.05)
        await asking

    asyncio.run(stop())
    assert given_up == [(503, "draining")]
    assert generator.under_way == 0


def test_arguments_are_those_of_the_server_and_its_limits(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("ray.serve.deployment", lambda cls, **options: Bound(cls, options, seen))
    (tmp_path / "key").write_text("sesame\n")
    app(
        {
            "path": "onnx", "beside": "digits", "batching": "request", "batch": "4", "queue": "2",
            "batch_sizes": "2,4", "images": "3", "steps": "50", "body_bytes": "1000",
            "deadline_s": "20", "body_s": "2", "max_replicas": "4", "images_per_replica": "3",
            "api_key_file": str(tmp_path / "key"), "allowed_hosts": "A.example, *.b.example",
            "allowed_origins": "http://ui.example",
        }
    )  # fmt: skip
    (replica, options), (ingress, _) = seen
    limits = Limits(
        batch=4, batch_sizes=(2, 4), queue=2, images=3, steps=50, body_bytes=1000, deadline_s=20.0,
        body_s=2.0,
    )  # fmt: skip
    wanted = RayOptions(
        path="onnx", beside="digits", batching="request", threads=1, limits=limits, max_replicas=4,
        images_per_replica=3.0, allowed_hosts=("a.example", "*.b.example"), allowed_origins=("http://ui.example",),
    )  # fmt: skip
    assert replica == (wanted,)
    assert ingress[1] == limits
    assert options["max_ongoing_requests"] == 6
    assert options["autoscaling_config"]["target_ongoing_requests"] == 3
    assert ingress[2].get_secret_value() == "sesame"
    assert ingress[3] == wanted.access
    assert "sesame" not in repr((replica, ingress, RayOptions(path="x", api_key="sesame")))


@pytest.mark.parametrize(
    ("headers", "pieces", "closes"),
    [
        ([], [False], False),
        ([(b"content-length", b"2")], [False], False),
        ([(b"content-length", b"2")], [], True),
        ([(b"transfer-encoding", b"chunked")], [True, True], True),
        ([(b"transfer-encoding", b"chunked")], [True, False], False),
    ],
    ids=["no body", "read", "not read", "read in part", "read in pieces"],
)
def test_a_connection_is_closed_unless_its_body_was_read_completely(headers, pieces, closes):
    async def application(scope, receive, send):
        for _ in pieces:
            await receive()
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    ingress = object.__new__(Ingress)
    ingress._app = application
    left, sent = list(pieces), []

    async def receive():
        return {"type": "http.request", "body": b"x", "more_body": left.pop(0)}

    async def send(message):
        sent.append(message)

    asyncio.run(ingress.answer({"type": "http", "headers": headers}, receive, send))
    assert ((b"connection", b"close") in sent[0]["headers"]) is closes


class Bound:
    """Replaces a deployment of Ray Serve and records its arguments."""

    def __init__(self, cls, options, seen):
        self.options, self.seen = options, seen

    def bind(self, *arguments):
        self.seen.append((arguments, self.options))


@pytest.mark.parametrize(
    ("images", "queued", "wanted"),
    [({}, 0, 2), ({"a": 12.0}, 0, 3), ({"a": 0.0, "b": 0.0}, 0, 0), ({"a": 6.0, "b": 1.0}, 3, 2.5)],
)
def test_replicas_follow_the_images_in_progress(images, queued, wanted):
    context = types.SimpleNamespace(
        aggregated_metrics={"images_under_way": images} if images else {},
        total_queued_requests=queued,
        target_num_replicas=2,
        config=types.SimpleNamespace(target_ongoing_requests=4),
    )
    assert replicas_wanted(context) == (wanted, {})


KEY = "sesame-open-7391"


@pytest.fixture(scope="module")
def started(served_onnx):
    """Run Ray without the API key in its environment; yield the address and the log folder."""
    from ray import serve

    patch = pytest.MonkeyPatch()
    patch.delenv("TRTQ_API_KEY", raising=False)
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # The interval at which replicas report; the default is ten seconds.
    patch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}", Path(context.address_info["session_dir"]) / "logs"
    serve.shutdown()
    ray.shutdown()
    patch.undo()


@contextlib.contextmanager
def deployed(given, monkeypatch):
    from ray import serve

    monkeypatch.setenv("TRTQ_API_KEY", KEY)
    serve.run(app(given), name="trtq", route_prefix="/")
    yield
    serve.delete("trtq")


@pytest.fixture
def url(started, served_onnx, monkeypatch):
    options = {"path": str(served_onnx), "min_replicas": "2", "max_replicas": "2"}
    with deployed(options, monkeypatch):
        yield started[0]


def client_of(url):
    return httpx.Client(base_url=url, timeout=120, headers={"Authorization": f"Bearer {KEY}"})


@pytest.mark.slow
def test_the_api_key_reaches_the_ingress_and_is_written_nowhere(url, started):
    from ray import serve

    assert httpx.post(url + PATH, json={"prompt": "1"}).status_code == 401
    assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    assert httpx.get(url + "/healthz").status_code == 200
    with client_of(url) as client:
        answer = client.post(PATH, json={"prompt": "1"}, headers={"X-Request-ID": "mine"})
    assert answer.status_code == 200
    assert [v for k, v in answer.headers.raw if k.lower() == b"x-request-id"] == [b"mine"]
    assert KEY not in repr(serve.status())
    logs = [path for path in started[1].rglob("*") if path.is_file()]
    assert any('"event": "drawn"' in path.read_text(errors="replace") for path in logs)
    assert [path for path in logs if KEY.encode() in path.read_bytes()] == []


def processes(count):
    from ray import serve

    replicas = serve.get_deployment_handle("Replica", app_name="trtq")
    ids, end = set(), time.monotonic() + 60
    while len(ids) < count:
        assert time.monotonic() < end
        ids.add(replicas.process.remote().result())
    return ids


@pytest.mark.slow
def test_a_replica_killed_under_load_loses_nothing(url):
    def ask(client, seed):
        body = {"prompt": str(seed % 3), "seed": seed, "steps": 150}
        return client.post(PATH, json=body)

    with client_of(url) as client:
        assert ask(client, 0).status_code == 200
        refused = client.post(PATH, json={"prompt": "none"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
        answers = {}
        threads = [
            threading.Thread(target=lambda seed=seed: answers.update({seed: ask(client, seed)}))
            for seed in range(16)
        ]
        victim = processes(2).pop()
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        answered = len(answers)
        for thread in threads:
            thread.join()
        assert answered < 16
        assert {answer.status_code for answer in answers.values()} == {200}
        again = ask(client, 5).json()["data"]
        assert answers[5].json()["data"] == again
        assert victim not in processes(2)


@pytest.mark.slow
def test_replicas_grow_under_load_and_shrink_after_it_and_nothing_is_lost(
    started, served_onnx, monkeypatch
):
    options = {
        "path": str(served_onnx), "min_replicas": "1", "max_replicas": "2", "batch": "2",
        "queue": "100", "upscale_delay_s": "0.5", "downscale_delay_s": "0.5", "look_back_s": "2",
    }  # fmt: skip
    with deployed(options, monkeypatch), client_of(started[0]) as client:
        assert running() == 1
        answers, over = [], threading.Event()

        def keep_asking(seed):
            # Two requests at a time are fewer than a batch, but each has ten images.
            while not over.is_set():
                body = {"prompt": "1", "n": 10, "seed": seed, "steps": 50}
                answers.append(client.post(PATH, json=body))

        threads = [threading.Thread(target=keep_asking, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        try:
            until_running(2)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        # The next requests arrive while a replica stops.
        while running() > 1:
            answers.append(client.post(PATH, json={"prompt": "1", "n": 1, "seed": 0, "steps": 50}))
            time.sleep(1)
        assert {answer.status_code for answer in answers} == {200}
        assert len({json.dumps(a.json()["data"][0]) for a in answers if a.json()["seed"] == 0}) == 1


def running():
    from ray import serve

    status = serve.status().applications["trtq"].deployments["Replica"]
    return status.replica_states.get("RUNNING", 0)


def until_running(count):
    end = time.monotonic() + 90
    while running() != count:
        assert time.monotonic() < end
        time.sleep(0.2)
