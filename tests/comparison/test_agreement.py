"""The share of images in which codes flip, as the bound of runtimes that sum in float32."""

import math

import pytest
import torch

from trtq.comparison.agreement import FLIPS_MARGIN, Flips, Pair, agreements, likely_max
from trtq.comparison.image_snr import ImageSnr, call_key

COUNT = 64


def outputs(images=COUNT):
    return torch.randn(images, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def changed(reference, share, noise=0.1):
    """The reference with noise in a share of its images, and the last bits of the others."""
    other = reference * (1 + 1e-7)
    count = round(share * len(other))
    other[:count] += noise * torch.randn(other[:count].shape)
    return other


def judged(given, floors, images=COUNT, steps=None, required=40.0):
    """The agreement of calls whose other outputs and floors are changed in these shares."""
    torch.manual_seed(1)
    reference = outputs(images)
    pairs = [
        Pair(reference, changed(reference, share), steps, lambda _, f=floor: changed(reference, f))
        for share, floor in zip(given, floors, strict=True)
    ]
    flips = Flips(lambda *_: {}, patterns=4, plain=3, by_share=True)
    rows = agreements(pairs, required, flips, few=False)
    # Polygraphy's comparison function gives the same verdict from the bound alone.
    for pair, (row, bound) in zip(pairs, rows, strict=True):
        given_arrays = {"y": pair.other.numpy()}
        expected = {"y": pair.reference.numpy()}
        full = bound.to_json() | {"steps": steps}
        check = ImageSnr({"default": {}, "calls": {call_key(expected): {"y": full}}})
        snr = check(expected, given_arrays)["y"].snr
        assert (snr >= bound.min_db) == (row.db >= bound.min_db)
    return [row.db >= bound.min_db for row, bound in rows], rows


@pytest.mark.parametrize(("count", "chance"), [(16, 0.15), (64, 0.5), (128, 0.9), (5, 0.01)])
def test_the_limit_is_a_quantile_of_the_binomial_distribution(count, chance):
    limit = likely_max(count, chance)

    def above(number):
        return sum(
            math.comb(count, k) * chance**k * (1 - chance) ** (count - k)
            for k in range(number + 1, count + 1)
        )

    assert above(limit) < 1e-5 <= above(limit - 1)
    assert likely_max(count, 1.0) == count


def test_as_many_flips_as_in_torch_are_set_aside():
    ok, rows = judged([0.3, 0.2], [0.1, 0.1])
    assert ok == [True, True]
    assert [row.ties for row, _ in rows] == pytest.approx([0.3, 0.2], abs=0.02)
    assert all(row.db > 100 > row.pooled_db for row, _ in rows)


def test_an_error_changes_every_image():
    ok, rows = judged([1.0], [0.1])
    assert ok == [False]
    # The floor does not excuse it, although torch itself has flips of the same size.
    assert rows[0][1].min_db == 40


def test_an_error_at_one_step_is_found_there():
    ok, _ = judged([0.2, 1.0, 0.2], [0.1, 0.1, 0.1])
    assert ok == [True, False, True]


def test_many_images_in_every_call_are_found_together():
    # In one call of 8 images each of them may have a flip; in ten calls not all of them.
    assert likely_max(8, 1 - 0.9**FLIPS_MARGIN) == 8
    ok, _ = judged(10 * [1.0], 10 * [0.1], images=8)
    assert not any(ok)
    ok, _ = judged(10 * [0.25], 10 * [0.1], images=8)
    assert all(ok)


def test_few_images_are_held_to_torch_itself():
    ok, rows = judged([1.0], [1.0], images=2)
    assert ok == [True]
    row, bound = rows[0]
    assert bound.min_db == pytest.approx(row.floor_db - 6)
    assert row.ties == 0


def test_equal_outputs_need_no_measurement():
    ok, rows = judged([0.0], [1.0])
    assert ok == [True]
    assert rows[0][0].floor_db == 200


def test_a_step_whose_images_all_changed_is_found_in_a_mixed_call():
    steps = [place // 32 for place in range(COUNT)]
    ok, _ = judged([0.5], [0.1], steps=steps)
    assert ok == [False]
    ok, _ = judged([0.15], [0.1], steps=steps)
    assert ok == [True]
