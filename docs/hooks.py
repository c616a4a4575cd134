"""Hooks of the documentation site: the command-line reference, and a check for foreign assets.

The page `reference/cli.md` holds one marker. The build replaces it with the help texts of all
commands, taken from the command tree, so the page cannot disagree with `trtq COMMAND --help`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARKER = "<!-- commands -->"
WIDTH = 96
"""Columns of a help text; wider lines would scroll sideways in the site."""
FOREIGN = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["']?(?:https?:)?//""")
CANONICAL = re.compile(r"<link rel=[\"']?canonical[^>]*>")


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words that reach a command and every visible command below it, without `trtq`.

    Args:
        command: node of the command tree that `typer.main.get_command` makes.
        words: words that the user types to reach `command`.
    """
    yield words
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from walk(child, (*words, name))


def command_reference() -> str:
    """The help text of every command, as Markdown."""
    import typer
    from typer.testing import CliRunner

    from trtq.cli import app

    settings = {"prog_name": "trtq", "terminal_width": WIDTH, "max_content_width": WIDTH}
    sections = []
    for words in walk(typer.main.get_command(app)):
        result = CliRunner().invoke(app, [*words, "--help"], **settings)
        if result.exit_code != 0:
            raise ValueError(f"trtq {' '.join(words)} --help fails: {result.output}")
        name = " ".join(("trtq", *words))
        sections.append(f"## {name}\n\n```text\n{result.stdout.strip()}\n```")
    return "\n\n".join(sections)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the marker of the command-line page."""
    if MARKER not in markdown:
        return markdown
    return markdown.replace(MARKER, command_reference())


def on_post_build(config: Any, **_: Any) -> None:
    """Raise if a page loads something from another host.

    Raises:
        ValueError: a page loads a script, style sheet, picture or frame from another host.
    """
    site = Path(config["site_dir"])
    for page in sorted(site.rglob("*.html")):
        text = CANONICAL.sub("", page.read_text(encoding="utf-8"))
        match = FOREIGN.search(text)
        if match is not None:
            raise ValueError(f"{page.relative_to(site)} loads from another host: {match[0]}")
