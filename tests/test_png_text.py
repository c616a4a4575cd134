"""Generation parameters are stored in the PNG file."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from trtq.png_text import generation_texts, read_texts, with_texts
from trtq.serve.http.png import png_bytes

FACTS = {"model": "m", "seed": 7, "image": 2, "steps": 20, "guidance": 2.5, "size": (8, 16)}


@pytest.mark.parametrize("prompt", ["a red circle", "ein Kreis: 円 🟥\nline two", ""])
def test_an_imaging_library_reads_prompt_and_settings(prompt):
    pixels = np.arange(8 * 16, dtype=np.uint8).reshape(8, 16)
    texts = generation_texts(prompt=prompt, negative_prompt="dark", **FACTS)
    png = with_texts(png_bytes(pixels), texts)
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert (np.asarray(image) == pixels).all()
        assert image.text == texts
    facts = json.loads(texts["trtq"])
    assert facts["prompt"] == prompt
    assert (facts["seed"], facts["image"], facts["width"], facts["height"]) == (7, 2, 16, 8)
    assert texts["parameters"] == (
        f"{prompt}\nNegative prompt: dark\nSteps: 20, CFG scale: 2.5, Seed: 7, Image: 2, "
        "Size: 16x8, Model: m"
    )
    assert read_texts(png) == texts


def test_a_lone_surrogate_in_a_prompt_does_not_break_the_file():
    png = with_texts(png_bytes(np.zeros((2, 2), np.uint8)), {"parameters": "a\ud800b"})
    assert read_texts(png) == {"parameters": "a?b"}


def test_bytes_that_are_not_a_png_file_are_refused():
    with pytest.raises(ValueError, match="not a PNG"):
        with_texts(b"GIF89a" + b"0" * 100, {})
