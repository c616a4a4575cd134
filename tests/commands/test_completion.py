"""Shell completion: `trtq --install-completion`, and the completions of an incomplete line."""

import os
import subprocess
import sys
from typing import get_args

import pytest
from typer.testing import CliRunner

from trtq.cli import app


def complete(line, shell="bash"):
    """The completions at the end of a line."""
    words = line.split(" ")
    env = {
        "_TRTQ_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
    }
    result = CliRunner().invoke(app, [], prog_name="trtq", env=env)
    assert result.exit_code == 0, result.output
    return result.output


LINES = {
    "verbs in the order of the path": (
        "trtq ",
        [
            *("doctor", "quantize", "export", "build", "generate", "eval", "bench", "inspect"),
            *("verify", "serve", "package", "plugins", "demo", "selftest"),
        ],
    ),
    "a verb": ("trtq qu", ["quantize"]),
    "a verb of a group": ("trtq package ", ["triton"]),
    "only the new name of an option": ("trtq export --b", ["--batch-range"]),
    "options of bench": ("trtq bench --ba", ["--batch-sizes", "--baseline"]),
    "values": ("trtq eval --provider t", ["tensorrt-rtx", "tensorrt", "torch"]),
    "files, which the shell itself offers": ("trtq inspect ", []),
}


@pytest.mark.parametrize(("line", "words"), LINES.values(), ids=LINES.keys())
def test_bash_gets_the_completions(line, words):
    assert complete(line).split() == words


def test_zsh_gets_the_commands_with_their_help():
    assert '"verify":"Check an artefact' in complete("trtq ver", "zsh")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_gets_its_script(shell):
    env = {"_TRTQ_COMPLETE": f"source_{shell}"}
    script = CliRunner().invoke(app, [], prog_name="trtq", env=env).output
    assert "_trtq_completion()" in script
    assert f"_TRTQ_COMPLETE=complete_{shell}" in script


def test_the_help_names_the_options_of_completion():
    text = CliRunner().invoke(app, ["--help"]).output
    assert "--install-completion" in text
    assert "--show-completion" in text
    # Subcommands do not have these options.
    assert "completion" not in CliRunner().invoke(app, ["package", "--help"]).output


def test_completed_values_are_those_of_the_library():
    from trtq.calib.recipe import Recipe, methods
    from trtq.commands.options import PROVIDERS
    from trtq.engine.ort import PROVIDERS as ORT_PROVIDERS
    from trtq.engine.tensorrt.backends import BACKENDS
    from trtq.graph.runtimes.prepare import RUNTIMES

    assert sorted(complete("trtq quantize digits --method ").split()) == sorted(methods())
    tables = get_args(Recipe.model_fields["tables"].annotation)
    assert complete("trtq quantize digits --tables ").split() == list(tables)
    assert set(PROVIDERS) == {*ORT_PROVIDERS, *BACKENDS, "torch"}
    assert complete("trtq build onnx --backend ").split() == list(BACKENDS)
    assert complete("trtq verify onnx --runtime ").split() == list(RUNTIMES)


@pytest.mark.parametrize("instruction", ["complete_bash", "complete_evil", "evil", "source_"])
def test_a_damaged_completion_request_prints_no_traceback(instruction):
    code = "import sys; sys.argv[0] = 'trtq'; from trtq.cli import app; app()"
    env = os.environ | {"_TRTQ_COMPLETE": instruction}
    env.pop("COMP_WORDS", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
