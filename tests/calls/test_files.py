"""Arguments of a call from files: pictures, frames, sound, tensors, numbers and texts."""

import wave

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trtq.calls.files import read_call, read_input, read_inputs
from trtq.errors import UsageError


def picture(path, size=(6, 4), colour=(250, 10, 20), mode="RGB", **options):
    Image.new(mode, size, colour).save(path, **options)
    return path


def call_file(folder, text):
    path = folder / "call.toml"
    path.write_text(text)
    return path


def test_numbers_texts_lists_and_tables_stand_for_themselves(tmp_path):
    text = 'prompt = ["a", "b"]\nstrength = 0.5\nnum_frames = 3\nclean = true\n[attention]\nscale = 2\n'
    assert dict(read_call(call_file(tmp_path, text)).arguments) == {
        "prompt": ["a", "b"],
        "strength": 0.5,
        "num_frames": 3,
        "clean": True,
        "attention": {"scale": 2},
    }


def test_files_are_relative_to_the_toml_file_and_lists_keep_their_order(tmp_path):
    for index in range(3):
        picture(tmp_path / f"{index}.png", size=(index + 1, 1))
    text = '[image]\nfile = "2.png"\n[[frames]]\nfile = "1.png"\n[[frames]]\nfile = "0.png"\n'
    arguments = read_call(call_file(tmp_path, text)).arguments
    assert arguments["image"].size == (3, 1)
    assert [frame.size for frame in arguments["frames"]] == [(2, 1), (1, 1)]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_is_rgb_and_turned_as_its_exif_data_say(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned by 90 degrees.
    path = picture(tmp_path / f"a.{suffix}", size=(6, 4), exif=exif)
    name, value = read_input(f"image={path}")
    assert (name, value.mode, value.size) == ("image", "RGB", (4, 6))


def test_a_mask_is_a_grey_picture(tmp_path):
    path = picture(tmp_path / "m.png", colour=(255, 255, 255))
    _, value = read_input(f"mask_image={path}")
    assert value.mode == "L"
    assert value.getextrema() == (255, 255)


@pytest.mark.parametrize("suffix", ["gif", "apng", "png"])
def test_an_animation_is_a_list_of_its_frames(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), (60 * index, 0, 0)) for index in range(3)]
    path = tmp_path / f"a.{suffix}"
    kind = "GIF" if suffix == "gif" else "PNG"
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:])
    _, value = read_input(f"video={path}")
    assert [frame.getpixel((0, 0))[0] for frame in value] == [0, 60, 120]


def test_a_gif_with_one_frame_is_a_list_too(tmp_path):
    picture(tmp_path / "a.gif")
    _, value = read_input(f"video={tmp_path / 'a.gif'}")
    assert [frame.mode for frame in value] == ["RGB"]


def test_the_frames_of_a_folder_are_sorted_by_number(tmp_path):
    for index in (10, 9, 1):
        picture(tmp_path / f"frame-{index}.png", colour=(index, 0, 0))
    (tmp_path / ".hidden").write_text("ignored")
    _, value = read_input(f"video={tmp_path}")
    assert [frame.getpixel((0, 0))[0] for frame in value] == [1, 9, 10]


def sound(path, samples, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(samples.tobytes())
    return path


def test_sounds_of_8_16_and_32_bits_are_the_same_numbers(tmp_path):
    half = {
        1: np.array([[128], [192], [0]], np.uint8),
        2: np.array([[0], [16384], [-32768]], np.int16),
        4: np.array([[0], [1 << 30], [-(1 << 31)]], np.int32),
    }
    for width, samples in half.items():
        _, value = read_input(f"audio={sound(tmp_path / 'a.wav', samples, width)}")
        assert value.dtype == torch.float32
        assert value.tolist() == [0.0, 0.5, -1.0]


def test_a_sound_with_two_channels_has_a_batch_axis(tmp_path):
    samples = np.array([[0, 16384], [16384, 0], [0, 0]], np.int16)
    _, value = read_input(f"audio={sound(tmp_path / 'a.wav', samples)}")
    assert value.tolist() == [[[0.0, 0.5, 0.0], [0.5, 0.0, 0.0]]]


def test_tensors_come_from_npy_and_safetensors(tmp_path):
    expected = torch.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "a.npy", expected.numpy())
    save_file({"x": expected}, tmp_path / "a.safetensors")
    save_file({"x": expected, "y": expected + 1}, tmp_path / "two.safetensors")
    for name in ("a.npy", "a.safetensors"):
        assert torch.equal(read_input(f"latents={tmp_path / name}")[1], expected)
    text = 'latents = { file = "two.safetensors", tensor = "y" }\n'
    value = read_call(call_file(tmp_path, text)).arguments["latents"]
    assert torch.equal(value, expected + 1)
    with pytest.raises(UsageError, match=r"holds 2 tensors.*'x', 'y'"):
        read_input(f"latents={tmp_path / 'two.safetensors'}")


REFUSED_TOML = {
    "no TOML": ("prompt = ", "Invalid value"),
    "a missing file": ('image = { file = "none.png" }', "there is no file .*none.png.* 'image'"),
    "an unknown key": ('image = { file = "a.png", size = 3 }', "unknown key 'size'"),
    "a number as a file": ("image = { file = 3 }", "a value that is no text"),
    "a date": ("prompt = 2020-01-01", "prompt in .* is a date"),
    "infinity": ("strength = inf", "strength in .* is inf; give a finite number"),
    "deep nesting": (f"a = {'[' * 40}{']' * 40}", "cannot read the call"),
    "a tensor of a picture": ('image = { file = "a.png", tensor = "x" }', "no named tensors"),
}


@pytest.mark.parametrize("case", REFUSED_TOML)
def test_a_wrong_call_file_is_refused_in_one_line(tmp_path, case):
    picture(tmp_path / "a.png")
    text, message = REFUSED_TOML[case]
    with pytest.raises(UsageError, match=message) as caught:
        read_call(call_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def damaged(folder):
    path = picture(folder / "a.png", size=(64, 64))
    path.write_bytes(path.read_bytes()[:60])
    return path


def pickled(folder):
    np.save(folder / "a.npy", np.array([{}], dtype=object))
    return folder / "a.npy"


def written(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def empty_folder(folder):
    (folder / "frames").mkdir()
    return folder / "frames"


REFUSED_FILES = {
    "a text named PNG": (written("a.png", b"hello"), "is no picture that Pillow can read"),
    "a cut picture": (damaged, "is damaged"),
    "a text named WAV": (written("a.wav", b"hello"), "is no WAV file"),
    "a text named npy": (written("a.npy", b"hello"), "cannot be read"),
    "objects in npy": (pickled, "cannot be read"),
    "a text named safetensors": (written("a.safetensors", b"hello"), "is no safetensors file"),
    "a film": (written("a.mp4", b"hello"), "unknown kind; give a picture"),
    "an empty folder": (empty_folder, "holds no pictures"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_file_that_is_no_input_is_refused_in_one_line(tmp_path, case):
    make, message = REFUSED_FILES[case]
    with pytest.raises(UsageError, match=message) as caught:
        read_input(f"image={make(tmp_path)}")
    assert "\n" not in str(caught.value)


def test_a_folder_with_other_files_names_them(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"holds 'notes\.txt'"):
        read_input(f"video={tmp_path}")


def test_a_picture_beyond_the_limit_of_pillow_is_refused_before_it_is_decoded(
    tmp_path, monkeypatch
):
    path = picture(tmp_path / "a.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UsageError, match=r"too large.*1600 pixels"):
        read_input(f"image={path}")


@pytest.mark.parametrize("text", ["image", "=a.png", "image=", "my image=a.png", ""])
def test_an_input_has_the_form_name_equals_file(text):
    with pytest.raises(UsageError, match="--input takes NAME=FILE"):
        read_input(text)


@pytest.mark.parametrize("value", ["7", "a cat", "\0", "x" * 5000])
def test_numbers_and_texts_are_sent_to_a_call_file(value):
    with pytest.raises(UsageError, match="numbers and texts belong in a file for --call"):
        read_input(f"seed={value}")


def test_an_argument_is_given_once(tmp_path):
    image = picture(tmp_path / "a.png")
    assert list(read_inputs([f"image={image}"])) == ["image"]
    with pytest.raises(UsageError, match="gives 'image' twice"):
        read_inputs([f"image={image}", f"image={image}"])
