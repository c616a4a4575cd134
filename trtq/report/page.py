"""A self-contained HTML page: tables, image grids and plots, everything inside one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

from trtq._optional import require

__all__ = ["Page", "Picture", "Section", "Table", "picture", "render"]


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page.

    Attributes:
        base64: its bytes.
        caption: what it shows.
        colour: `#rrggbb` of the model that it shows; None if it shows several.
    """

    base64: str
    caption: str
    colour: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        header: names of the columns.
        rows: cells as they are shown.
        best: index of a row to stand out, or None.
        words: the last column holds sentences, which may take several lines.
        colours: `#rrggbb` by the text of a cell or of a column's name; a mark of that colour stands
            before it.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: int | None = None
    words: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it.

    Attributes:
        title: the heading.
        text: a paragraph.
        table: a table.
        images: pictures.
        side_by_side: image grids next to each other, pixels kept sharp.
    """

    title: str
    text: str = ""
    table: Table | None = None
    images: tuple[Picture, ...] = ()
    side_by_side: bool = False


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    lead: str
    sections: tuple[Section, ...]


def png_bytes(sheet: np.ndarray) -> bytes:
    """uint8[H,W,3] as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def picture(png: np.ndarray | bytes, caption: str, colour: str | None = None) -> Picture:
    """A picture from pixels uint8[H,W,3] or from PNG bytes; see `Picture` for the colour."""
    data = png if isinstance(png, bytes) else png_bytes(png)
    return Picture(base64.b64encode(data).decode(), caption, colour)


def render(page: Page) -> str:
    """The page as HTML; every text is escaped.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    jinja2: Any = require("jinja2")
    template = (files("trtq") / "report" / "templates" / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    html: str = environment.from_string(template).render(page=page)
    return html
