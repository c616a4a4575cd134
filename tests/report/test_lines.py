"""Readable lines have labels and units, and no JSON keys or Python literals."""

import re

import pytest

from trtq.report import lines


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (743_744, "744 kB"),
        (999_600, "1 MB"),
        (4_815_492, "4.82 MB"),
        (123_456_789, "123 MB"),
        (12e9, "12 GB"),
        (5e18, "5000 PB"),
    ],
)
def test_sizes_have_a_unit(count, text):
    assert lines.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.068, "0.068 s"),
        (9.4, "9.4 s"),
        (10.42, "10.4 s"),
        (75, "1 min 15 s"),
        (119.7, "2 min 00 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_have_a_unit(seconds, text):
    assert lines.seconds_text(seconds) == text


QUANTIZED = {
    "layers_quantized": 51,
    "layers_float": 2,
    "bytes_before": 4_000_000,
    "bytes_after": 600_000,
    "fine_tune_seconds": 61.0,
    "fine_tune_iterations": 350,
    "seconds": 75.0,
    "peak_rss_bytes": 5e8,
}
EXPORTED = {
    "parity_db": [50.0],
    "parity_db_min": 200.0,
    "parity_db_pooled_min": 57.11,
    "parity_ties": 0.00625,
    "parity_parts_db": {"vae_decoder": 61.0},
    "bytes": 1_228_113,
    "seconds": 26.0,
    "peak_rss_bytes": 7e8,
}


def test_quantize_rows_have_units_and_percentages():
    rows = dict(lines.quantize_rows(QUANTIZED))
    assert rows == {
        "layers": "51 low-bit, 2 in float",
        "denoiser": "4 MB -> 600 kB (15.0%)",
        "fine-tuning": "350 iterations in 1 min 01 s",
        "time": "1 min 15 s",
        "peak memory": "500 MB",
    }


def test_parity_is_exact_or_in_decibels():
    rows = lines.export_rows(EXPORTED)
    assert rows[0] == ("parity with torch", "exact at the worst step")
    assert ("parity of vae_decoder", "61.0 dB") in rows
    assert ("images at rounding ties", "0.62%") in rows


@pytest.mark.parametrize(
    "rows",
    [
        lines.quantize_rows(QUANTIZED | {"new_key": {"a": [1, None], "b": True}}),
        lines.export_rows(EXPORTED | {"another_key": []}),
        lines.inspect_rows(
            {
                "kind": "onnx",
                "source": "run",
                "bytes": 5,
                "precisions": {"w8a8": 2},
                "timesteps": [float(t) for t in range(20)],
                "options": {"batch": [1, 8], "size": "8x16", "precision": None},
                "layers": [],
            }
        ),
    ],
    ids=["quantize", "export", "inspect"],
)
def test_no_key_and_no_python_literal_is_shown(rows):
    text = "\n".join(f"{label}: {value}" for label, value in rows)
    assert not re.search(
        r"[a-z]_[a-z]+:|[{}\[\]']|None|True|False", text.replace("vae_decoder", "")
    )


def test_an_image_size_is_shown_with_its_order():
    result = {"kind": "onnx", "source": "run", "options": {"size": "8x16", "batch": [1, 8]}}
    rows = dict(lines.inspect_rows(result))
    assert rows["size"] == "8x16 (HEIGHTxWIDTH in pixels)"
    assert rows["batch"] == "1 to 8 images"
