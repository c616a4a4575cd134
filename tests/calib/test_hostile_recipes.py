"""Users' recipes, policies and prompts are read or refused with a one-line message."""

import os

import pytest

from trtq.calib.policy import load_policy
from trtq.calib.recipe import load_recipe
from trtq.diffusion.prompts import load_prompts, read_lines
from trtq.errors import ArtefactError, RecipeError, UsageError

TEXTS = {
    "deep lists": "a=" + "[" * 5000 + "]" * 5000,
    "deep tables": "a=" + "{a=" * 5000 + "1" + "}" * 5000,
    "deep keys": ".".join(["a"] * 5000) + "=1",
    "quoted keys": ".".join(['"a"'] * 5000) + "=1",
    "deep header": "[" + ".".join(["a"] * 200) + "]",
    "levels": ".".join(["a"] * 30) + "=1",
    "digits": "seed=" + "9" * 10_000,
    "hexadecimal": "seed=0x" + "f" * 10_000,
    "int64": "seed=9223372036854775808",
    "nul in a path": 'policy="a\\u0000b"',
    "nul in prompts": 'prompts="a\\u0000b"',
    "nul": "seed=1\0",
    "twice": "seed=1\nseed=2",
    "no value": "seed=",
    "date": "seed=2026-11-29",
    "text": 'seed="1"',
    "truth": "seed=true",
    "real": "seed=1.0",
    "negative": "seed=-1",
    "steps": "steps=1000000000",
    "steps text": 'steps="4"',
    "guidance nan": "guidance=nan",
    "guidance inf": "guidance=inf",
    "guidance": "guidance=1e300",
    "guidance text": 'guidance="3"',
    "bits": 'bits="w4a99999999999999999999"',
    "bits number": "bits=4",
    "bits list": "bits=[4]",
    "method number": "method=7",
    "method list": 'method=["search"]',
    "method table": "method={}",
    "size number": "size=7",
    "size": 'size="99999x99999"',
    "budget": 'budget="size=nanx"',
    "images": "calibration.images=1000000000",
    "batch": "calibration.batch=1000000000",
    "section": "calibration=5",
    "sections": "[[calibration]]\nimages=8",
    "iterations": "training.iterations=1000000000000",
    "rank": "training.rank=1000000000",
    "travel": "training.lora_travel=inf",
    "rate": "training.activation_lr=nan",
    "accumulate": "training.accumulate=1000000000000",
    "probability": "attention.probability_bits=true",
    "adaround": 'method="quest"\nquest.adaround=1000000000000',
    "unknown": "surprise=1",
    "unknown many": "\n".join(f"k{i}=1" for i in range(5000)),
    "long key": "k" * 200_000 + "=1",
    "large": "#" * 1_000_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_an_invalid_recipe_is_refused(text, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500


def sparse(path):
    path.touch()
    os.truncate(path, 10 << 30)


PLACES = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "huge": sparse,
    "latin-1": lambda path: path.write_bytes(b'bits = "\xe9"'),
    "utf-16": lambda path: path.write_bytes("seed = 1".encode("utf-16")),
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES.keys())
def test_a_path_that_is_not_a_text_file_is_refused_by_name(make, tmp_path):
    path = tmp_path / "a.toml"
    make(path)
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*a\.toml"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"cannot read the policy .*a\.toml"):
        load_policy("UNet2DModel", path)
    with pytest.raises(UsageError, match=r"cannot read the prompts .*a\.toml"):
        read_lines(path)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('bits = "w8a8"', encoding="utf-8-sig")
    assert load_recipe(path).bits == "w8a8"
    path.write_text("a red circle\r\n\r\n", encoding="utf-8-sig")
    assert read_lines(path) == ("a red circle",)


@pytest.mark.parametrize(
    "rule",
    [
        'layers = ["*"]\nbits = "w99a4"\nreason = "x"',
        'layers = ["*"]\nbits = "many"\nreason = "x"',
        'layers = ["*"]\nbits = 4\nreason = "x"',
        'layers = "*"\nbits = "float"\nreason = "x"',
        'layers = [1]\nbits = "float"\nreason = "x"',
        'layers = ["' + "*a" * 5000 + '"]\nbits = "float"\nreason = "x"',
        'layers = ["*"]\nbits = "float"\nreason = "a\\u0000b"',
        'layers = ["*"]\nbits = "float"\nreason = "' + "x" * 5000 + '"',
        'layers = ["*"]\nbits = "float"\nreason = "x"\nadapters = "maybe"',
    ],
)
def test_an_invalid_rule_is_refused(rule, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(f'family = "UNet2DModel"\n[[rule]]\n{rule}\n')
    with pytest.raises(RecipeError) as caught:
        load_policy("UNet2DModel", path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            "null",
            "{}",
            '{"calibration": []}',
            '{"calibration": "a"}',
            '{"calibration": [1]}',
        ),
        *('{"calibration": ["a"], "guidance": NaN}', '{"calibration": ["a"], "guidance": "3"}'),
        *('{"calibration": ["a"], "guidance": 1e300}', '{"calibration": ["a\\u0000b"]}'),
        *(
            '{"calibration": ["a"], "evaluation": [{"prompt": "a", "labels": {"x": -1}}]}',
            "[" * 100_000,
        ),
        '{"calibration": ["' + "a" * 40_000 + '"]}',
    ],
)
def test_invalid_prompts_of_a_model_are_refused(text, tmp_path):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"prompts\.json") as caught:
        load_prompts(tmp_path)
    assert "\n" not in str(caught.value)


def test_invalid_lines_of_prompts_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    for text, message in (
        ("\n \n", "holds no prompts"),
        ("a\nb\0c", "prompt 2 .* NUL"),
        ("a" * 40_000, "prompt 1 .* 40000 characters; at most 32768"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_lines(path)
