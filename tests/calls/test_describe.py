"""What a pipeline's call takes, and the refusal of arguments that it does not take."""

import pytest
import torch
from PIL import Image

from trtq.calls.describe import argument_text, describe_call
from trtq.calls.user_call import UserCall
from trtq.errors import UsageError


class Pipeline:
    def __call__(
        self,
        prompt: str | list[str],
        image=None,
        strength: float = 0.5,
        num_inference_steps: int | None = 50,
        name: str | None = None,
        generator=None,
        return_dict: bool = True,
    ):
        """Call it.

        Args:
            prompt (`str` or `list[str]`):
                The text. It can be long.
            image (`PIL.Image`, *optional*): The picture.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Steps; a
                longer sentence.

        Returns:
            image: something else.
        """


def test_the_description_has_types_defaults_and_first_sentences():
    rows = {row.name: row for row in describe_call(Pipeline).arguments}
    assert list(rows) == ["prompt", "image", "strength", "num_inference_steps", "name"]
    assert (rows["prompt"].required, rows["prompt"].default) == (True, None)
    assert rows["prompt"].type == "str | list[str]"
    assert rows["prompt"].text == "The text."
    assert rows["image"].text == "The picture."
    assert rows["num_inference_steps"].text == "Steps; a longer sentence."
    assert (rows["strength"].default, rows["strength"].text) == ("0.5", "")


def test_the_values_of_the_recorded_call_are_shown_by_size():
    call = UserCall({"prompt": "a cat", "image": Image.new("RGB", (6, 4))})
    description = describe_call(Pipeline, call)
    values = {row.name: row.value for row in description.arguments}
    assert values["prompt"] == "'a cat'"
    assert values["image"] == "picture 6x4 (WIDTHxHEIGHT)"
    assert values["strength"] is None
    assert description.recorded
    assert argument_text([torch.zeros(2, 3)]) == "list of 1: float32[2, 3]"


def test_an_unknown_argument_names_the_nearest_one():
    with pytest.raises(UsageError, match=r"no argument 'strenght' \(did you mean 'strength'\?\)"):
        UserCall({"prompt": "a", "strenght": 1}).check(Pipeline())


@pytest.mark.parametrize(
    ("name", "value", "required"),
    [
        ("num_inference_steps", "four", "int, got 'four'"),
        ("strength", [0.5], "float, got a list"),
        ("name", 3, "str, got 3"),
        ("strength", torch.zeros(1), "float, got a Tensor"),
    ],
)
def test_a_number_or_text_of_another_type_is_refused(name, value, required):
    with pytest.raises(UsageError, match=f"{name!r} must be {required}"):
        UserCall({"prompt": "a", name: value}).check(Pipeline())


def test_numbers_are_accepted_for_either_kind_of_number():
    arguments = {"prompt": ["a"], "strength": 1, "num_inference_steps": 4.0, "name": None}
    UserCall({**arguments, "image": torch.zeros(1)}).check(Pipeline())
