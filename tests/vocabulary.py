"""Count the words that the project does not use: `python -m tests.vocabulary [PATH ...]`.

CONTRIBUTING.md explains the language rules. A rule is a pattern, the places where it applies and what
to write instead. Names in code are split at underscores and capitals before they are matched, so that
`most_images`, `MOST_IMAGES` and `MostImages` all count as `most`.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trtq", "plugins", "calib", "benchmarks", "docs", "examples", "tests")
FILES = ("cli.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile")
SUFFIXES = (".py", ".md", ".toml", ".cu", ".cuh", ".html")
NAMES_IGNORED = ("tests/vocabulary.py", "tests/test_language.py", "CONTRIBUTING.md")
"""Files that quote the words."""


@dataclass(frozen=True)
class Rule:
    """One row of the vocabulary table.

    Attributes:
        pattern: what is counted, matched without regard to capitals.
        instead: what to write.
        where: `name` for identifiers in Python, `text` for prose, comments and strings.
        except_in: files in which the word has its allowed meaning.
    """

    pattern: str
    instead: str
    where: str
    except_in: tuple[str, ...] = ()


NAMES = [
    Rule(r"found|told|said|one|own", "the noun of the thing: rows, operand, message", "name"),
    Rule(r"(.* )?(most|least|fewest|longest|deepest|largest ever)( .*)?", "max_*, min_*", "name"),
    Rule(r"(.* )?mends?( .*)?", "fix", "name"),
    Rule(r"(.* )?(whoever|frugal|quick|tapped|idle|uneven)( .*)?", "house.md, section 5", "name"),
    Rule(r"spell(s|ed|ing)?( out)?( .*)?|widen .*|narrow .*", "decompose, cast, convert", "name"),
    Rule(r"drawer|drawing|card|hosted|front|remote drawer|light model", "see CONTRIBUTING", "name"),
    Rule(r"subjects?|source set", "conditioning, measured artefact", "name"),
    Rule(r"reporter|line reporter", "ProgressCallback, ProgressPrinter", "name"),
    Rule(
        r"(split|weight|size|optimiser|optimizer|after) steps?",
        "scale, update",
        "name",
        except_in=("trtq/quant/convert.py", "trtq/quant/modules.py"),  # A former keyword.
    ),
]
TEXTS = [
    Rule(r"\btold\b|\bsaid\b", "reported; name the speaker", "text"),
    Rule(r"\bmends?\b|\bmended\b", "fix", "text"),
    Rule(r"\bspell(s|ed|ing)?[- ]out\b", "decompose", "text"),
    Rule(r"\bso many\b|\bas many as there\b", "n, the number of", "text"),
    Rule(r"\bwhoever\b|\bwhatever\b", "the caller, any", "text"),
    # `--beside` is an option of `trtq serve`.
    Rule(r"(?<![-\"`])\bbeside\b(?![:\"`])", "next to; in addition to", "text"),
    Rule(r"\b(has|have|had) not\b(?! been| yet| already)", "does not have, has no", "text"),
    Rule(r"(?<!at )\b(most|least)\b(?! recent| likely| of the)", "maximum, minimum", "text"),
    Rule(r"\bNothing, if\b", "Raise unless", "text"),
    Rule(r"\bcannot be had\b|\bis to be had\b|\bfurniture\b", "is not available", "text"),
    Rule(r"\b(weight|quantisation|optimiser'?s?|split) steps?\b", "scale; update", "text"),
    Rule(r"\bin turns\b|\bby turns\b", "in rounds, interleaved", "text"),
]
_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


@dataclass(frozen=True)
class Hit:
    """One forbidden word at its place."""

    file: str
    line: int
    text: str
    instead: str

    def __str__(self) -> str:
        """`file:line: word -> instead`."""
        return f"{self.file}:{self.line}: {self.text!r} -> {self.instead}"


def _words(name: str) -> str:
    return " ".join(_WORDS.findall(name)).lower()


def _prose(text: str, file: str, line: int) -> Iterator[Hit]:
    for rule in TEXTS:
        if file in rule.except_in:
            continue
        for match in re.finditer(rule.pattern, text, re.IGNORECASE):
            at = line + text.count("\n", 0, match.start())
            yield Hit(file, at, match[0], rule.instead)


def _in_python(text: str, file: str) -> Iterator[Hit]:
    strings = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1))
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in strings:
            yield from _prose(token.string, file, token.start[0])
        elif token.type == tokenize.NAME and previous != ".":
            words = _words(token.string)
            for rule in NAMES:
                if file not in rule.except_in and re.fullmatch(rule.pattern, words):
                    yield Hit(file, token.start[0], token.string, rule.instead)
        previous = token.string


def hits_in(file: Path) -> list[Hit]:
    """Every forbidden word of a file."""
    name = file.relative_to(ROOT).as_posix()
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return list(_in_python(text, name))
    # Code between backticks names options and keys; blocks are checked as prose.
    return list(_prose(text, name, 1))


def files_of_project() -> list[Path]:
    """The files that are checked: real files, no links, nothing that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    names = [name for name in listed.split("\0") if name]
    return [
        ROOT / name
        for name in sorted(names)
        if (name in FILES or name.startswith(tuple(f"{folder}/" for folder in FOLDERS)))
        and name.endswith((*SUFFIXES, "Makefile"))
        and name not in NAMES_IGNORED
        and not (ROOT / name).is_symlink()
        and (ROOT / name).is_file()
    ]


def main() -> int:
    """Print every hit below the given paths, then the counts; 1 if there is one."""
    wanted = tuple(sys.argv[1:]) or ("",)
    hits = [
        hit
        for file in files_of_project()
        if file.relative_to(ROOT).as_posix().startswith(wanted)
        for hit in hits_in(file)
    ]
    for hit in hits:
        print(hit)
    print(f"{len(hits)} words to replace")
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main())
