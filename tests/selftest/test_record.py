"""The file of `trtq selftest`: whole or not at all, and refused if anything in it was changed."""

from __future__ import annotations

import json

import pytest

from tests.selftest.samples import sample
from trtq.errors import ArtefactError
from trtq.selftest import record as records
from trtq.selftest.record import MAX_FILE_BYTES, TrialRow, read_selftest, write_selftest


@pytest.fixture
def path(tmp_path):
    write_selftest(tmp_path / "selftest.json", sample())
    return tmp_path / "selftest.json"


def test_a_file_is_read_as_it_was_written(path):
    assert read_selftest(path) == sample()
    assert json.loads(path.read_text())["schema"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"both": 20.0', '"both": 19.0'),
        ('"ok": true', '"ok": null'),
        ('"complete": true', '"complete": false'),
        ('"trtq": "0.1.0"', '"trtq": "0.2.0"'),
        ('"registers": 64', '"registers": 65'),
    ],
)
def test_a_changed_value_is_refused(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ArtefactError, match="was changed after it was written"):
        read_selftest(path)


def with_hash(content):
    content = {key: value for key, value in content.items() if key != "sha256"}
    return json.dumps(content | {"sha256": records._digest(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2, this trtq reads 1; read it with the trtq that wrote it"),
        ({"schema": None}, "has schema None"),
        ({"kind": "another"}, "is not a file of trtq selftest"),
        ({"extra": 1}, "extra: unknown key"),
        ({"rows": [{}]}, r"rows\.0\.model: Field required"),
        ({"gpus": "none"}, "gpus: Input should be a valid list"),
    ],
)
def test_another_schema_or_kind_is_refused_also_with_the_right_hash(path, change, message):
    path.write_text(with_hash(json.loads(path.read_text()) | change))
    with pytest.raises(ArtefactError, match=message) as caught:
        read_selftest(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_hash_is_refused(path):
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="was changed"):
        read_selftest(path)


def test_many_long_errors_do_not_make_a_large_file(tmp_path):
    checks = [
        TrialRow(
            stage=2,
            name=f"{'n' * 100}{index:03}",
            ok=False,
            seconds=0.1,
            error="e" * 400,
            detail={"text": "d" * 100},
        )
        for index in range(400)
    ]
    path = tmp_path / "selftest.json"
    write_selftest(path, sample(checks=checks))
    assert path.stat().st_size < MAX_FILE_BYTES
    again = read_selftest(path)
    assert [row.name for row in again.failed] == [row.name for row in checks]
    assert {row.error for row in again.failed} == {"e" * 60}


def test_a_failed_write_leaves_the_file_before(path, monkeypatch):
    def full(handle, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fdopen", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        write_selftest(path, sample(complete=False))
    assert read_selftest(path) == sample()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
