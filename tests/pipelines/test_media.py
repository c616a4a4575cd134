"""Results of pipelines as pictures, videos and sounds, and their files."""

import sys
import types
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from trtq.errors import ArtefactError, MissingDependencyError, NonFiniteError
from trtq.pipelines.media import Sound, frame_rate, media_of
from trtq.pipelines.media_files import save_sound, save_video


class Output:
    def __init__(self, **values):
        self.__dict__.update(values)


PIPELINE = types.SimpleNamespace(vae=types.SimpleNamespace(config=Output(sampling_rate=8000)))
GRID = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 255


def pil(tensor):
    array = (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array)


IMAGES = {
    "tensor": GRID,
    "array": GRID.permute(0, 2, 3, 1).numpy(),
    "bytes": (GRID.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy(),
    "pictures": [pil(image) for image in GRID],
    "lists of pictures": [[pil(image)] for image in GRID],
    "list of tensors": list(GRID),
    "list of arrays": list(GRID.permute(0, 2, 3, 1).numpy()),
}


@pytest.mark.parametrize("form", IMAGES)
def test_images_of_every_form_are_the_same_pictures(form):
    media = media_of(Output(images=IMAGES[form], nsfw_content_detected=None), PIPELINE)
    assert (media.kind, len(media)) == ("image", 2)
    assert torch.allclose(torch.stack(media.pictures), GRID, atol=1e-7)


VIDEOS = {
    "tensor": GRID[None],
    "channels first": GRID[None].transpose(1, 2),
    "array": GRID[None].permute(0, 1, 3, 4, 2).numpy(),
    "pictures": [[pil(image) for image in GRID]],
    "one list of pictures": [pil(image) for image in GRID],
    "list of tensors": [GRID],
    "list of arrays": [GRID.permute(0, 2, 3, 1).numpy()],
}


@pytest.mark.parametrize("form", VIDEOS)
def test_frames_of_every_form_are_the_same_video(form):
    media = media_of(Output(frames=VIDEOS[form]), PIPELINE)
    assert (media.kind, len(media)) == ("video", 1)
    assert torch.allclose(media.pictures[0], GRID, atol=1e-7)


def test_a_depth_is_a_grey_picture_scaled_to_its_range():
    depth = np.array([[[[2.0], [4.0]], [[6.0], [10.0]]]])
    media = media_of(Output(prediction=depth), PIPELINE)
    assert media.pictures[0].tolist() == [[[0.0, 0.25], [0.5, 1.0]]]
    grey = media_of(Output(prediction=np.full((1, 2, 2, 1), 0.5)), PIPELINE)
    assert grey.pictures[0].tolist() == [[[0.5, 0.5], [0.5, 0.5]]]


def test_normals_of_minus_one_to_one_are_shifted():
    media = media_of(
        Output(prediction=torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)), PIPELINE
    )
    assert media.pictures[0].flatten().tolist() == [0.0, 0.5, 1.0]


def test_sounds_have_the_rate_of_the_model():
    media = media_of(Output(audios=torch.tensor([[[0.0, 0.5], [1.0, 2.0]]])), PIPELINE)
    assert (media.kind, media.sounds[0].rate) == ("audio", 8000)
    assert media.sounds[0].samples.tolist() == [[0.0, 0.5], [1.0, 1.0]]
    mono = media_of(Output(audios=np.zeros((3, 7))), PIPELINE)
    assert [tuple(sound.samples.shape) for sound in mono.sounds] == [(1, 7)] * 3


def test_an_unknown_rate_is_reported(caplog):
    media = media_of(Output(audios=np.zeros((1, 7))), types.SimpleNamespace())
    assert media.sounds[0].rate == 44_100
    assert "gives no sampling rate" in caplog.text


def test_a_video_may_have_sound():
    media = media_of(Output(frames=GRID[None], audio=torch.zeros(1, 2, 9)), PIPELINE)
    assert (media.kind, len(media), len(media.sounds)) == ("video", 1, 1)


def test_another_result_names_its_fields():
    with pytest.raises(ArtefactError, match="returns Output with image_embeds, texts, which is no"):
        media_of(Output(image_embeds=GRID, texts=["a"], images=None), PIPELINE)


def test_latents_are_not_taken_for_pictures():
    with pytest.raises(ArtefactError, match=r"\[16, 4, 5\], which are latents"):
        media_of(Output(images=torch.zeros(1, 16, 4, 5)), PIPELINE)


@pytest.mark.parametrize("field", ["images", "audios"])
def test_nan_is_refused(field):
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        media_of(
            Output(**{field: torch.full((1, 3, 4, 5)[: 4 if field == "images" else 3], torch.nan)}),
            PIPELINE,
        )


def test_a_gif_holds_every_frame_in_order(tmp_path):
    frames = torch.stack([torch.full((3, 4, 4), index / 4) for index in range(4)])
    save_video(frames, tmp_path / "a.gif", 10.0, "a comment")
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (4, 100)
        assert gif.info["comment"] == b"a comment"
        for index in range(4):
            gif.seek(index)
            assert gif.convert("RGB").getpixel((0, 0)) == (round(index / 4 * 255),) * 3


def test_mp4_names_the_extra_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trtq\[video\]'"):
        save_video(GRID, tmp_path / "a.mp4", 10.0)
    assert list(tmp_path.iterdir()) == []


def test_mp4_is_written_by_imageio(tmp_path, monkeypatch):
    def mimwrite(path, pictures, **options):
        path.write_bytes(bytes([len(pictures)]))
        assert (options["format"], options["fps"]) == ("FFMPEG", 10.0)
        assert options["output_params"] == ["-f", "mp4"]

    monkeypatch.setitem(sys.modules, "imageio", types.SimpleNamespace(mimwrite=mimwrite))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", types.SimpleNamespace())
    save_video(GRID, tmp_path / "a.mp4", 10.0)
    assert (tmp_path / "a.mp4").read_bytes() == bytes([2])


def test_a_wav_file_holds_the_samples_in_16_bits(tmp_path):
    save_sound(Sound(torch.tensor([[0.0, 1.0], [-1.0, 0.5]]), 8000), tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 8000)
        samples = np.frombuffer(file.readframes(2), "<i2").reshape(-1, 2).T
    assert samples.tolist() == [[0, 32767], [-32767, 16384]]


def test_the_frame_rate_comes_from_the_call():
    assert frame_rate({"fps": 7}) == 7.0
    assert frame_rate({"frame_rate": 24.0}) == 24.0
    assert frame_rate({"fps": None}) == 16.0
