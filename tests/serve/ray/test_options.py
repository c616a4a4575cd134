"""The arguments of `serve run`, and the import path of the application; Ray is not needed."""

import re
import subprocess
import sys

import pytest

from trtq.errors import UsageError
from trtq.serve.ray import app
from trtq.serve.ray.options import parse_arguments

FIRST_ARGUMENTS = ("path", "name", "beside", "provider")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, f"'path': field required; the arguments are {', '.join(FIRST_ARGUMENTS)}"),
        ({"path": "x", "replicas": "2"}, "'replicas': extra inputs"),
        ({"path": "x", "max_replicas": "no"}, "'max_replicas'"),
        ({"path": "x", "min_replicas": "3"}, "min_replicas=3 and max_replicas=2 are no range"),
        ({"path": "x", "steps": "0"}, "'steps': input should be greater than or equal to 1"),
        ({"path": "x", "deadline_s": "-1"}, "'deadline_s': input should be greater than 0"),
        ({"path": "x", "batching": "none"}, "'batching': input should be 'step' or 'request'"),
        ({"path": "x", "batch_sizes": "1,16"}, "from 1 to 8"),
        ({"path": "x", "api_key_file": "nowhere"}, "cannot read the API key"),
        ({"path": "x", "allowed_hosts": "http://a"}, "the host 'http://a' is not understood"),
        ({"path": "x", "allowed_origins": "a"}, "the origin 'a' is not understood"),
        ({"path": "x", "api_key": "secret"}, "'api_key': extra inputs"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_arguments_are_named(given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        app(given)


def test_the_former_name_of_an_argument_is_accepted():
    for name in ("images_per_replica", "target"):
        assert parse_arguments({"path": "x", name: "3"}).images_per_replica == 3.0


def test_the_application_can_be_imported_without_ray():
    code = (
        "import sys; sys.modules['ray'] = None; from trtq.serve.ray import app; print(app.__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "app"
