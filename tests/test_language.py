"""The words of the vocabulary table are gone; CONTRIBUTING.md explains the rules."""

from __future__ import annotations

import pytest

from tests import vocabulary
from tests.vocabulary import files_of_project, hits_in


def test_no_word_of_the_table_is_left():
    hits = [str(hit) for file in files_of_project() for hit in hits_in(file)]
    assert hits == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("found = 1\n", ["found"]),
        ("rows.found\n", []),
        ("MOST_IMAGES = LEAST = 2\n", ["MOST_IMAGES", "LEAST"]),
        ("x = 'at least two, the most recent'\n", []),
        ("# the least value\n", ["least"]),
        ('"""Nothing, if it is whole."""\n', ["Nothing, if"]),
        ("split_step = weight_step\n", ["split_step", "weight_step"]),
        ("raise ValueError('the model has not been loaded, it has not the layer')\n", ["has not"]),
    ],
)
def test_rules_see_names_and_prose(tmp_path, monkeypatch, code, words):
    file = tmp_path / "code.py"
    file.write_text(code)
    monkeypatch.setattr(vocabulary, "ROOT", tmp_path)
    assert [hit.text for hit in hits_in(file)] == words
