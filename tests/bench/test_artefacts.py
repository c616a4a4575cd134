"""Rows of a benchmark: parsing, checkpoints and baselines."""

import json
import shutil

import pytest

from trtq.artefact.opened import Checkpoint, open_folder
from trtq.bench.artefacts import (
    BenchRow,
    baseline,
    find_checkpoint,
    parse_batches,
    parse_rows,
)
from trtq.errors import (
    ArtefactError,
    UsageError,
)


def test_parses_paths_and_providers(digits_run, digits_onnx):
    onnx, run_folder = str(digits_onnx), str(digits_run)
    rows = parse_rows([f"{onnx}@openvino", onnx, run_folder, "digits"], ["cpu"])
    assert [(row.path, row.provider) for row in rows] == [
        (onnx, "openvino"),
        (onnx, "cpu"),
        (run_folder, "torch"),
        ("digits", "torch"),
    ]
    assert [row.kind for row in rows] == ["onnx", "onnx", "run", "checkpoint"]
    assert [row.low_bit for row in rows] == [True, True, True, False]
    assert rows[0].denoiser_bytes > rows[2].denoiser_bytes > 1e5


def test_a_provider_of_an_extra_package_is_available_if_installed(
    digits_onnx, tmp_path, monkeypatch
):
    text = f"{digits_onnx}@tensorrt-rtx"
    with pytest.raises(UsageError, match="has no provider 'tensorrt-rtx'"):
        parse_rows([text])
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_rows([text])[0].provider == "tensorrt-rtx"


def test_a_folder_name_may_contain_an_at_sign(digits_run, tmp_path):
    folder = tmp_path / "run@home"
    shutil.copytree(digits_run, folder)
    (parsed,) = parse_rows([str(folder)])
    assert (parsed.path, parsed.provider) == (str(folder), "torch")


@pytest.mark.parametrize(
    ("paths", "providers", "error", "message"),
    [
        (["{onnx}@torch"], [], UsageError, "an ONNX folder, which torch does not support; choose"),
        (["digits@cpu"], [], UsageError, "a float checkpoint, which cpu does not support"),
        (["digits@tpu"], [], UsageError, "unknown provider 'tpu'"),
        (["{onnx}"], ["tpu"], UsageError, "unknown provider 'tpu'"),
        (["{onnx}@cuda"], [], UsageError, "has no provider 'cuda'"),
        (["{onnx}", "{onnx}@cpu"], [], UsageError, "is given twice"),
        (["kernels"], [], UsageError, "is a subcommand; write ./kernels"),
        (["nothing"], [], ArtefactError, "there is no model 'nothing'"),
    ],
)
def test_rejects_rows_that_cannot_be_measured(digits_onnx, paths, providers, error, message):
    with pytest.raises(error, match=message):
        parse_rows([path.format(onnx=digits_onnx) for path in paths], providers)


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"diffusion_pytorch_model.safetensors": 30}, 30),
        (
            {
                "diffusion_pytorch_model.safetensors": 30,
                "diffusion_pytorch_model.fp16.safetensors": 15,
                "diffusion_pytorch_model.non_ema.safetensors": 30,
                "diffusion_pytorch_model.bin": 31,
            },
            30,
        ),
        ({"diffusion_pytorch_model.fp16.safetensors": 15}, None),
        ({"diffusion_pytorch_model.bin": 31}, None),
        (
            {
                "diffusion_pytorch_model.safetensors.index.json": {
                    "weight_map": {"a": "1", "b": "2"}
                },
                "1": 5,
                "2": 7,
                "3": 9,
            },
            12,
        ),
        ({"diffusion_pytorch_model.safetensors.index.json": {"weight_map": {"a": "1"}}}, None),
        ({"diffusion_pytorch_model.safetensors.index.json": []}, None),
        ({}, None),
    ],
)
def test_the_size_of_a_checkpoint_is_that_of_the_loaded_files(tmp_path, files, size):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    for name, content in files.items():
        data = bytes(content) if isinstance(content, int) else json.dumps(content).encode()
        (tmp_path / "unet" / name).write_bytes(data)
    assert BenchRow(str(tmp_path), "torch", Checkpoint(str(tmp_path))).denoiser_bytes == size


@pytest.mark.parametrize("text", ["0", "a", "1,1", "", "1,,2"])
def test_parses_or_rejects_batch_sizes(text):
    assert parse_batches("1,4") == (1, 4)
    with pytest.raises(UsageError, match=r"write e\.g\. 1 or 1,4"):
        parse_batches(text)


def test_finds_the_checkpoint_through_the_run(digits_run, digits_onnx, tmp_path):
    manifest = open_folder(digits_onnx).manifest
    assert find_checkpoint(digits_onnx, manifest) == "digits"
    # A different run with the same name is not used.
    alone = tmp_path / "onnx"
    shutil.copytree(digits_onnx, alone)
    assert find_checkpoint(alone, manifest) is None
    notes = []
    assert baseline(parse_rows([str(alone)]), notes) == []
    assert "was not found (it was made from 'run'); give it as another PATH" in notes[0]


def test_a_changed_checkpoint_is_not_the_baseline(digits_run):
    manifest = open_folder(digits_run).manifest
    files = manifest.source.files | {"model_index.json": "0" * 64}
    source = manifest.source.model_copy(update={"files": files})
    changed = manifest.model_copy(update={"source": source})
    assert find_checkpoint(digits_run, changed) is None


def test_adds_no_baseline_if_a_float_row_is_given(digits_run):
    notes = []
    assert baseline(parse_rows([str(digits_run), "digits"]), notes) == []
    assert notes == []
