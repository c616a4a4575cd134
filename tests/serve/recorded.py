"""Tiny recorded pipelines for servers: text to image, image to image, inpainting."""

import io

import numpy as np
from PIL import Image

from tests.families.pipelines import build
from trtq.artefact.opened import open_artefact
from trtq.pipelines.open import open_any
from trtq.runs.quantize import quantize
from trtq.serve.hosting import open_recorded

RECIPE = {"method": "minmax", "bits": "w4a8", "steps": 2, "calibration": {"images": 2}}
PROMPT = "a red circle"


def picture(seed, mode="RGB", size=(16, 16)):
    """An image of random pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0], mode)


def png(image, kind="PNG"):
    """The bytes of a file of an image."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def half_mask(mode="L"):
    """A mask whose left half is edited: white, or in mode `RGBA` transparent."""
    area = Image.new("L", (16, 16), 0)
    area.paste(255, (0, 0, 8, 16))
    if mode == "L":
        return area
    mask = picture(9, "RGBA")
    mask.putalpha(area.point(lambda value: 255 - value))
    return mask


def pipelines():
    """The pipelines and their calls, by name; all have the same parts."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    text = build("sd_1")
    options = {**text.components, "requires_safety_checker": False}
    image, area = picture(0), half_mask()
    return {
        "text": (text, {"prompt": PROMPT}),
        "img2img": (
            StableDiffusionImg2ImgPipeline(**options),
            {"prompt": PROMPT, "image": image, "strength": 1.0},
        ),
        "inpaint": (
            StableDiffusionInpaintPipeline(**options),
            {"prompt": PROMPT, "image": image, "mask_image": area, "height": 16, "width": 16},
        ),
    }


def quantized(folder, *names):
    """Quantise the pipelines with these names into subfolders of `folder`."""
    made = pipelines()
    for name in names:
        pipeline, call = made[name]
        quantize(pipeline, RECIPE, folder / name, calls=[call])


class Recorded:
    """A recorded artefact: the model that a server draws with, and the pipeline to compare with."""

    def __init__(self, folder, name):
        self.model = open_recorded(open_artefact(folder), name)
        self.source = open_any(folder)

    def expected(self, seed=1, index=0, **arguments):
        """Pixels of the image that `trtq generate` draws."""
        from trtq.calls.user_call import run_call

        call = self.source.call.updated(arguments)
        return np.asarray(run_call(self.source.pipeline, call, seed, "image", index).images[0])
