"""The page in a real browser: keyboard, phone width, previews, comparison, server restarts."""

import base64
import io
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import TextToy, ToyModel, running
from tests.serve.http.test_app import Server
from trtq.png_text import read_texts
from trtq.serve.options import Limits

DONE = re.compile("^Done")


@pytest.fixture
def page():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "google-chrome", "chromium-browser")
    chromium = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as runtime:
        if chromium is None and not Path(runtime.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed")
        browser = runtime.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 360, "height": 740})
        opened.complaints = []
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.until = lambda text, seconds=20: playwright.expect(
            opened.locator("#status")
        ).to_have_text(text, timeout=1000 * seconds)
        yield opened
        browser.close()
        assert opened.complaints == []


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(*models, port, api_key=None):
    server = Server(models, Limits(), api_key=api_key)
    return server, running(server.app, port)


def test_the_page_draws_by_keyboard_on_a_phone_and_shows_models_side_by_side(page, port):
    toy, other = ToyModel(), ToyModel("float")
    toy.seconds = 0.05
    server, context = start(toy, other, port=port)
    with context as url:
        page.goto(url)
        page.until("Ready.")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for key in ("Tab", "Tab", "ArrowRight", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        preview = page.locator("#now img[src^='data:image/png']").first
        preview.wait_for(timeout=10000)
        page.until(DONE)
        captions = page.locator("#now figcaption").all_inner_texts()
        assert [text.split(" · ")[0] for text in captions] == ["two", "two"]
        assert [text.split(" · ")[-1] for text in captions] == ["toy", "float"]
        sources = [image.get_attribute("src") for image in page.locator("#now img").all()]
        pngs = [base64.b64decode(source.partition(",")[2]) for source in sources]
        pixels = [np.asarray(Image.open(io.BytesIO(png))) for png in pngs]
        assert (pixels[0] == pixels[1]).all()
        with page.expect_download() as download:
            page.locator("#now a").first.click()
        assert download.value.suggested_filename == "two_seed_0_5_steps_toy.png"
        saved = read_texts(download.value.path().read_bytes())
        facts = json.loads(saved["trtq"])
        assert (facts["class"], facts["seed"], facts["image"]) == ("two", 0, 0)
        page.click("#next")
        page.until(DONE)
        assert page.input_value("#seed") == "1"
        assert page.locator("#gallery figure").count() == 2
        # The two images of one seed stay together.
        assert page.locator("#gallery > .set").count() == 1
        page.fill("#steps", "100")
        page.click("#draw")
        page.until("Drawing …")
        page.keyboard.press("Escape")
        page.until("Stopped.")
    server.service.close()


def test_size_and_negative_prompt_are_shown_only_for_models_that_support_them(page, port):
    server, context = start(ToyModel(), TextToy(), port=port)
    fields = ("#width", "#height", "#negative")
    with context as url:
        page.goto(url)
        page.until("Ready.")
        assert not any(page.is_visible(field) for field in fields)
        # Models are compared only if they accept the same prompts.
        assert not page.is_visible("#compare")
        # Hidden fields do not block the form.
        page.click("#draw")
        page.until(DONE)
        page.select_option("#model", index=1)
        assert all(page.is_visible(field) for field in fields)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.focus("#prompt")
        page.keyboard.type("a cat")
        page.keyboard.press("Tab")
        page.keyboard.type("a dog")
        page.fill("#guidance", "3")
        for _ in range(2):
            page.keyboard.press("Tab")
            page.keyboard.press("ArrowUp")
        page.keyboard.press("Enter")
        page.until(DONE)
        (caption,) = page.locator("#now figcaption").all_inner_texts()
        assert caption == "a cat · without a dog · seed 0 · 5 steps · 8x8 · text"
        size = page.locator("#now img").evaluate(
            "image => [image.naturalWidth, image.naturalHeight]"
        )
        assert size == [8, 8]
        page.fill("#guidance", "1")
        page.click("#draw")
        page.until(re.compile("a negative prompt has no effect at guidance 1"))
        page.fill("#width", "6")
        page.click("#draw")
        assert page.evaluate("document.querySelector('#width').validity.stepMismatch")
    server.service.close()


def test_the_page_works_after_a_restart_of_the_server_and_reports_it(page, port):
    toy = ToyModel()
    server, context = start(toy, port=port)
    with context as url:
        page.goto(url)
        page.until("Ready.")
        toy.seconds = 0.05
        page.fill("#steps", "60")
        page.click("#draw")
        page.until("Drawing …")
        server.service.give_up()
        page.until(re.compile("was lost|about to stop|does not respond"))
    page.until(re.compile("does not respond; trying again"))
    server.service.close()
    again, context = start(ToyModel(), port=port)
    with context:
        page.until(DONE, 30)
        assert page.locator("#now img[src^='data:image/png']").count() == 1
    again.service.close()


def test_the_page_requests_the_key(page, port):
    server, context = start(ToyModel(), port=port, api_key="sesame")
    with context as url:
        page.goto(url)
        page.until(re.compile("API key"))
        page.fill("#key", "sesame")
        page.keyboard.press("Tab")
        page.until("Ready.")
        page.click("#draw")
        page.until(DONE)
    server.service.close()


def test_an_image_is_edited_by_upload(page, port, recorded):
    from tests.serve.recorded import PROMPT, half_mask, picture, png
    from trtq.serve.http.app import create_app
    from trtq.serve.metrics import Metrics
    from trtq.serve.served_pipeline import ServedPipeline
    from trtq.serve.service import Service

    limits, metrics = Limits(), Metrics()
    models = {
        name: ServedPipeline(recorded[name].model, limits, metrics) for name in ("text", "inpaint")
    }
    service = Service(models, limits)
    with running(create_app(service, metrics), port) as url:
        page.goto(url)
        page.until("Ready.")
        assert page.locator("#image-row").is_hidden()
        page.locator("#model").select_option(index=1)
        assert page.locator("#mask-row").is_visible()
        page.locator("#prompt").fill(PROMPT)
        page.locator("#draw").click()  # The browser asks for the image first.
        assert page.locator("#now figure").count() == 0
        for name, image in (("image", picture(5)), ("mask", half_mask())):
            file = {"name": f"{name}.png", "mimeType": "image/png", "buffer": png(image)}
            page.locator(f"#{name}").set_input_files(file)
        page.locator("#draw").click()
        page.until(DONE)
        assert "image.png" in page.locator("#now figcaption").inner_text()
        source = page.locator("#now img").get_attribute("src")
    assert service.close(20)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    expected = recorded["inpaint"].expected(0, image=picture(5), mask_image=half_mask())
    assert (pixels == expected).all()
