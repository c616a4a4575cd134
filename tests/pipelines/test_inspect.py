"""`trtq inspect`: the JSON of artefacts that this version and earlier versions made."""

from __future__ import annotations

import json
import shutil

import pytest

from trtq.pipelines.inspect import inspect


@pytest.mark.parametrize("key", ["split_step", "split_scale"])
def test_a_recipe_has_the_former_and_the_new_key(digits_run, tmp_path, key):
    run = shutil.copytree(digits_run, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["training"] = {"iterations": 1, key: True}
    (run / "manifest.json").write_text(json.dumps(manifest))
    training = inspect(run).to_json()["recipe"]["training"]
    assert training == {"iterations": 1, "split_step": True, "split_scale": True}


def test_a_recipe_without_fine_tuning_has_no_keys_of_it(digits_run):
    assert inspect(digits_run).recipe["training"] is None
