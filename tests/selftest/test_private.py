"""No path and no name of host or user gets into the file."""

from __future__ import annotations

import pytest

from trtq.selftest import private
from trtq.selftest.private import without_names


@pytest.fixture(autouse=True)
def _names(monkeypatch):
    monkeypatch.setattr(private.socket, "gethostname", lambda: "deep-thought.example")
    monkeypatch.setattr(private.getpass, "getuser", lambda: "arthur")
    private._names.cache_clear()
    yield
    private._names.cache_clear()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("cannot read /home/arthur/models/unet.onnx: gone", "cannot read unet.onnx: gone"),
        (r"cannot load C:\Users\Arthur\cache\x.dll", "cannot load x.dll"),
        ("in ~/models/a/b.onnx", "in b.onnx"),
        ("/tmp is full", "tmp is full"),
        ("host deep-thought of arthur", "host <host> of <user>"),
        ("Deep-Thought.example refused", "<host> refused"),
        ("arthurian words stay", "arthurian words stay"),
    ],
)
def test_paths_keep_their_last_part_and_names_go(text, clean):
    assert without_names(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "low_bit-f16-w8-nchw-64x64 on sm80: CUDA_ERROR_ILLEGAL_ADDRESS",
        "two launches/w8a8-odd-nhwc",
        "1 of 600 values are wrong, first at (0, 0): nan in place of 1.403",
        "3 GB/s; 2 / 3",
    ],
)
def test_other_texts_stay(text):
    assert without_names(text) == text


def test_a_user_without_an_entry_is_no_error(monkeypatch):
    def unknown():
        raise KeyError("getpwuid(): uid not found: 1000")

    monkeypatch.setattr(private.getpass, "getuser", unknown)
    assert without_names("deep-thought") == "<host>"
