"""HTML pages: one colour per model, scaled differences and dark mode."""

import re

import pytest
import torch

from trtq.evaluation.page import FLOAT, _gain, grid_section
from trtq.report.page import Page, Section, Table, render
from trtq.report.plots import model_colours


def test_a_model_has_the_same_colour_in_tables_and_images():
    colours = model_colours([FLOAT, "w4a8"])
    table = Table(
        ("metric", "w4a8", FLOAT), (("fd", "1", "2"), ("w4a8", "3", "4")), colours=colours
    )
    images = torch.zeros(3, 1, 8, 8)
    grids = grid_section({FLOAT: images, "w4a8": images + 0.1}, colours)
    html = render(Page("t", "l", (Section("Numbers", table=table), grids)))
    marks = re.findall(r'background: (#\w{6})"></span>([^<]+)<', html)
    assert {name.split(" minus ")[0]: colour for colour, name in marks} == colours
    # The colour is in the header, a row, two grids and the difference.
    assert len(marks) == 2 + 1 + 2 + 1


def test_the_page_adapts_to_dark_mode_and_narrow_screens():
    html = render(Page("t", "l", ()))
    assert "prefers-color-scheme: dark" in html
    assert "max-width: 30rem" in html


@pytest.mark.parametrize(
    ("largest", "gain"), [(2.0, 1), (1.0, 1), (0.3, 2), (0.25, 4), (0.01, 64), (0.0, 64)]
)
def test_differences_are_multiplied_by_a_stated_power_of_two(largest, gain):
    error = torch.full((2, 1, 4, 4), largest)
    assert _gain([error]) == gain
    images = torch.zeros(2, 1, 4, 4)
    section = grid_section({FLOAT: images, "low": images + largest}, model_colours([FLOAT, "low"]))
    assert section.images[-1].caption == f"low minus float, {gain} x"
    assert f"multiplied by {gain}." in section.text


def test_colours_repeat_after_ten_models():
    colours = model_colours(str(i) for i in range(11))
    assert len(set(colours.values())) == 10
    assert colours["0"] == colours["10"]
