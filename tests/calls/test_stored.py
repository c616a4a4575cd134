"""A user's call survives its files; damaged files are refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from trtq.calls.stored import load_call, save_call
from trtq.calls.user_call import UserCall
from trtq.errors import ArtefactError, UsageError


def picture(mode="RGB"):
    values = np.random.RandomState(0).randint(0, 255, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_numbers_texts_images_and_tensors_are_read_back_exactly(tmp_path):
    given = {
        "prompt": ["a", "b"],
        "image": picture(),
        "frames": [picture("L"), picture("RGBA")],
        "strength": 0.25,
        "ids": torch.arange(6.0).reshape(2, 3),
        "size": (4, 5),
        "none": None,
    }
    save_call(UserCall(given), tmp_path / "call")
    read = load_call(tmp_path / "call").arguments
    assert list(read) == list(given)
    for name in ("prompt", "strength", "size", "none"):
        assert read[name] == given[name]
    assert torch.equal(read["ids"], given["ids"])
    for before, after in zip(
        [given["image"], *given["frames"]], [read["image"], *read["frames"]], strict=True
    ):
        assert (before.mode, before.tobytes()) == (after.mode, after.tobytes())


def test_a_callback_cannot_be_stored(tmp_path):
    with pytest.raises(UsageError, match="'callback' is a function, which a run cannot hold"):
        save_call(UserCall({"callback": test_a_callback_cannot_be_stored}), tmp_path / "call")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("images"),
        lambda record: record["arguments"].update(a={"unknown": 1}),
        lambda record: record["arguments"].update(a={"tensor": "missing"}),
        lambda record: record["arguments"].update(a=3),
        lambda record: record["images"].update(x="../../secret.png"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path, change):
    save_call(UserCall({"prompt": "a", "image": picture()}), tmp_path / "call")
    path = tmp_path / "call" / "call.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ArtefactError, match=r"call\.json is damaged") as caught:
        load_call(tmp_path / "call")
    assert "\n" not in str(caught.value)
