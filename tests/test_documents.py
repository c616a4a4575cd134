"""Untrusted text files: read within bounds, or refused in one line."""

import os
import random
import stat

import pytest

from trtq.documents import MAX_BYTES, check_depth, parse_json, read_object, read_text, shown
from trtq.errors import ArtefactError, RecipeError
from trtq.limits import parse_whole


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "no json": ("{", "Expecting"),
        "empty": ("", "Expecting"),
        "twice": ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is given twice"),
        "nan": ('{"a": NaN}', "NaN is not a valid JSON number"),
        "infinity": ("[-Infinity]", "-Infinity is not a valid JSON number"),
        "overflow": ("[1e999]", "too large"),
        "int64": ("[9223372036854775808]", "64 bits"),
        "digits": ("[" + "9" * 10_000 + "]", "64 bits"),
        "deep lists": ("[" * 100_000 + "]" * 100_000, "levels deep"),
        "deep objects": ('{"a":' * 100 + "1" + "}" * 100, "levels deep"),
        "surrogate": ('{"a": "\\ud800"}', "surrogate"),
        "surrogate key": ('{"\\udfff": 1}', "surrogate"),
    }.values(),
)
def test_json_is_read_strictly(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_infinity_is_allowed_in_diffusers_json():
    assert parse_json('{"lambda_min_clipped": -Infinity}', finite=False) == {
        "lambda_min_clipped": -float("inf")
    }
    assert parse_json('{"a": [1, -9223372036854775808, "\\ud83d\\ude00"]}')["a"][2] == "😀"


def _fifo(path):
    os.mkfifo(path)


HOSTILE = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "it is a folder"),
    "pipe": (_fifo, "it is a named pipe"),
    "link to nowhere": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "huge": (
        lambda path: os.truncate(_made(path), 10 << 30),
        "bytes; at most 67,108,864 are allowed",
    ),
    "utf-16": (
        lambda path: path.write_bytes("{}".encode("utf-16")),
        "UTF-16; save the file as UTF-8",
    ),
    "latin-1": (
        lambda path: path.write_bytes(b'{"\xe9": 1}'),
        "byte 0xe9 at offset 2 is not UTF-8",
    ),
    "nul": (lambda path: path.write_bytes(b"\0" * 10), "cannot read"),
    "list": (lambda path: path.write_text("[1]"), r"must hold a JSON object, got \[1\]"),
    "null": (lambda path: path.write_text("null"), "must hold a JSON object, got None"),
}


def _made(path):
    path.touch()
    return path


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_an_unreadable_file_is_refused_with_its_role_and_path(make, message, tmp_path):
    path = tmp_path / "a.json"
    make(path)
    with pytest.raises(RecipeError, match=message) as caught:
        read_object(path, "the recipe", error=RecipeError)
    assert "the recipe" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_with_a_nul_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="null byte"):
        read_text(tmp_path / "a\0b")


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_object(path) == {"a": 1}
    assert stat.S_ISREG(path.stat().st_mode)
    assert MAX_BYTES == 64 << 20


def test_any_value_can_be_quoted():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**10_000, deep, "x" * 1000, {"a": 10**10_000}, float("nan"), object()):
        assert len(shown(value)) < 200
    with pytest.raises(ValueError, match="levels deep"):
        check_depth(deep)


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1_0", "1.0", "٣", "1e3", "9" * 19])
def test_whole_numbers_are_plain_digits(text):
    with pytest.raises(ValueError, match="whole number"):
        parse_whole(text)


def test_random_bytes_are_read_or_refused(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "a.json"
    for _ in range(300):
        text = bytearray(
            b'{"format_version": 2, "kind": "run", "files": {"a": "b"}, "x": [1.5, null]}'
        )
        for _ in range(rng.randrange(1, 6)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        path.write_bytes(bytes(text[: rng.randrange(len(text) + 1)]))
        message = ""
        try:
            read_object(path)
        except ArtefactError as err:
            message = str(err)
        assert "\n" not in message
