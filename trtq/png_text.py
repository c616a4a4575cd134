"""Generation parameters as text inside PNG files.

Two entries are written: `parameters`, in the format that viewers of generated images read, and `trtq`,
the same facts as JSON. Both are uncompressed `iTXt` chunks in UTF-8 (PNG specification, section
11.3.3.4).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

__all__ = ["generation_texts", "read_texts", "with_texts"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KIND = b"iTXt"


def generation_texts(
    *,
    model: str,
    prompt: str | None,
    seed: int,
    image: int,
    steps: int | None,
    guidance: float | None,
    size: tuple[int, int],
    negative_prompt: str | None = None,
    label: int | str | None = None,
) -> dict[str, str]:
    """Make the two text entries of one generated image.

    Args:
        model: name of the model.
        prompt: prompt; None for a model without prompts.
        seed: seed of the request.
        image: index of the image among the images of that seed, from 0.
        steps: number of denoising steps; None if it is unknown.
        guidance: classifier-free guidance scale; None for a pipeline without one.
        size: height and width in pixels.
        negative_prompt: negative prompt; None if there is none.
        label: class of the image; None for a model without classes.

    Returns:
        Texts by keyword.
    """
    facts: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt or None,
        "class": label,
        "seed": seed,
        "image": image,
        "steps": steps,
        "guidance": guidance,
        "width": size[1],
        "height": size[0],
        "model": model,
    }
    facts = {key: value for key, value in facts.items() if value is not None}
    words = prompt if prompt is not None else "" if label is None else f"class {label}"
    negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    known = "" if steps is None else f"Steps: {steps}, "
    known += "" if guidance is None else f"CFG scale: {guidance:g}, "
    line = (
        f"{words}{negative}\n{known}Seed: {seed}, Image: {image}, Size: {size[1]}x{size[0]}, "
        f"Model: {model}"
    )
    return {"parameters": line, "trtq": json.dumps(facts, ensure_ascii=False)}


def with_texts(png: bytes, texts: Mapping[str, str]) -> bytes:
    """Insert text entries before the pixels of a PNG file.

    Args:
        png: bytes of a PNG file.
        texts: entries by keyword (Latin-1, 1 to 79 bytes).

    Returns:
        The bytes of the new PNG file.

    Raises:
        ValueError: the bytes are not a PNG file.
    """
    # Signature and header chunk: 4 bytes of length, 4 of kind, 13 of data, 4 of checksum.
    end = len(_SIGNATURE) + 4 + 4 + 13 + 4
    if not png.startswith(_SIGNATURE) or len(png) < end:
        raise ValueError("these bytes are not a PNG file")
    chunks = b"".join(_chunk(key, text) for key, text in texts.items())
    return png[:end] + chunks + png[end:]


def _chunk(keyword: str, text: str) -> bytes:
    # Keyword, terminator, no compression (flag and method), no language, no translated keyword.
    # A lone surrogate, which JSON may hold, has no UTF-8 form and is replaced.
    data = keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8", "replace")
    return struct.pack(">I", len(data)) + _KIND + data + struct.pack(">I", zlib.crc32(_KIND + data))


def read_texts(png: bytes) -> dict[str, str]:
    """The uncompressed `iTXt` entries of a PNG file, by keyword."""
    texts = {}
    place = len(_SIGNATURE)
    while place + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        if kind == _KIND:
            keyword, _, rest = data.partition(b"\0")
            if rest[:1] == b"\0":
                texts[keyword.decode("latin-1")] = rest[2:].split(b"\0", 2)[2].decode("utf-8")
        place += 12 + length
    return texts
