"""README, documentation and examples: their blocks run, their links lead somewhere, nothing is missing.

A block below the line `<!-- run -->` is executed. The blocks of a page run in order and share a folder.
Blocks of `sh` hold one command of trtq per line. Everything runs on the digits model, with fewer steps,
iterations and images than documented.
"""

import importlib.util
import inspect
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import trtq
import trtq.errors
import trtq.quant
from tests.families import pipelines
from tests.lora.merged_by_diffusers import matrices, write
from trtq.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^<!-- run -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAKES_ITS_ARTEFACTS = ("README.md",)
SHORTER = {
    "quantize": ["--steps", "4"],
    "generate": ["--images", "2"],
    "eval": ["--images", "20"],
}
"""Options that make a documented command short; the last value of an option counts."""
SHORTER_PYTHON = {'"bits": "w4a8"}': '"bits": "w4a8", "steps": 4, "calibration": {"images": 16}}'}
POST_TRAINING = ("minmax", "search")


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def run_command(line):
    words = shlex.split(line, comments=True)
    assert words[0] == "trtq", f"a block that runs holds commands of trtq, got {line!r}"
    arguments = words[1:] + SHORTER.get(words[1], [])
    if words[1] == "quantize" and not set(POST_TRAINING) & set(words):
        arguments += ["--iterations", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.stderr}"


def run_python(code):
    for documented, short in SHORTER_PYTHON.items():
        code = code.replace(documented, short)
    exec(compile(code, "documentation", "exec"), {"__name__": "__main__"})


LONG = ("modelopt.md", "scales.md", "trtexec.md", "verify.md")
"""Pages whose blocks take 20 s or more; their commands are also tested by themselves."""


def pages_with_blocks():
    for page in PAGES:
        if blocks(page):
            marks = [pytest.mark.slow] if page.name in LONG else []
            yield pytest.param(page, marks=marks, id=name_of(page))


@pytest.mark.parametrize("page", list(pages_with_blocks()))
def test_blocks_run(page, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.name not in MAKES_ITS_ARTEFACTS:
        for kind in ("run", "onnx"):
            shutil.copytree(request.getfixturevalue(f"digits_{kind}"), tmp_path / kind)
    for language, text in blocks(page):
        if language == "python":
            run_python(text)
        else:
            assert language == "sh"
            for line in filter(str.strip, text.splitlines()):
                run_command(line)


def test_every_mark_stands_above_a_block():
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("<!-- run -->") == len(blocks(page)), page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = link.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), f"{name_of(page)} links to {link}"


def test_tables_show_the_result_files():
    command = [sys.executable, str(ROOT / "benchmarks" / "fill_results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"run benchmarks/fill_results.py: {done.stdout}{done.stderr}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


def test_every_room_is_explained():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "trtq").glob("*/__init__.py")}
    assert not {room for room in rooms if f"trtq.{room} " not in text}


def test_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = set(re.findall(r"[a-z_]+/[a-z_/]+\.(?:py|cu)\b", text))
    assert len(names) > 10
    assert not {n for n in names if not any((ROOT / top / n).is_file() for top in ("", "trtq"))}


def referenced():
    """Names after `:::` in the pages of the reference."""
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/reference").glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_every_public_name_is_in_the_reference():
    names = referenced()
    assert {"trtq.errors", "trtq.quant"} <= names
    shown = set(trtq.errors.__all__) | {"__version__", "errors", "quant"}
    assert not {name for name in trtq.__all__ if name not in shown and f"trtq.{name}" not in names}


@pytest.mark.parametrize("module", [trtq, trtq.quant, trtq.errors], ids=lambda m: m.__name__)
def test_every_public_function_and_class_has_a_docstring(module):
    values = {name: getattr(module, name) for name in module.__all__}
    things = {n: v for n, v in values.items() if inspect.isclass(v) or inspect.isfunction(v)}
    assert things
    assert not {name for name, value in things.items() if not value.__doc__}


def test_every_command_is_in_the_reference():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert hooks.MARKER in page
    text = hooks.on_page_markdown(page, page=None)
    commands = typer.main.get_command(app).commands
    assert {"quantize", "export", "bench", "serve"} <= set(commands)
    for name, command in commands.items():
        assert f"## trtq {name}\n" in text
        for child in getattr(command, "commands", {}).values():
            assert child.hidden or f"## trtq {name} {child.name}\n" in text
    assert "--output" in text
    assert "--batch-sizes" in text.partition("## trtq bench\n")[2].partition("\n## ")[0]


def options_of(words):
    """Options of the command that the first words name; the names of all commands are checked."""
    node = typer.main.get_command(app)
    for word in words:
        children = getattr(node, "commands", {})
        if word not in children:
            break
        node = children[word]
    else:
        word = ""
    assert node.name != "trtq" or word.startswith("-"), f"{word!r} is not a command"
    names = {
        name for parameter in node.params for name in parameter.opts + parameter.secondary_opts
    }
    for child in getattr(node, "commands", {}).values():
        names |= {name for parameter in child.params for name in parameter.opts}
    return names | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_documented_commands_and_options_exist(page):
    fences = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    for line in "".join(fences).splitlines():
        for part in line.partition("  #")[0].split("&&"):
            words = shlex.split(part, comments=True)
            if words[:1] != ["trtq"]:
                continue
            known = options_of(words[1:])
            options = {word.partition("=")[0] for word in words if word.startswith("-")}
            assert options <= known, f"{line}: {sorted(options - known)}"


def test_every_field_of_a_request_is_documented():
    from trtq.serve.http.schema import ImageRequest

    text = (ROOT / "docs" / "serving" / "api.md").read_text(encoding="utf-8")
    assert not {name for name in ImageRequest.model_fields if f"`{name}`" not in text}


def test_every_extra_is_documented():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    extras = set(project["optional-dependencies"]) - {"dev", "docs"}
    assert not {name for name in extras if f"`{name}`" not in text}


def run_example(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_explains_itself(example, monkeypatch, capsys):
    assert run_example(monkeypatch, example.name, "--help") == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.slow
def test_the_digits_example_runs(tmp_path, monkeypatch, capsys):
    short = ("--iterations", 2, "--steps", 4, "--images", 20)
    assert run_example(monkeypatch, "digits.py", "-o", tmp_path / "digits", *short) == 0
    assert "class accuracy" in capsys.readouterr().out
    assert (tmp_path / "digits" / "digits.png").is_file()


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """Folder of a tiny, untrained StableDiffusionPipeline."""
    folder = tmp_path_factory.mktemp("sd") / "model"
    pipelines.sd_1().save_pretrained(folder)
    return folder


SMALL = ("--steps", "2", "--calibration-images", "2")


@pytest.mark.slow
def test_the_stable_diffusion_example_runs(stable_diffusion, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code = run_example(
        monkeypatch,
        "stable_diffusion.py",
        stable_diffusion,
        "-o",
        out,
        "--prompt",
        "a red circle",
        *SMALL,
    )
    assert code == 0
    assert (out / "image.png").is_file()


def test_the_lora_example_runs(stable_diffusion, tmp_path, monkeypatch):
    import torch

    model = pipelines.sd_1().unet
    generator = torch.Generator().manual_seed(0)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    files = []
    for name in ("first", "second"):
        down, up = matrices(model.get_submodule(path), 2, generator)
        key = "lora_unet_" + path.replace(".", "_")
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        (tmp_path / name).mkdir()
        write(tmp_path / name, tensors)
        files.append(next((tmp_path / name).glob("*.safetensors")))
    out = tmp_path / "out"
    assert (
        run_example(monkeypatch, "swap_lora.py", stable_diffusion, *files, "-o", out, *SMALL) == 0
    )
    assert (out / "first.png").read_bytes() != (out / "second.png").read_bytes()


def test_the_client_example_runs(digits_onnx, tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "trtq.cli", "serve", str(digits_onnx), "--port", "0", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            url = re.search(r'"url": "([^"]+)"', server.stdout.readline())[1]
            seven = ("--url", url, "--prompt", "7", "-o", tmp_path / "seven.png")
            assert run_example(monkeypatch, "serve_client.py", *seven) == 0
            assert (tmp_path / "seven.png").read_bytes().startswith(b"\x89PNG")
            assert run_example(monkeypatch, "serve_client.py", *seven, "--steps", "0") == 1
            assert "steps" in capsys.readouterr().err
        finally:
            server.terminate()
            server.wait(30)
