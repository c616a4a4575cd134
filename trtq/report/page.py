"""Self-contained HTML pages with tables, image grids and plots in one file."""

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
    """A PNG image in a page.

    Attributes:
        base64: encoded PNG bytes.
        caption: text below the image.
        colour: colour `#rrggbb` of the model; None: the image shows several models.
    """

    base64: str
    caption: str
    colour: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        header: column titles.
        rows: cell texts.
        best: index of the highlighted row; None: no row.
        words: whether the last column contains sentences and may wrap.
        colours: colours `#rrggbb` of cells, by cell text or column title; shown as a mark in the cell.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: int | None = None
    words: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: heading.
        text: paragraph below the heading.
        table: table below the paragraph; None: no table.
        images: images below the table.
        side_by_side: whether to place the images next to each other, scaled without smoothing.
    """

    title: str
    text: str = ""
    table: Table | None = None
    images: tuple[Picture, ...] = ()
    side_by_side: bool = False


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: title of the page.
        lead: paragraph below the title.
        sections: sections of the page, in order.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]


def png_bytes(sheet: np.ndarray) -> bytes:
    """Encode uint8[H,W,3] as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def picture(png: np.ndarray | bytes, caption: str, colour: str | None = None) -> Picture:
    """Create a `Picture` from pixels uint8[H,W,3] or PNG bytes.

    Args:
        png: pixels uint8[H,W,3], or the bytes of a PNG file.
        caption: text below the image.
        colour: see `Picture`.
    """
    data = png if isinstance(png, bytes) else png_bytes(png)
    return Picture(base64.b64encode(data).decode(), caption, colour)


def render(page: Page) -> str:
    """Render the page as HTML; all texts are escaped.

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
