"""On Ray Serve a replica may die: what was taken on is answered, and once."""

import asyncio
import os
import signal
import socket
import threading
import time

import httpx
import pytest

from tests.serve.test_app import PATH
from trtq.errors import UsageError
from trtq.serve.errors import ApiError
from trtq.serve.model import Card, Drawing
from trtq.serve.ray import RemoteDrawer, app
from trtq.serve.service import Event, Limits

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")
CARD = Card("toy", "class", ("zero",), (4, 4), 5, 1000, 1.0, True, "cpu", None)
ALL = [Event("accepted", 0, 0, 2), *(Event("image", index, 2, 2, b"png") for index in range(3))]


class Answers:
    """What one replica answers before it dies, if it does."""

    def __init__(self, events, end):
        self.events, self.end = events, end
        self.cancelled = False

    def cancel(self):
        self.cancelled = True

    async def __aiter__(self):
        for event in self.events:
            yield event
        if self.end is not None:
            raise self.end


class Handle:
    """Stands where Ray's handle of the replicas does."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.draw = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, *arguments):
        self.asked.append(arguments)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def draw(handle, monkeypatch, **options):
    monkeypatch.setattr("trtq.serve.ray._PAUSE_S", 0.0)
    drawer = RemoteDrawer(handle, {"toy": CARD}, Limits())

    async def collect():
        return [
            event async for event in drawer.draw("toy", Drawing("zero", 3, 7, 2, 1.0), **options)
        ]

    return asyncio.run(collect())


def test_a_lost_replica_is_replaced_and_nothing_comes_twice(monkeypatch):
    lost = ray.exceptions.RayActorError()
    first, second = Answers(ALL[:2], lost), Answers(ALL, None)
    handle = Handle(first, second)
    assert draw(handle, monkeypatch) == ALL
    assert [asked[1] for asked in handle.asked] == [Drawing("zero", 3, 7, 2, 1.0)] * 2
    assert first.cancelled


def test_replicas_that_keep_failing_are_503(monkeypatch):
    handle = Handle(Answers([], ray.exceptions.RayActorError()))
    with pytest.raises(ApiError, match="keep failing") as caught:
        draw(handle, monkeypatch)
    assert caught.value.status == 503
    assert len(handle.asked) == 10


def test_refusals_of_a_replica_are_the_answer(monkeypatch):
    import pickle

    refusal = ApiError(429, "queue_full", "later", param="n", retry_after=3)
    copy = pickle.loads(pickle.dumps(refusal))
    assert (copy.envelope, copy.headers) == (refusal.envelope, {"Retry-After": "3"})
    with pytest.raises(ApiError, match="later"):
        draw(Handle(Answers([copy], None)), monkeypatch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "'path': field required; the arguments are path"),
        ({"path": "x", "replicas": "2"}, "'replicas': extra inputs"),
        ({"path": "x", "max_replicas": "no"}, "'max_replicas'"),
        ({"path": "x", "min_replicas": "3"}, "min_replicas=3 is more than max_replicas=2"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_are_not_understood_are_named(given, message):
    with pytest.raises(UsageError, match=message):
        app(given)


@pytest.fixture(scope="module")
def url(served_onnx):
    from ray import serve

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"path": str(served_onnx), "min_replicas": "2", "max_replicas": "2"}
    serve.run(app(options), name="trtq", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def processes(count):
    from ray import serve

    replicas = serve.get_deployment_handle("Replica", app_name="trtq")
    found, end = set(), time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < end
        found.add(replicas.process.remote().result())
    return found


@pytest.mark.slow
def test_a_replica_killed_under_load_loses_nothing(url):
    def ask(client, seed):
        body = {"prompt": str(seed % 3), "seed": seed, "steps": 150}
        return client.post(PATH, json=body)

    with httpx.Client(base_url=url, timeout=120) as client:
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
