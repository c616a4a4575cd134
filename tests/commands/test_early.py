"""Wrong paths and settings are refused before torch is imported, with the same messages as later."""

import json
import subprocess
import sys

import pytest

import trtq
from trtq.errors import TrtqError

NOTHING = "there is no model 'nothere': it is not a folder"
REFUSED = {
    "quantize nothere -o OUT": NOTHING,
    "quantize digits -o OUT --bits w9a9": "bits=9 is not supported",
    "quantize digits -o OUT --method foo": "unknown method 'foo'",
    "quantize digits -o OUT --recipe nothere.toml": "cannot read the recipe nothere.toml",
    "quantize digits -o OUT --call nothere.toml": "cannot read the call nothere.toml",
    "quantize digits -o USERS": "exists and is not an artefact of trtq",
    "export nothere -o OUT": NOTHING,
    "export digits -o USERS": "exists and is not an artefact of trtq",
    "build nothere -o OUT": "nothere is not an ONNX folder",
    "generate nothere -o OUT": NOTHING,
    "generate digits": "missing option -o / --output",
    "generate digits -o OUT --call nothere.toml": "cannot read the call nothere.toml",
    "eval nothere --reference digits": NOTHING,
    "eval digits --reference nothere": NOTHING,
    "inspect USERS": "holds no model_index.json",
    "verify nothere": "nothere is no artefact of trtq",
    "verify digits --against nothere": NOTHING,
    "bench nothere": NOTHING,
    "bench digits@nothere": "unknown provider 'nothere'",
    "bench digits --provider nothere": "unknown provider 'nothere'",
    "package triton nothere -o OUT": "nothere is no artefact of trtq",
    "serve nothere": NOTHING,
    "serve digits --beside nothere": NOTHING,
}
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from trtq.cli import app
answers = []
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, line.split())
    answers.append([result.exit_code, result.output, "torch" in sys.modules])
    assert not any(name in sys.modules for name in ("torch", "diffusers", "onnxruntime")), line
print(json.dumps(answers))
"""


def test_refusals_load_no_torch_and_write_nothing(tmp_path):
    users = tmp_path / "users"
    users.mkdir()
    (users / "note.txt").write_text("mine")
    lines = [
        line.replace("OUT", str(tmp_path / "out")).replace("USERS", str(users)) for line in REFUSED
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for (line, message), (code, output, _) in zip(REFUSED.items(), answers, strict=True):
        assert code in (1, 2), (line, output)
        assert message in " ".join(output.split()), (line, output)
        assert "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["users"]
    assert [path.name for path in users.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("quantize", ("nothere", "minmax", "OUT")),
        ("export", ("nothere", "OUT")),
        ("build", ("nothere", "OUT")),
        ("verify", ("nothere",)),
        ("inspect", ("nothere",)),
    ],
)
def test_the_functions_refuse_with_the_same_messages(function, arguments, tmp_path):
    given = [str(tmp_path / "out") if each == "OUT" else each for each in arguments]
    with pytest.raises(TrtqError) as caught:
        getattr(trtq, function)(*given)
    expected = (
        next(text for line, text in REFUSED.items() if line.startswith(f"{function} nothere"))
        if function != "inspect"
        else NOTHING
    )
    assert expected in str(caught.value)
