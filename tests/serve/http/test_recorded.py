"""Recorded pipelines over HTTP: images equal the pipeline's own call, and bad input is a 400."""

import asyncio
import base64
import copy
import io
import json
import pickle
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import ToyModel, running
from tests.serve.http.test_app import events, wait_until
from tests.serve.recorded import PROMPT, Recorded, half_mask, picture, png
from trtq.errors import UsageError
from trtq.exporter.export import export
from trtq.serve.hosting import build_service
from trtq.serve.http.app import create_app
from trtq.serve.http.protocol import BoundedProtocol
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import GenerationRequest
from trtq.serve.options import Limits, ServeOptions
from trtq.serve.served import ServedModel
from trtq.serve.served_pipeline import ServedPipeline
from trtq.serve.service import Service
from trtq.serve.triton.package import package_triton

IMAGES, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture
def serve(recorded):
    """A function that starts a server with these models and returns its service and a client."""
    made = []

    def start(*models, **limits):
        limits, metrics = Limits(**limits), Metrics()
        models = models or [entry.model for entry in recorded.values()]
        served = {
            model.info.name: ServedModel(model, limits, "step", metrics)
            if isinstance(model, ToyModel)
            else ServedPipeline(model, limits, metrics)
            for model in models
        }
        service = Service(served, limits)
        context = running(create_app(service, metrics), http=BoundedProtocol)
        client = httpx.Client(base_url=context.__enter__(), timeout=60)
        made.append((service, context, client))
        return service, client

    yield start
    for service, context, client in made:
        client.close()
        context.__exit__(None, None, None)
        assert service.close(20)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))


def edit(client, image=None, mask=None, **fields):
    """Send an edit; a value of None is left out."""
    files = [("image", ("a.png", png(image)))] if isinstance(image, Image.Image) else []
    files += (
        [("image[]", ("a.png", png(each))) for each in image] if isinstance(image, list) else []
    )
    files += [("image", ("a.png", image))] if isinstance(image, bytes) else []
    files += [("mask", ("m.png", png(mask)))] if mask is not None else []
    fields = {"prompt": PROMPT, "seed": 1} | fields
    data = {name: str(value) for name, value in fields.items() if value is not None}
    return client.post(EDITS, data=data, files=files or [("image", ("", b""))])


class Slow:
    """Inside the block, each denoiser call of a model takes time, and calls are counted."""

    def __init__(self, entry, seconds=0.0, error=None):
        self.calls, self.seconds, self.error = 0, seconds, error
        self.module = entry.model._source.denoiser

    def __enter__(self):
        self.handle = self.module.register_forward_pre_hook(self.before)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def before(self, *_):
        self.calls += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error


def test_models_say_what_their_calls_take(serve):
    _, client = serve()
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    keys = ("takes_image", "needs_image", "takes_mask")
    assert {name: tuple(model[key] for key in keys) for name, model in models.items()} == {
        "text": (False, False, False),
        "img2img": (True, True, False),
        "inpaint": (True, True, True),
    }
    for model in models.values():
        assert (model["batching"], model["kind"], model["bits"]) == ("request", "text", "w4a8")
        assert (model["steps"], model["guidance"], model["image_size"]) == (2, 7.5, [16, 16])


def test_a_generation_equals_the_pipelines_own_call(serve, recorded):
    _, client = serve()
    fields = {"model": "text", "prompt": PROMPT, "seed": 1, "n": 2}
    body = client.post(IMAGES, json=fields).json()
    for index, data in enumerate(body["data"]):
        assert (pixels(data) == recorded["text"].expected(index=index)).all()
    assert (body["size"], body["steps"], body["guidance"]) == ("16x16", 2, 7.5)
    changed = {"prompt": "a blue square", "negative_prompt": "red", "steps": 3, "guidance": 3.0}
    (data,) = client.post(IMAGES, json=fields | changed | {"n": 1, "size": "24x16"}).json()["data"]
    expected = recorded["text"].expected(
        prompt="a blue square",
        negative_prompt="red",
        num_inference_steps=3,
        guidance_scale=3.0,
        height=16,
        width=24,
    )
    assert (pixels(data) == expected).all()


def test_an_edit_equals_the_pipelines_own_call(serve, recorded):
    _, client = serve()
    image = picture(5)
    for images, n in ((image, 2), ([image], 1)):
        answer = edit(client, images, model="img2img", n=n)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        assert len(data) == n
        for index, drawn in enumerate(data):
            assert (pixels(drawn) == recorded["img2img"].expected(index=index, image=image)).all()


@pytest.mark.parametrize("kind", ["white", "opaque", "transparent", "image"])
def test_white_or_transparent_pixels_are_edited(serve, recorded, kind):
    _, client = serve()
    image, area = picture(5), half_mask()
    sent, mask = image, area
    if kind == "opaque":
        mask = area.convert("RGBA")
    if kind == "transparent":
        mask = half_mask("RGBA")
    if kind == "image":
        sent, mask = image.copy(), None
        sent.putalpha(area.point(lambda value: 255 - value))
    answer = edit(client, sent, mask, model="inpaint")
    assert answer.status_code == 200, answer.text
    expected = recorded["inpaint"].expected(image=image, mask_image=area)
    assert (pixels(answer.json()["data"][0]) == expected).all()
    assert (expected != recorded["inpaint"].expected(image=image, mask_image=picture(3, "L"))).any()


def test_three_clients_at_once_each_get_their_own_image(serve, recorded):
    service, client = serve()

    async def together():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
            requests = [
                many.post(IMAGES, json={"model": "text", "prompt": PROMPT, "seed": seed})
                for seed in range(3)
            ]
            return [answer.json()["data"][0] for answer in await asyncio.gather(*requests)]

    for seed, data in enumerate(asyncio.run(together())):
        assert (pixels(data) == recorded["text"].expected(seed=seed)).all()
    assert service.under_way == 0


def test_a_stream_of_an_edit_has_progress_and_the_image(serve, recorded):
    _, client = serve()
    fields = {"stream": "true", "progress": "true", "partial_images": 1}
    received = list(events(edit(client, picture(5), model="img2img", steps=4, **fields)))
    assert [event["type"] for event in received] == [*["trtq.progress"] * 3, "image_edit.completed"]
    assert [event["step"] for event in received] == [1, 2, 3, 4]
    expected = recorded["img2img"].expected(image=picture(5), num_inference_steps=4)
    assert (pixels(received[-1]) == expected).all()


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_client_disconnects_the_pipelines_call_ends(serve, recorded, stream):
    service, client = serve()
    body = {"model": "text", "prompt": PROMPT, "steps": 200, "stream": stream, "seed": 1}
    with Slow(recorded["text"], 0.05) as slow:
        with pytest.raises(httpx.ReadTimeout):
            client.post(IMAGES, json=body, timeout=httpx.Timeout(1, connect=5))
        wait_until(lambda: service.under_way == 0)
        wait_until(lambda: service.served["text"].worker._current is None)
        assert 0 < slow.calls < 100
    assert 'trtq_errors_total{code="client_gone"} 1.0' in client.get("/metrics").text
    (data,) = client.post(IMAGES, json=body | {"steps": 2, "stream": False}).json()["data"]
    assert (pixels(data) == recorded["text"].expected()).all()


def test_an_image_of_a_large_request_does_not_delay_a_request_for_one(serve, recorded):
    service, client = serve()
    order = []
    worker = service.served["text"].worker
    draw = worker._model.draw
    with pytest.MonkeyPatch.context() as patch, Slow(recorded["text"], 0.2):
        patch.setattr(
            worker._model,
            "draw",
            lambda call, seed, index, *rest: (
                order.append((seed, index)),
                draw(call, seed, index, *rest),
            )[1],
        )

        async def both():
            async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
                body = {"model": "text", "prompt": PROMPT}
                large = asyncio.create_task(many.post(IMAGES, json=body | {"seed": 1, "n": 3}))
                while not order:
                    await asyncio.sleep(0.01)
                await asyncio.gather(large, many.post(IMAGES, json=body | {"seed": 2}))

        asyncio.run(both())
    assert order.index((2, 0)) < order.index((1, 2))


def test_the_queue_is_bounded_and_giving_up_ends_the_call(serve, recorded):
    service, client = serve(recorded["text"].model, batch=2, queue=0)
    body = {"prompt": PROMPT, "n": 2, "steps": 200}

    async def requests():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
            first = asyncio.create_task(many.post(IMAGES, json=body))
            while service.under_way < 2:
                await asyncio.sleep(0.01)
            second = await many.post(IMAGES, json=body)
            service.give_up()
            return await first, second

    with Slow(recorded["text"], 0.05):
        first, second = asyncio.run(requests())
    assert (second.status_code, first.status_code) == (429, 503)
    assert client.post(IMAGES, json=body).status_code == 503
    assert service.under_way == 0


def test_a_failed_call_is_500_and_a_dead_worker_is_reported(serve, recorded, caplog):
    service, client = serve(recorded["text"].model)
    body = {"prompt": PROMPT, "seed": 1}
    with Slow(recorded["text"], error=RuntimeError("out of order")):
        failed = client.post(IMAGES, json=body)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_error")
    assert "out of order" in failed.json()["error"]["message"]
    assert client.post(IMAGES, json=body).status_code == 200
    with Slow(recorded["text"], error=SystemExit("out of everything")):
        assert client.post(IMAGES, json=body).status_code == 500
    wait_until(lambda: not service.alive)
    assert service.died
    assert client.get("/healthz").status_code == 503


TRUNCATED = png(picture(0, size=(64, 64)))[:2000]
SMALL = picture(0, "L", (8, 8))
BAD_EDITS = [
    ({"image": b"hello"}, "image", "the file 'image' is no image; send PNG, JPEG, WEBP"),
    ({"image": TRUNCATED}, "image", "the image in 'image' is damaged"),
    ({"image": None}, "image", "the file 'image' is missing"),
    ({"image": [picture(0), picture(1)]}, None, "img2img takes one image, got 2"),
    (
        {"image": picture(0, size=(18, 16))},
        "image",
        "img2img edits images of WIDTHxHEIGHT from 4x4 to 32x32, width and height multiples of 4, "
        "got 18x16",
    ),
    ({"size": "32x32"}, "size", "have the size of the image, 16x16; got '32x32'"),
    ({"mask": half_mask()}, "mask", "img2img takes no mask; leave it out"),
    ({"model": "inpaint"}, "mask", "inpaint needs a mask: send the file 'mask'"),
    ({"model": "inpaint", "mask": SMALL}, "mask", "has 8x8 pixels and the image 16x16"),
    ({"model": "text"}, "image", "this model takes no image: text draws from prompts"),
    ({"n": "two"}, "n", "valid integer"),
    ({"steps": 0}, "steps", "greater than or equal to 1"),
    ({"guidance": "nan"}, "guidance", "valid number"),
    ({"response_format": "url"}, "response_format", "stores no files"),
    ({"quality": "hd"}, "quality", "the only quality is 'auto'"),
    ({"style": "vivid"}, "style", "does not support 'style'"),
    ({"stpes": 3}, "stpes", "did you mean 'steps'"),
]


@pytest.mark.parametrize(
    ("fields", "param", "message"), BAD_EDITS, ids=[row[2] for row in BAD_EDITS]
)
def test_an_invalid_edit_is_refused_in_one_line(serve, fields, param, message):
    _, client = serve()
    answer = edit(client, **{"model": "img2img", "image": picture(0)} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_images_are_limited_in_bytes_and_pixels(serve, monkeypatch):
    _, client = serve(upload_bytes=5000)
    large = edit(client, picture(0, size=(64, 64)), model="img2img")
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    monkeypatch.setattr("trtq.serve.http.edits.MAX_PIXELS", 400)
    for images in (picture(0, size=(21, 21)), [picture(0), picture(1)]):
        answer = edit(client, images, model="img2img")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
        assert "up to 400 pixels together" in answer.json()["error"]["message"]


def test_an_upright_jpeg_is_edited_as_it_is_shown(serve, recorded):
    _, client = serve()
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (0, 0, 8, 8))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # Rotated by 90 degrees.
    image.save(file, "JPEG", exif=exif)
    answer = edit(client, file.getvalue(), model="img2img")
    assert answer.json()["size"] == "8x16"
    shown = Image.open(file).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    expected = recorded["img2img"].expected(image=shown)
    assert (pixels(answer.json()["data"][0]) == expected).all()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"size": "64x64"}, "size", "text draws WIDTHxHEIGHT from 4x4 to 32x32, width and height"),
        ({"size": "20x20"}, None, "have to be divisible by 8 but are 20 and 20"),
        ({"model": "inpaint"}, "model", "inpaint edits images: send them to POST /v1/images/edits"),
        (
            {"model": "fixed", "steps": 3},
            "steps",
            "fixed has 2 steps, a fixed number; leave it out",
        ),
        ({"model": "fixed", "guidance": 2}, "guidance", "fixed takes no guidance"),
        ({"model": "fixed", "negative_prompt": "x"}, "negative_prompt", "takes no negative prompt"),
        ({"model": "fixed"}, None, "fixed takes no prompt; leave it empty"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_generation_that_the_call_does_not_take_is_refused(
    serve, recorded, fields, param, message
):
    fixed = copy.copy(recorded["text"].model)
    fixed.info = replace(
        fixed.info, name="fixed", kind="none", takes_steps=False, takes_guidance=False,
        guidance=1.0, takes_negative_prompt=False,
    )  # fmt: skip
    _, client = serve(recorded["text"].model, recorded["inpaint"].model, fixed)
    answer = client.post(IMAGES, json={"prompt": PROMPT} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_an_edit_of_a_model_without_images_is_refused(serve, toy, recorded):
    _, client = serve(toy)
    answer = edit(client, picture(0), prompt="one")
    assert answer.status_code == 400
    assert "this model takes no image" in answer.json()["error"]["message"]


NULLABLE = (
    "model", "n", "size", "quality", "response_format", "output_format", "background", "stream",
    "partial_images", "style", "moderation", "output_compression", "input_fidelity", "user",
    "progress", "steps", "guidance", "deadline",
)  # fmt: skip


@pytest.mark.parametrize("value", ["null", ""])
def test_null_fields_of_an_edit_count_as_missing(serve, recorded, value):
    _, client = serve(recorded["img2img"].model)
    answer = edit(client, picture(5), **dict.fromkeys(NULLABLE, value))
    assert answer.status_code == 200, answer.text
    (data,) = answer.json()["data"]
    assert (pixels(data) == recorded["img2img"].expected(image=picture(5))).all()


def test_null_fields_of_a_generation_count_as_missing(serve, recorded):
    _, client = serve(recorded["text"].model)
    fields = {"prompt": PROMPT, "seed": 1, "negative_prompt": None, **dict.fromkeys(NULLABLE)}
    (data,) = client.post(IMAGES, json=fields).json()["data"]
    assert (pixels(data) == recorded["text"].expected()).all()


def test_metrics_and_schema_have_both_routes(serve):
    _, client = serve()
    client.post(IMAGES, json={"model": "text", "prompt": PROMPT, "n": 2})
    edit(client, picture(0), model="img2img")
    edit(client, picture(0), model="text")
    text = client.get("/metrics").text
    assert f'trtq_request_seconds_count{{path="{IMAGES}",status="200"}} 1.0' in text
    assert f'trtq_request_seconds_count{{path="{EDITS}",status="200"}} 1.0' in text
    assert f'trtq_request_seconds_count{{path="{EDITS}",status="400"}} 1.0' in text
    assert 'trtq_images_total{model="text"} 2.0' in text
    assert 'trtq_images_total{model="img2img"} 1.0' in text
    assert 'trtq_step_seconds_count{model="text"} 4.0' in text
    assert 'trtq_queue_wait_seconds_count{model="text"} 2.0' in text
    assert client.get(EDITS).status_code == 405
    assert client.post(EDITS, json={"prompt": "x"}).status_code == 415
    paths = client.get("/openapi.json").json()["paths"]
    content = paths[EDITS]["post"]["requestBody"]["content"]
    schema = content["multipart/form-data"]["schema"]
    assert {"image", "mask", "prompt", "steps"} <= schema["properties"].keys()
    assert schema["required"] == ["image", "prompt"]


def test_the_picture_says_how_it_was_drawn(serve):
    from trtq.png_text import read_texts

    _, client = serve()
    (data,) = edit(client, picture(0), model="img2img", steps=3).json()["data"]
    facts = json.loads(read_texts(base64.b64decode(data["b64_json"]))["trtq"])
    assert (facts["prompt"], facts["steps"], facts["width"]) == (PROMPT, 3, 16)


def test_the_official_client_edits(serve, recorded):
    openai = pytest.importorskip("openai")
    _, http = serve(recorded["inpaint"].model)
    image, area = picture(5), half_mask("RGBA")
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none") as client:
        drawn = client.images.edit(
            image=("a.png", png(image)),
            mask=("m.png", png(area)),
            prompt=PROMPT,
            n=1,
            extra_body={"seed": 1},
        )
    expected = recorded["inpaint"].expected(image=image, mask_image=half_mask())
    assert (pixels({"b64_json": drawn.data[0].b64_json}) == expected).all()


def test_a_request_with_images_can_be_sent_to_another_process():
    """Ray passes requests to replicas."""
    request = GenerationRequest(PROMPT, 1, 0, 2, 1.0, images=(picture(0),), mask=half_mask())
    received = pickle.loads(pickle.dumps(request))
    assert received.images[0].tobytes() == picture(0).tobytes()
    assert received.mask.tobytes() == half_mask().tobytes()


@pytest.mark.slow
def test_an_onnx_folder_is_served_at_the_sizes_of_its_graph(recorded, tmp_path):
    """The command's own way in: options, one graph, a range of sizes."""
    text = recorded["text"]
    export(text.source.folder, tmp_path / "text", size="16x16:24x32")
    service = build_service(ServeOptions(path=str(tmp_path / "text")), Metrics())
    onnx = Recorded(tmp_path / "text", "text")
    app = create_app(service, Metrics())
    with (
        running(app, http=BoundedProtocol) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["provider"], model["sizes"]["largest"]) == ("cpu", [24, 32])
        body = {"prompt": PROMPT, "seed": 1}
        for size in ({}, {"height": 24, "width": 32}):
            fields = body | ({"size": "32x24"} if size else {})
            (data,) = client.post(IMAGES, json=fields).json()["data"]
            assert (pixels(data) == onnx.expected(**size)).all()
        refused = client.post(IMAGES, json=body | {"size": "40x24"})
    assert refused.status_code == 400
    assert "text draws WIDTHxHEIGHT from 16x16 to 32x24" in refused.json()["error"]["message"]
    assert service.close(20)
    with pytest.raises(UsageError, match="no server of Triton can load it yet"):
        package_triton(tmp_path / "text", tmp_path / "triton")
