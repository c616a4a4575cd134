"""Calibration inside the user's calls covers every step of every call."""

from tests.families.pipelines import build
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize


def test_calls_with_different_numbers_of_steps_are_calibrated_to_their_ends(tmp_path):
    recipe = {
        "method": "minmax",
        "bits": "w8a8",
        "calibration": {"images": 2, "samples_per_step": 16},
    }
    calls = [{"prompt": "a", "num_inference_steps": steps} for steps in (1, 3)]
    result = quantize(build("sd_1"), recipe, tmp_path / "run", calls=calls)
    assert result.layers_float == 0
    # One step visits timestep 1, three steps visit 1, 334 and 667.
    assert open_run(tmp_path / "run").table.timesteps.tolist() == [1, 334, 667]
