"""What is said of a worker that died."""

import pytest

from trtq.processes import last_words

TRACE = 'Traceback (most recent call last):\n  File "x", line 1\n    f()\nOSError: too large\n'


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("", ""),
        ("\n \n", ""),
        ("one\ntwo\n\nthree\nfour\n", "two / three / four"),
        (TRACE, "OSError: too large"),
        ("a warning\n" + TRACE, "OSError: too large"),
    ],
)
def test_the_last_lines_are_one_and_a_traceback_is_its_last_line(said, words):
    assert last_words(said) == words
