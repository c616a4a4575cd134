"""The server as clients use it: OpenAI's API, errors, streams, health, metrics and the page."""

import asyncio
import base64
import io
import json
import socket
import threading
import time

import httpx
import pytest
from PIL import Image

from tests.serve.conftest import TextToy, ToyModel, running
from tests.serve.http.test_protocol import send_until_hung_up_on
from trtq.serve.http.app import create_app
from trtq.serve.http.errors import ApiError
from trtq.serve.http.protocol import BoundedProtocol
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import GenerationRequest
from trtq.serve.options import Limits
from trtq.serve.requests import DrawOptions
from trtq.serve.served import ServedModel
from trtq.serve.service import Service

PATH = "/v1/images/generations"
KEY = "sesame"


class Server:
    """A running server with toy models."""

    def __init__(self, models, limits, batching="step", api_key=None):
        self.metrics = Metrics()
        served = {
            model.info.name: ServedModel(model, limits, batching, self.metrics) for model in models
        }
        self.service = Service(served, limits)
        self.app = create_app(self.service, self.metrics, api_key)

    def post(self, client, **fields):
        return client.post(PATH, json={"prompt": "one", "seed": 1} | fields)


@pytest.fixture
def serve(toy):
    """A function that starts a server with the toy model and returns it with a client."""
    made = []

    def start(models=(), api_key=None, **limits):
        server = Server([toy, *models], Limits(**limits), api_key=api_key)
        context = running(server.app, http=BoundedProtocol)
        client = httpx.Client(base_url=context.__enter__(), timeout=30)
        made.append((server, context, client))
        return server, client

    yield start
    toy.go.set()
    for server, context, client in made:
        client.close()
        context.__exit__(None, None, None)
        server.service.close()


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def picture(data):
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def events(response):
    for block in response.read().decode().strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        yield event


def test_images_are_sent_in_openais_format(serve):
    server, client = serve()
    answer = server.post(client, n=3, steps=4)
    assert answer.status_code == 200
    body = answer.json()
    assert [picture(data).size for data in body["data"]] == [(4, 4)] * 3
    assert len({data["b64_json"] for data in body["data"]}) == 3
    assert (body["size"], body["output_format"], body["seed"]) == ("4x4", "png", 1)
    assert server.service.under_way == 0


def test_a_seed_gives_the_same_images_and_the_default_seed_is_random(serve):
    server, client = serve()
    first, again = (server.post(client).json()["data"] for _ in range(2))
    assert first == again
    assert server.post(client, n=2).json()["data"][0] == first[0]
    seeds = {client.post(PATH, json={"prompt": "one"}).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_the_official_client_generates_and_streams(serve):
    openai = pytest.importorskip("openai")
    _, http = serve()
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none") as client:
        drawn = client.images.generate(model="toy", prompt="two", n=2, size="auto")
        assert [picture({"b64_json": image.b64_json}).size for image in drawn.data] == [(4, 4)] * 2
        stream = client.images.generate(
            model="toy", prompt="two", stream=True, partial_images=2, extra_body={"steps": 6}
        )
        with stream:
            kinds = [event.type for event in stream]
        assert kinds == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
        assert [model.id for model in client.models.list()] == ["toy"]
        with pytest.raises(openai.BadRequestError, match="'three' is not a class of toy"):
            client.images.generate(prompt="three")
        with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3'"):
            client.images.generate(prompt="two", model="dall-e-3")


def test_a_stream_has_progress_previews_and_the_image(serve):
    server, client = serve()
    received = list(
        events(server.post(client, stream=True, partial_images=3, progress=True, steps=8))
    )
    progress = [event for event in received if event["type"] == "trtq.progress"]
    assert [event["step"] for event in progress] == list(range(1, 8))
    previews = [event for event in received if event["type"].endswith("partial_image")]
    assert [event["partial_image_index"] for event in previews] == [0, 1, 2]
    assert [event["step"] for event in previews] == [2, 4, 6]
    assert received[-1]["type"] == "image_generation.completed"
    assert received[-1]["b64_json"] == server.post(client, steps=8).json()["data"][0]["b64_json"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": "three"}, None, "one of zero, one, two, or a number from 0 to 2"),
        ({"prompt": 7}, "prompt", "should be a valid string"),
        ({"prompt": "\ud800"}, "prompt", "not text"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "up to 10"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": 10**400}, "n", "n"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"steps": 201}, "steps", "choose 1 .. 200"),
        ({"size": "1024x1024"}, "size", "toy draws WIDTHxHEIGHT 4x4, got '1024x1024'; or use 'au"),
        ({"size": "0x4"}, "size", "draws WIDTHxHEIGHT 4x4"),
        ({"size": "4 x 4"}, "size", "draws WIDTHxHEIGHT 4x4"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"guidance": 1e9}, "guidance", "less than or equal to 30"),
        ({"response_format": "url"}, "response_format", "stores no files"),
        ({"output_format": "webp"}, "output_format", "'png'"),
        ({"background": "transparent"}, "background", "'opaque'"),
        ({"partial_images": 2}, "partial_images", '"stream": true'),
        ({"negative_prompt": "x"}, "negative_prompt", "toy takes no negative prompt"),
        ({"negative_prompt": 7}, "negative_prompt", "should be a valid string"),
        ({"negative": "x"}, "negative", "did you mean 'negative_prompt'"),
        ({"num_inference_steps": 5}, "num_inference_steps", "did you mean 'steps'"),
        ({"stpes": 5}, "stpes", "did you mean 'steps'"),
        ({"deadline": 0}, "deadline", "greater than 0"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_an_invalid_field_is_refused_by_name(serve, fields, param, message):
    _, client = serve()
    body = json.dumps({"prompt": "one"} | fields)
    answer = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


NULLABLE = (
    "model", "n", "size", "quality", "response_format", "output_format", "background", "stream",
    "partial_images", "style", "moderation", "output_compression", "input_fidelity", "user",
    "negative_prompt", "progress", "seed", "steps", "guidance", "deadline",
)  # fmt: skip


@pytest.mark.parametrize("name", NULLABLE)
def test_a_null_field_counts_as_missing(serve, name):
    _, client = serve()
    plain = {"prompt": "one"} | ({} if name == "seed" else {"seed": 1})
    with_null, without = (client.post(PATH, json=plain | more) for more in ({name: None}, {}))
    assert with_null.status_code == 200
    assert len(with_null.json()["data"]) == 1
    if name != "seed":
        assert with_null.json()["data"] == without.json()["data"]


def test_all_fields_but_the_prompt_may_be_null_at_once(serve):
    _, client = serve()
    answer = client.post(PATH, json={"prompt": "one"} | dict.fromkeys(NULLABLE))
    assert (answer.status_code, len(answer.json()["data"])) == (200, 1)
    schema = client.get("/openapi.json").json()["paths"][PATH]["post"]["requestBody"]
    fields = schema["content"]["application/json"]["schema"]["properties"]
    assert set(fields) <= {*NULLABLE, "prompt"}
    assert "null" in fields["n"]["type"]


@pytest.mark.parametrize("name", ["prompt", "stpes", "num_inference_steps", "Model", ""])
def test_null_does_not_make_a_field_known_or_the_prompt_optional(serve, name):
    _, client = serve()
    answer = client.post(PATH, json={"prompt": "one"} | {name: None})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_a_model_of_several_sizes_draws_the_requested_size(serve):
    server, client = serve(models=[TextToy()])
    body = server.post(client, model="text", size="12x8", n=2).json()
    assert body["size"] == "12x8"
    assert [picture(data).size for data in body["data"]] == [(12, 8)] * 2
    assert server.post(client, model="text", size="auto").json()["size"] == "4x4"
    done = list(events(server.post(client, model="text", size="8x4", stream=True)))[-1]
    assert (done["size"], picture(done).size) == ("8x4", (8, 4))
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert models["toy"]["sizes"] is None
    assert models["text"]["sizes"] == {
        "smallest": [4, 4], "largest": [8, 12], "multiple_of": 4, "step": 4,
    }  # fmt: skip


@pytest.mark.parametrize("size", ["16x8", "8x12", "6x8", "8", "0x8", "8x8x8", "-4x8", "9" * 4000])
def test_an_unsupported_size_is_refused_and_the_sizes_are_named(serve, size):
    server, client = serve(models=[TextToy()])
    answer = server.post(client, model="text", size=size)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "size")
    assert (
        "draws WIDTHxHEIGHT from 4x4 to 12x8, width and height multiples of 4, got"
        in error["message"]
    )
    assert error["message"].endswith("or use 'auto' for 4x4")


def test_guidance_up_to_one_disables_it_as_in_diffusers(serve):
    server, client = serve()
    drawn = [server.post(client, guidance=guidance).json()["data"] for guidance in (1, 0.5, 0)]
    assert drawn[0] == drawn[1] == drawn[2] != server.post(client, guidance=1.5).json()["data"]


def test_a_negative_prompt_changes_the_image_if_there_is_guidance(serve):
    server, client = serve(models=[TextToy()])

    def drawn(**fields):
        return server.post(client, model="text", **fields)

    with_it = drawn(guidance=3, negative_prompt="ugly").json()["data"]
    assert with_it != drawn(guidance=3).json()["data"]
    assert with_it == drawn(guidance=3, negative_prompt="ugly").json()["data"]
    useless = drawn(guidance=1, negative_prompt="ugly")
    assert (useless.status_code, useless.json()["error"]["param"]) == (400, "negative_prompt")
    assert "has no effect at guidance 1" in useless.json()["error"]["message"]
    assert drawn(guidance=1, negative_prompt="").status_code == 200
    models = client.get("/v1/models").json()["data"]
    assert [model["takes_negative_prompt"] for model in models] == [False, True]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 20000,
        b'{"a":' * 9000,
        b'{"prompt": NaN}',
        b'{"prompt": "one", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "one", "guidance": Infinity}',
        b'{"prompt": "one", "\\ud800": 1}',
        b'{"prompt": "one", "deadline": -Infinity}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_malformed_bodies_are_refused(serve, body):
    server, client = serve()
    answer = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert server.post(client).status_code == 200


def test_bodies_that_are_large_slow_or_not_json_are_refused(serve):
    _, client = serve(body_bytes=1000, body_s=0.2)
    large = client.post(PATH, json={"prompt": "x" * 2000})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    foreign = client.post(PATH, content=b"{}", headers={"Content-Type": "text/plain"})
    assert foreign.status_code == 415

    def slowly():
        yield b"{"
        time.sleep(0.5)
        yield b"}"

    slow = client.post(PATH, content=slowly(), headers={"Content-Type": "application/json"})
    assert (slow.status_code, slow.json()["error"]["code"]) == (408, "body_timeout")


@pytest.mark.parametrize(
    ("piece", "code"),
    [(b"1\r\n \r\n", "body_timeout"), (b"2000\r\n" + b" " * 8192 + b"\r\n", "body_too_large")],
    ids=["trickle", "flood"],
)
def test_a_body_without_end_is_answered_and_its_connection_closed(serve, monkeypatch, piece, code):
    monkeypatch.setattr("trtq.serve.http.protocol._LINGER_S", 0.3)
    server, client = serve(body_bytes=1000, body_s=0.5)
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        with pytest.raises(ConnectionError):
            send_until_hung_up_on(connection, piece)
    text = client.get("/metrics").text
    assert f'trtq_errors_total{{code="{code}"}} 1.0' in text
    assert server.post(client).status_code == 200


def test_other_paths_and_methods_are_errors_in_the_same_format(serve):
    _, client = serve()
    for method, path, status in (("GET", PATH, 405), ("GET", "/nothing", 404), ("PUT", "/", 405)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] in ("not_found", "method_not_allowed")


def test_a_full_queue_is_429_with_retry_after(serve, toy):
    server, client = serve(batch=2, queue=3)
    toy.go.clear()
    waiting = [threading.Thread(target=server.post, args=(client,)) for _ in range(5)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: server.service.under_way == 5)
    for stream in (False, True):
        refused = server.post(client, stream=stream)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
    toy.go.set()
    for thread in waiting:
        thread.join()
    assert server.service.under_way == 0
    assert server.post(client).status_code == 200


def test_a_deadline_is_kept_and_the_image_is_cancelled(serve, toy):
    server, client = serve()
    toy.seconds = 0.05
    late = server.post(client, steps=100, deadline=0.3)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert "within 0.3 s" in late.json()["error"]["message"]
    calls = len(toy.calls)
    time.sleep(0.3)
    assert len(toy.calls) <= calls + 1
    assert server.service.under_way == 0


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_client_disconnects_its_image_is_cancelled(serve, toy, stream):
    server, client = serve()
    toy.seconds = 0.02
    with pytest.raises(httpx.ReadTimeout):
        client.post(
            PATH,
            json={"prompt": "one", "steps": 200, "stream": stream},
            timeout=httpx.Timeout(0.3, connect=5),
        )
    wait_until(lambda: server.service.under_way == 0, seconds=2)
    assert 0 < len(toy.calls) < 100
    text = client.get("/metrics").text
    assert 'trtq_errors_total{code="client_gone"} 1.0' in text
    assert "internal_error" not in text
    assert 'status="500"' not in text


def connect(client, **options):
    """Open a raw connection to a server and send a request for a stream."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((client.base_url.host, client.base_url.port))
    body = json.dumps({"prompt": "one", "stream": True} | options).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_slow_readers_do_not_occupy_queue_slots(serve, toy):
    server, client = serve(batch=2, queue=8)
    # The model waits until the test has counted all images in progress, so none is complete before.
    toy.go.clear()
    with connect(client, n=10, steps=200, progress=True):
        wait_until(lambda: server.service.under_way == 10)
        toy.go.set()
        wait_until(lambda: server.service.under_way == 0, seconds=30)
        assert toy.decoded == 10
        assert server.post(client).status_code == 200


def test_a_disconnect_during_the_body_is_not_an_error_of_the_server(serve, caplog):
    _, client = serve()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    wait_until(lambda: "client_gone" in client.get("/metrics").text)
    assert "internal_error" not in client.get("/metrics").text
    assert "Traceback" not in caplog.text


def test_a_deadline_holds_while_the_prompt_is_encoded(serve, toy):
    server, client = serve()
    starts = toy.starts
    toy.starts = lambda request: (time.sleep(1), starts(request))[1]
    begun = time.monotonic()
    late = server.post(client, deadline=0.1)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert time.monotonic() - begun < 0.9
    assert late.headers["X-Should-Retry"] == "false"
    wait_until(lambda: server.service.under_way == 0)
    assert toy.calls == []


def test_a_deadline_of_zero_has_passed(serve):
    server, _ = serve()

    async def draw():
        request = GenerationRequest("one", 1, 0, 5, 1.0)
        async for _ in server.service.draw("toy", request, DrawOptions(deadline_s=0.0)):
            pass

    with pytest.raises(ApiError, match="within 0 s"):
        asyncio.run(draw())
    assert server.service.under_way == 0


def test_the_servers_limits_apply_to_defaults(serve):
    server, client = serve(steps=3, batch=2, queue=1)
    assert client.post(PATH, json={"prompt": "one"}).json()["steps"] == 3
    model = client.get("/v1/models/toy").json()
    assert (model["steps"], model["most_steps"], model["most_images"]) == (3, 3, 3)
    never = server.post(client, n=4)
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")


def test_the_health_checks_report_a_dead_batcher(serve, toy):
    server, client = serve()
    assert client.head("/healthz").status_code == client.head("/readyz").status_code == 200
    server.service.served["toy"].batcher.close(RuntimeError("gone"))
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 503


def test_a_batcher_that_dies_logs_it_and_answers_its_requests(serve, toy, caplog):
    server, client = serve()
    toy.fail = SystemExit("out of everything")
    failed = server.post(client)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_error")
    assert "its batcher has died" in failed.json()["error"]["message"]
    wait_until(lambda: not server.service.alive)
    assert client.get("/readyz").status_code == client.get("/healthz").status_code == 503
    assert server.post(client).status_code == 500
    (record,) = (entry for entry in caplog.records if "the batcher died" in entry.message)
    assert record.levelname == "CRITICAL"
    assert "out of everything" in str(record.exc_info[1])


def test_a_failed_engine_is_500_and_the_server_keeps_running(serve, toy):
    server, client = serve()
    toy.fail = ValueError("out of order")
    failed = server.post(client)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_error")
    in_stream = list(events(server.post(client, stream=True)))
    assert [event["type"] for event in in_stream] == ["error"]
    toy.fail = None
    assert server.post(client).status_code == 200


def test_draining_refuses_new_requests_and_finishes_old_ones(serve, toy):
    server, client = serve()
    toy.go.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.post(client)))
    thread.start()
    wait_until(lambda: server.service.under_way == 1)
    server.service.draining = True
    refused = server.post(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert client.get("/readyz").status_code == client.get("/v2/health/ready").status_code == 503
    assert client.get("/healthz").status_code == 200
    toy.go.set()
    thread.join()
    assert answers[0].status_code == 200


def test_giving_up_answers_with_503(serve, toy):
    server, client = serve()
    toy.go.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.post(client, n=2)))
    thread.start()
    wait_until(lambda: server.service.under_way == 2)
    wait_until(lambda: server.service.served["toy"].batcher._items)
    server.service.give_up()
    thread.join()
    assert answers[0].status_code == 503
    assert server.post(client).status_code == 503


def test_health_and_models(serve):
    _, client = serve(models=[ToyModel("float")])
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/models/float/ready").json() == {"ready": True}
    assert client.get("/v2/models/none/ready").status_code == 404
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["toy", "float"]
    assert models[0]["classes"] == ["zero", "one", "two"]
    assert client.get("/v1/models/float").json() == models[1]
    assert client.get("/v1/models/none").status_code == 404


def test_the_requested_model_is_used(serve):
    other = ToyModel("float")
    server, client = serve(models=[other])
    assert server.post(client, model="float").json()["model"] == "float"
    assert other.calls
    assert server.post(client).json()["model"] == "toy"


def test_metrics_count_what_happened(serve):
    server, client = serve()
    server.post(client, n=2, steps=5)
    server.post(client, n=99)
    text = client.get("/metrics").text
    assert 'trtq_images_total{model="toy"} 2.0' in text
    assert 'trtq_batch_rows_sum{model="toy"} 10.0' in text
    assert 'trtq_queue_wait_seconds_count{model="toy"} 2.0' in text
    assert 'trtq_errors_total{code="invalid_value"} 1.0' in text
    assert 'trtq_images_under_way{model="toy"} 0.0' in text
    assert 'trtq_images_waiting{model="toy"} 0.0' in text
    assert 'trtq_batch_rows_limit{model="toy"} 8.0' in text
    assert f'trtq_request_seconds_count{{path="{PATH}",status="200"}} 1.0' in text
    assert "process_resident_memory_bytes" in text


def test_request_ids_are_returned_and_invalid_ids_replaced(serve):
    _, client = serve()
    assert (
        client.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    )
    for bad in ("x" * 200, "a b"):
        given = client.get("/healthz", headers={"X-Request-ID": bad}).headers["X-Request-ID"]
        assert len(given) == 32
    assert "X-Request-ID" in client.get("/nothing").headers


def test_the_api_key_is_required_for_v1_only(serve):
    server, client = serve(api_key=KEY)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        answer = client.post(PATH, json={"prompt": "one"}, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for scheme in ("bearer", "Bearer"):
        client.headers["Authorization"] = f"{scheme} {KEY}"
        assert server.post(client).status_code == 200
    assert client.get("/v1/models").status_code == 200
    del client.headers["Authorization"]
    assert client.get("/readyz").status_code == 200


def test_the_page_loads_nothing_from_elsewhere(serve):
    _, client = serve()
    answer = client.get("/")
    assert answer.status_code == 200
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_log_is_one_json_object_per_line(serve):
    from trtq.serve.logs import log_to

    lines = io.StringIO()
    log_to(lines)
    server, client = serve()
    client.post(PATH, json={"prompt": "one", "steps": 3}, headers={"X-Request-ID": "me"})
    server.post(client, n=99)
    wait_until(lambda: lines.getvalue().count("\n") == 2)  # The log line follows the response.
    entries = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [line["status"] for line in entries] == [200, 400]
    assert (entries[0]["request_id"], entries[0]["steps"], entries[0]["images"]) == ("me", 3, 1)
    assert entries[1]["error"] == "invalid_value"
    assert "one" not in lines.getvalue()  # Prompts are private.


def test_many_clients_at_once_each_get_their_own_image(serve):
    server, client = serve(batch=4)
    alone = [server.post(client, seed=seed, steps=2 + seed).json()["data"] for seed in range(12)]

    async def together():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=30) as many:
            requests = [
                many.post(PATH, json={"prompt": "one", "seed": seed, "steps": 2 + seed})
                for seed in range(12)
            ]
            return [answer.json()["data"] for answer in await asyncio.gather(*requests)]

    assert asyncio.run(together()) == alone
    assert server.service.under_way == 0
