"""The wheel holds exactly the files of the repository, under one import name."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

# Python 3.11.3 and older have no filters.
_SAFE = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
ROOT = Path(__file__).resolve().parent.parent
LINKS = {"trtq/plugins": "../plugins", "trtq/calib": "../calib", "trtq/cli.py": "../cli.py"}
HEAVY = {"torch", "tensorrt", "onnxruntime", "onnx", "diffusers", "transformers", "matplotlib"}
NO_INDEX = ["--no-deps", "--no-build-isolation", "--no-index"]


@pytest.mark.parametrize("link", LINKS)
def test_link_is_intact(link):
    assert os.readlink(ROOT / link) == LINKS[link]


@pytest.mark.parametrize("link", LINKS)
def test_a_checkout_whose_links_are_text_files_says_what_to_do(link, tmp_path):
    package = tmp_path / "trtq"
    package.mkdir()
    shutil.copy(ROOT / "trtq" / "__init__.py", package)
    (package / Path(link).name).write_text(LINKS[link])
    command = [
        sys.executable,
        "-P",
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import trtq",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={})
    assert done.returncode == 1
    assert "was a symbolic link" in done.stderr
    assert "core.symlinks=true" in done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A clean copy of the tree, links kept."""
    target = tmp_path_factory.mktemp("source") / "src"
    skip = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "trtq-demo"
    )
    shutil.copytree(ROOT, target, symlinks=True, ignore=skip)
    return target


def build_wheel(source, out):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", *NO_INDEX]
    subprocess.run([*pip, "-w", out, source], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory):
    return build_wheel(copy, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_file_of_the_package(wheel):
    walk = (p for d in ("trtq", "plugins", "calib") for p in (ROOT / d).rglob("*"))
    files = {p.relative_to(ROOT) for p in walk if p.is_file() and "__pycache__" not in p.parts}
    expected = {str(f if f.parts[0] == "trtq" else "trtq" / f) for f in files}
    assert expected - wheel == set()


def test_wheel_holds_the_licence(wheel):
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_wheel_adds_one_top_level_name(wheel):
    assert {n.split("/")[0] for n in wheel if ".dist-info" not in n} == {"trtq"}


def test_wheel_of_the_sdist_has_the_same_content(copy, wheel, tmp_path):
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=copy, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", **_SAFE)
    (source,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "wheel").mkdir()
    assert build_wheel(source, tmp_path / "wheel") == wheel


def test_editable_install_gives_one_name(copy, tmp_path):
    venv.create(tmp_path / "env", with_pip=False, system_site_packages=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    # The packages of this environment, without its editable install of trtq.
    (site / "borrowed.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", *NO_INDEX]
    subprocess.run([*install, "-e", copy], check=True, capture_output=True)
    probe = "import trtq.calib.recipe, trtq.plugins, trtq.cli; print(trtq.__file__)"
    process = subprocess.run(
        [python, "-c", probe], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert Path(process.stdout.strip()).is_relative_to(copy)
    for name in LINKS:
        leaked = subprocess.run(
            [python, "-c", f"import {Path(name).stem}"], cwd=tmp_path, capture_output=True
        )
        assert leaked.returncode != 0


def test_import_stays_light():
    probe = "import sys, trtq, trtq.cli; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, capture_output=True)
    assert HEAVY.isdisjoint(out.stdout.decode().split())
