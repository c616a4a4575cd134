"""Outputs of trtq: replaced files, files that must stay, and the remains of a killed process."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from trtq.artefact import files, locks
from trtq.artefact.folder import check_output, claims_output, new_artefact, put_in_place
from trtq.artefact.listing import read_listing, write_listing
from trtq.artefact.locks import claim
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_file import artefact_kind, write_manifest
from trtq.artefact.manifest_rows import LayerRow, SourceRow
from trtq.artefact.opened import open_folder
from trtq.artefact.outputs import check_file, new_file
from trtq.artefact.partial import old_folder, partial_folder
from trtq.errors import ArtefactError, IntegrityError, UsageError
from trtq.report.folder import check_report_folder, write_report
from trtq.report.page import Page

LAYER = {
    "name": "conv_in",
    "kind": "conv2d",
    "weight_bits": 8,
    "activation_bits": 8,
    "reason": "first convolution",
}
LOW_BIT = {
    "recipe": {"method": "minmax", "bits": "w8a8", "steps": 1},
    "timesteps": [1.0],
    "layers": [LayerRow(**LAYER)],
}
DESCRIBED = {
    "run": LOW_BIT,
    "onnx": {"options": {"size": "8x8"}},
    "engine": {
        "options": {"size": "8x8", "backend": "tensorrt-rtx", "architectures": ["sm86"]},
    },
}


def fill(folder, content="one", kind="run"):
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "unet" / "config.json").write_text(content)
    (folder / "quantized.safetensors").write_text(content)
    source = SourceRow(name="digits", files={})
    write_manifest(folder, Manifest(kind=kind, source=source, denoiser="unet", **DESCRIBED[kind]))


def make(place, content="one", kind="run", **options):
    with new_artefact(place, kind=kind, **options) as folder:
        fill(folder, content, kind)
    return place


def content(folder):
    return (folder / "unet" / "config.json").read_text()


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


FOREIGN = {
    "web app": {"manifest.json": '{"short_name": "mine", "start_url": "/"}'},
    "browser extension": {"manifest.json": '{"manifest_version": 3, "name": "mine"}'},
    "another format": {"manifest.json": '{"format_version": 1, "kind": "run", "files": {}}'},
    "another tool": {"manifest.json": '{"format_version": 2, "kind": "app", "files": {}}'},
    "no json": {"manifest.json": "mine"},
    "a list": {"manifest.json": "[]"},
    "deep": {"manifest.json": "[" * 100_000},
    "null": {"manifest.json": "null"},
    "a report of another": {"report.json": '{"mine": 1}', "index.html": "mine"},
    "checksums": {"SHA256SUMS": "", "pipeline/config.pbtxt": ""},
    "another's listing": {"trtq-files.json": '{"files": {"thesis.txt": ""}, "kind": "run"}'},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("kind", ["run", "onnx", "engine", "eval", "bench", "demo", "triton"])
def test_a_foreign_folder_is_never_replaced(kind, files, tmp_path):
    place = tmp_path / "mine"
    for name, text in (files | {"thesis.txt": "years"}).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    with pytest.raises(UsageError, match="exists and is not"):
        check_output(place, overwrite=True, kind=kind)
    with pytest.raises(UsageError, match="exists and is not"), new_artefact(place, overwrite=True):
        pytest.fail("nothing is written")
    assert (place / "thesis.txt").read_text() == "years"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("other", ["onnx", "engine", "eval", "triton"])
def test_only_the_same_kind_is_replaced(other, tmp_path):
    place = make(tmp_path / "run")
    with pytest.raises(UsageError, match="is a run, which is not replaced by"):
        check_output(place, overwrite=True, kind=other)
    with pytest.raises(UsageError), new_artefact(place, overwrite=True) as folder:
        fill(folder, "two", "onnx")
    assert content(place) == "one"
    assert hidden(tmp_path) == []


def test_an_artefact_is_replaced_only_with_overwrite(tmp_path):
    place = make(tmp_path / "run")
    with pytest.raises(UsageError, match="pass --overwrite"):
        make(place, "two")
    make(place, "two", overwrite=True)
    assert content(place) == "two"
    assert hidden(tmp_path) == []


def test_files_of_the_user_stay_where_they_are(tmp_path):
    place = make(tmp_path / "run")
    mine = ("NOTES.md", ".git/objects/ab", "unet/notes.md", ".DS_Store", "checkpoints/mine.txt")
    for name in (*mine, "pictures/cat.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
    (place / "empty").mkdir()
    (place / "link").symlink_to(tmp_path)
    checkpoint = place / "checkpoints" / "fine-tune" / "iteration-0000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_text("ours")
    make(place, "two", overwrite=True)
    assert content(place) == "two"
    assert [(place / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert (place / "pictures" / "cat.png").read_text() == "mine"
    assert (place / "empty").is_dir()
    assert (place / "link").is_symlink()
    assert not checkpoint.exists()
    assert hidden(tmp_path) == []
    assert open_folder(place).manifest.kind == "run"


def test_a_folder_with_only_bookkeeping_files_is_empty(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").write_text("finder")
    make(tmp_path / "run")
    assert (tmp_path / "run" / ".DS_Store").read_text() == "finder"
    assert hidden(tmp_path) == []


def test_a_changed_file_belongs_to_the_user(tmp_path):
    place = make(tmp_path / "run")
    (place / "unet" / "config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"config\.json was changed since trtq wrote it"):
        check_output(place, overwrite=True)
    assert content(place) == "mine"


def test_a_file_that_was_changed_during_the_work_is_kept(tmp_path, caplog):
    place = make(tmp_path / "run")
    with new_artefact(place, overwrite=True) as folder:
        fill(folder, "two")
        (place / "unet" / "config.json").write_text("mine")
    assert content(place) == "two"
    assert content(old_folder(place)) == "mine"
    assert "left in" in caplog.text
    with pytest.raises(UsageError, match="move them away"):
        make(place, "three", overwrite=True)
    assert content(old_folder(place)) == "mine"


def test_a_file_that_the_new_artefact_would_read_is_refused_by_name(tmp_path):
    place = make(tmp_path / "run")
    (place / "unet" / "extra.safetensors").write_text("mine")
    with pytest.raises(UsageError, match=r"extra\.safetensors is not in the manifest"):
        check_output(place, overwrite=True)


def test_a_manifest_that_lists_files_elsewhere_removes_nothing_there(tmp_path):
    place = make(tmp_path / "run")
    (tmp_path / "thesis.txt").write_text("years")
    record = json.loads((place / "manifest.json").read_text())
    record["files"]["../thesis.txt"] = files.sha256(tmp_path / "thesis.txt")
    (place / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="is not an artefact of trtq"):
        make(place, "two", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def place_file(folder):
    (folder / "file").write_text("mine")
    return folder / "file"


def place_link(folder):
    make(folder / "real")
    (folder / "link").symlink_to(folder / "real")
    return folder / "link"


def place_pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


PLACES = {
    "a file": (place_file, "is a file"),
    "a link": (place_link, "is a symbolic link"),
    "a broken link": (lambda f: (f / "x").symlink_to(f / "y") or f / "x", "is a symbolic link"),
    "a link to itself": (lambda f: (f / "x").symlink_to("x") or f / "x", "x"),
    "a pipe": (place_pipe, "is a named pipe"),
    "a device": (lambda _: Path("/dev/null"), "is a device"),
    "the root": (lambda _: Path("/"), "current folder or a folder that contains it"),
    "here": (lambda _: Path(), "current folder or a folder that contains it"),
    "empty": (lambda _: Path(""), "current folder or a folder that contains it"),
    "around here": (lambda _: Path(".."), "current folder or a folder that contains it"),
    "by a detour": (lambda _: Path("x/.."), "current folder or a folder that contains it"),
    "home": (lambda _: Path.home(), "your home folder"),
    "home unread": (lambda _: Path("~/run"), "begins with ~"),
    "below a file": (lambda f: place_file(f) / "run", "cannot write to"),
    "inside a run": (lambda f: make(f / "r") / "sub", "lies inside"),
    "NUL": (lambda f: f / "a\0b", "holds a NUL"),
    "a parent too long": (lambda f: f / ("x" * 300) / "run", "cannot write to"),
    "too long": (lambda f: f / ("x" * 250), "cannot write to"),
}


@pytest.mark.parametrize(("prepare", "message"), PLACES.values(), ids=PLACES.keys())
def test_unwritable_paths_are_refused(prepare, message, tmp_path, monkeypatch):
    for folder in ("home", "work/here"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message), new_artefact(place, overwrite=True):
        pytest.fail("nothing is written")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(UsageError, match="mount point"):
        check_output(tmp_path / "disk", overwrite=False)


def test_a_source_that_is_not_a_path_does_not_block_an_output(tmp_path):
    for source in ("x" * 5000, "a\0b", "digits", object()):
        assert check_output(tmp_path / "run", overwrite=False, source=source)


@pytest.mark.parametrize("other", ["run", "run/sub", ".", "run/../run"])
def test_input_and_output_must_not_overlap(other, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(UsageError, match="the same place or inside each other"):
        check_output(tmp_path / other, overwrite=True, source=tmp_path / "run")


def test_created_folders_that_stay_empty_are_removed(tmp_path):
    with pytest.raises(RuntimeError), new_artefact(tmp_path / "a" / "b" / "run"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "a" / "b" / "run")
    assert hidden(tmp_path / "a" / "b") == []


def test_an_unwritable_folder_is_a_usage_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "there")

    monkeypatch.setattr(locks.os, "open", refuse)
    with pytest.raises(UsageError, match=r"cannot write to .*Permission denied"):
        make(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_names_folder_and_file_and_keeps_the_existing_output(overwrite, tmp_path):
    if overwrite:
        make(tmp_path / "run")

    def write():
        with new_artefact(tmp_path / "run", overwrite=overwrite) as folder:
            (folder / "quantized.safetensors").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtefactError, match=r"run failed, nothing of it.*quantized\.safetensors: "):
        write()
    assert hidden(tmp_path) == []
    assert (tmp_path / "run").exists() == overwrite
    if overwrite:
        assert content(tmp_path / "run") == "one"


def test_the_existing_folder_is_restored_if_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    place = make(tmp_path / "run")
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith("-partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ArtefactError, match="nothing of it is left"):
        make(place, "two", overwrite=True)
    assert content(place) == "one"
    assert hidden(tmp_path) == []


# A process that died: kill -9, or a power failure.


def test_remains_of_a_dead_process_are_removed(tmp_path):
    fill(partial_folder(tmp_path / "run"), "half")
    (partial_folder(tmp_path / "run") / "half.bin").write_text("x")
    (tmp_path / ".run.trtq-lock").write_text('{"pid": 1, "host": "gone"}')
    make(tmp_path / "run")
    assert hidden(tmp_path) == []
    assert not (tmp_path / "run" / "half.bin").exists()


def test_the_old_folder_is_restored_after_a_death_between_the_renames(tmp_path, caplog):
    place = make(tmp_path / "run")
    fill(partial_folder(place), "two")
    place.rename(old_folder(place))
    with pytest.raises(UsageError, match="pass --overwrite"):
        make(place, "three")
    assert content(place) == "one"
    assert "restored" in caplog.text
    assert not old_folder(place).exists()


def test_the_old_folder_is_removed_after_a_death_after_the_renames(tmp_path):
    place = make(tmp_path / "run")
    (place / "NOTES.md").write_text("mine")
    place.rename(old_folder(place))
    with new_artefact(tmp_path / "other") as folder:
        fill(folder, "two")
    (tmp_path / "other").rename(place)
    make(place, "three", overwrite=True)
    assert content(place) == "three"
    assert (place / "NOTES.md").read_text() == "mine"
    assert hidden(tmp_path) == []


def test_a_foreign_file_with_the_name_of_the_old_folder_is_not_touched(tmp_path):
    place = make(tmp_path / "run")
    old_folder(place).mkdir()
    (old_folder(place) / "NOTES.md").write_text("mine")
    (place / "NOTES.md").write_text("mine, too")
    with pytest.raises(UsageError, match="move them away"):
        make(place, "two", overwrite=True)
    assert (old_folder(place) / "NOTES.md").read_text() == "mine"


def test_a_link_with_the_name_of_the_partial_folder_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    partial_folder(tmp_path / "run").symlink_to(tmp_path / "precious")
    make(tmp_path / "run")
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]


def test_a_link_with_the_name_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    (tmp_path / ".run.trtq-lock").symlink_to("thesis.txt")
    with pytest.raises(UsageError, match="cannot write to"):
        make(tmp_path / "run")
    assert (tmp_path / "thesis.txt").read_text() == "years"


# Two processes or threads at once.

WRITER = """
import sys, time
from pathlib import Path
from tests.artefact.test_outputs import fill
from trtq.artefact.folder import new_artefact
place, content = Path(sys.argv[1]), sys.argv[2]
with new_artefact(place, kind="run", overwrite=True) as folder:
    print("writing", flush=True)
    sys.stdin.readline()
    fill(folder, content)
"""


def writer(place, text, body=WRITER):
    return subprocess.Popen(
        [sys.executable, "-c", body, str(place), text],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_process_is_refused_and_the_first_one_finishes(tmp_path):
    place = tmp_path / "run"
    first = writer(place, "first")
    assert first.stdout.readline() == "writing\n"
    with pytest.raises(UsageError, match=rf"process {first.pid} .* is writing to"):
        make(place, overwrite=True)
    assert partial_folder(place).is_dir()
    _, stderr = first.communicate("go\n", timeout=60)
    assert first.returncode == 0, stderr
    assert (place / "quantized.safetensors").read_text() == "first"
    assert open_folder(place).manifest.kind == "run"
    assert hidden(tmp_path) == []


def test_the_lock_of_a_killed_process_blocks_no_other_process(tmp_path):
    place = tmp_path / "run"
    first = writer(place, "first")
    first.stdout.readline()
    first.kill()
    first.communicate()
    assert hidden(tmp_path) == [".run.trtq-lock", ".run.trtq-partial"]
    make(place)
    assert hidden(tmp_path) == []


def test_a_second_thread_is_refused_but_the_same_thread_is_not(tmp_path):
    refused = []

    def other():
        try:
            make(tmp_path / "run")
        except UsageError as err:
            refused.append(str(err))

    with claim(tmp_path / "run"):
        with claim(tmp_path / "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / ".run.trtq-lock").exists()
    assert "is writing to" in refused[0]
    assert list(tmp_path.iterdir()) == []


def test_without_file_locks_the_record_shows_whether_the_owner_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_try_lock", lambda _: None)
    lock = tmp_path / ".run.trtq-lock"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    for owner, message in (
        ({"pid": os.getppid(), "host": here, "start": locks._start_of(os.getppid())}, "process"),
        ({"pid": 5, "host": "another machine"}, "on another machine"),
    ):
        lock.write_text(json.dumps(owner))
        with pytest.raises(UsageError, match=message):
            make(tmp_path / "run")
    for owner in (
        {"pid": ended.pid, "host": here},
        {"pid": os.getppid(), "host": here, "start": "another process of this number"},
        [],
    ):
        lock.write_text(json.dumps(owner))
        make(tmp_path / "run", overwrite=True)
    assert hidden(tmp_path) == []


def test_a_function_locks_its_output_before_its_work(tmp_path):
    @claims_output
    def work(model, out, overwrite=False):
        assert (tmp_path / ".run.trtq-lock").is_file()
        return make(Path(out), model, overwrite=overwrite)

    work("one", str(tmp_path / "run"))
    work("two", out=tmp_path / "run", overwrite=True)
    assert content(tmp_path / "run") == "two"
    with pytest.raises(TypeError):
        work()
    first = writer(tmp_path / "run", "x")
    first.stdout.readline()
    with pytest.raises(UsageError, match="is writing to"):
        work("three", tmp_path / "run", overwrite=True)
    first.communicate("go\n")


# Signals.

ENDED = """
import sys, time
from pathlib import Path
from trtq.commands.output import command
from trtq.artefact.folder import new_artefact
with command(False), new_artefact(Path(sys.argv[1]), keep_partial=True) as folder:
    if sys.argv[2]:
        (folder / "checkpoints/fine-tune/iteration-0000002").mkdir(parents=True)
        (folder / "checkpoints/fine-tune/iteration-0000002/checkpoint.json").write_text("{}")
        (folder / "checkpoints/fine-tune/.iteration-0000004.partial").mkdir()
    (folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_leaves_only_checkpoints(number, code, tmp_path):
    # typer converts its Exit to the exit code of the process; without typer the exception has the code.
    body = f"import typer\ntry:\n{textwrap.indent(ENDED, ' ')}\n"
    body += "except typer.Exit as err:\n sys.exit(err.exit_code)"
    for checkpoint in ("", "checkpoint"):
        process = writer(tmp_path / "run", checkpoint, body)
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr
        assert hidden(tmp_path) == ([".run.trtq-partial"] if checkpoint else [])
    left = {path.name for path in partial_folder(tmp_path / "run").rglob("*")}
    assert left == {"checkpoints", "fine-tune", "iteration-0000002", "checkpoint.json"}


def test_an_ignored_signal_stays_ignored(tmp_path):
    body = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from trtq.processes import ending_on_signals\n"
        "with ending_on_signals():\n print('writing', flush=True); input()\nprint('done')"
    )
    process = writer(tmp_path, "", body)
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    out, stderr = process.communicate("go\n", timeout=60)
    assert (process.returncode, out) == (0, "done\n"), stderr


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "slow_worker.py").write_text(
        "import os, time\ndef main():\n print(os.getpid(), flush=True)\n time.sleep(60)\n"
    )
    body = (
        "import os, subprocess, sys\n"
        "from trtq.processes import worker_command\n"
        "paths = [sys.argv[1], os.environ.get('PYTHONPATH', '')]\n"
        "os.environ['PYTHONPATH'] = os.pathsep.join(paths)\n"
        "subprocess.Popen(worker_command('slow_worker'), stdin=subprocess.PIPE).wait()\n"
    )
    parent = writer(tmp_path, "", body)
    assert int(parent.stdout.readline()) > 0
    parent.kill()
    # The worker holds the other end of this pipe, which closes when the worker ends.
    parent.communicate(timeout=30)


# Single files.


def test_a_file_is_written_completely_and_replaced_only_with_overwrite(tmp_path):
    place = tmp_path / "x.json"
    with new_file(place, overwrite=False) as partial:
        partial.write_text("one")
    with pytest.raises(UsageError, match="pass --overwrite"):
        check_file(place, overwrite=False)

    def fail():
        with new_file(place, overwrite=True) as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtefactError, match=r"x\.json failed.*No space"):
        fail()
    assert place.read_text() == "one"
    with new_file(place, overwrite=True) as partial:
        partial.write_text("two")
    assert place.read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_file_created_in_the_meantime_is_not_replaced(tmp_path):
    def write():
        with new_file(tmp_path / "x", overwrite=False) as partial:
            partial.write_text("ours")
            (tmp_path / "x").write_text("theirs")

    with pytest.raises(UsageError, match="exists"):
        write()
    assert (tmp_path / "x").read_text() == "theirs"


@pytest.mark.parametrize(
    ("name", "message"),
    [("no/x.png", "does not exist"), ("folder", "is a folder"), ("link.png", "symbolic link")],
)
def test_unwritable_file_paths_are_refused(name, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "y.png")
    with pytest.raises(UsageError, match=message):
        check_file(tmp_path / name, overwrite=True)


# Reports and packages.


def report(place, numbers=1, kind="eval", overwrite=False):
    page = Page("title", "lead", ())
    write_report(place, page, {"numbers": numbers}, kind=kind, overwrite=overwrite)
    return place


def test_a_report_is_replaced_by_the_same_rule(tmp_path):
    place = report(tmp_path / "report")
    assert set(read_listing(place).files) == {"index.html", "report.json"}
    (place / "thesis.txt").write_text("years")
    report(place, 2, overwrite=True)
    assert json.loads((place / "report.json").read_text()) == {"numbers": 2}
    assert (place / "thesis.txt").read_text() == "years"
    with pytest.raises(UsageError, match="is a report of trtq eval, which is not replaced by"):
        check_report_folder(place, kind="bench", overwrite=True)
    (place / "report.json").write_text("mine")
    with pytest.raises(UsageError, match=r"report\.json was changed"):
        report(place, 3, overwrite=True)
    assert hidden(tmp_path) == []


def test_a_listing_names_the_files_of_the_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    write_listing(tmp_path, "triton", unhashed=["SUMS"])
    owned = read_listing(tmp_path)
    assert owned.kind == "triton"
    assert owned.files == {"a/b": files.sha256(tmp_path / "a" / "b"), "SUMS": ""}
    (tmp_path / "trtq-files.json").write_text('{"trtq_listing": 1, "kind": "x", "files": [1]}')
    assert read_listing(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_instead_of_a_listing_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "trtq-files.json")
    assert read_listing(tmp_path) is None


# Reading.

BESIDE = (
    "README.md",
    "NOTES",
    "report.json",
    ".DS_Store",
    ".gitattributes",
    ".git/config",
    ".cache/huggingface/download/manifest.json.metadata",
    "Thumbs.db",
    ".ipynb_checkpoints/manifest-checkpoint.json",
    "unet/.DS_Store",
    "unet/._config.json",
    "unet/README.md",
    "unet/notes.txt",
    "wandb/run.json",
    "manifest.json.bak",
    "desktop.ini",
)


@pytest.mark.parametrize("name", BESIDE)
def test_foreign_files_next_to_an_artefact_are_ignored(name, tmp_path, caplog):
    place = make(tmp_path / "run")
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text("*\n")
    assert set(open_folder(place).manifest.files) == {"quantized.safetensors", "unet/config.json"}
    open_folder(place)
    (record,) = caplog.records
    assert "1 entry that the manifest does not list" in record.message
    assert name.split("/")[0] in record.message


READ = (
    "model_index.json",
    "classes.json",
    "trained.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/adapter_config.json",
    "unet/pytorch_model.bin",
    "unet/modeling.py",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "unet/model.engine",
    "unet/Config.JSON",
    "unet/templates/x.jinja",
    "tokenizer/vocab.txt",
    "text_encoder/model.safetensors",
)


@pytest.mark.parametrize("name", READ)
def test_a_file_that_a_loader_would_read_must_be_in_the_manifest(name, tmp_path):
    with new_artefact(tmp_path / "run") as folder:
        if name != "model_index.json":
            index = {"tokenizer": ["transformers", "X"], "text_encoder": ["transformers", "Y"]}
            (folder / "model_index.json").write_text(json.dumps(index))
        fill(folder)
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(IntegrityError, match=r"is not in the manifest.*move it out"):
        open_folder(tmp_path / "run")


def graph(*locations):
    """A graph whose external tensors are in a file next to it."""
    return b"".join(b"\x0a\x08location\x12" + bytes([len(where)]) + where for where in locations)


@pytest.mark.parametrize(
    ("location", "name"),
    [
        (b"f", "unet/f"),
        (b"./weights", "unet/weights"),
        (b".cache", "unet/.cache"),
        (b"sub/w", "unet/sub/w"),
        (b"../README.md", "README.md"),
    ],
)
def test_a_file_that_a_graph_names_must_be_in_the_manifest(location, name, tmp_path):
    with new_artefact(tmp_path / "onnx") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "model.onnx").write_bytes(graph(b"model.onnx_data", location))
        fill(folder, kind="onnx")
    path = tmp_path / "onnx" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("weights")
    with pytest.raises(IntegrityError, match=r"unet/model\.onnx may read it"):
        open_folder(tmp_path / "onnx")
    path.rename(path.with_name("another.md"))
    open_folder(tmp_path / "onnx")


@pytest.mark.parametrize("name", ["unet/f", "pipe", "unet/config.json", "manifest.json"])
def test_a_pipe_is_refused_and_not_read(name, tmp_path):
    place = make(tmp_path / "run")
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / name)
    with pytest.raises(ArtefactError, match="is a named pipe"):
        open_folder(place) if artefact_kind(place) else None


def test_a_socket_is_refused_and_one_in_a_hidden_folder_is_not(tmp_path, monkeypatch):
    place = make(tmp_path / "run")
    (place / ".git").mkdir()
    monkeypatch.chdir(place)
    with socket.socket(socket.AF_UNIX) as hidden_one, socket.socket(socket.AF_UNIX) as shown:
        hidden_one.bind(".git/ipc")
        open_folder(place)
        shown.bind("ipc")
        with pytest.raises(IntegrityError, match="is a socket"):
            open_folder(place)


def test_put_in_place_moves_a_folder_to_a_new_place(tmp_path):
    fill(tmp_path / "made")
    put_in_place(tmp_path / "made", tmp_path / "run")
    assert open_folder(tmp_path / "run").manifest.kind == "run"
