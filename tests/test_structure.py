"""The house: sizes, layers, guards for POSIX, types of results. CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests import skips
from tests.conftest import STARTED_FIRST
from tests.vocabulary import ROOT, files_of_project

MAX_FILE_LINES, MAX_LARGE_FILES = 300, 0.06
MAX_FUNCTION_LINES, MAX_LONG_FUNCTIONS = 60, 0.01
MAX_ROOM = 0.15
"""Largest share of the library's lines that one room may hold."""
POSIX_ONLY = {
    name: set(attributes.split())
    for name, attributes in {
        "os": (
            "chown fchown fork forkpty geteuid getuid getgid getpgid getppid killpg lchown mkfifo nice "
            "pread preadv pwrite posix_fadvise posix_fallocate posix_spawn sched_getaffinity sendfile "
            "setsid setuid statvfs fstatvfs sysconf uname wait4 waitid WNOHANG O_DIRECTORY O_NOCTTY "
            "O_CLOEXEC O_NOFOLLOW O_NONBLOCK register_at_fork"
        ),
        "signal": (
            "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 setitimer"
        ),
        "socket": "AF_UNIX SO_REUSEPORT",
        "mmap": "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS PROT_READ PROT_WRITE",
        "time": "tzset clock_gettime",
    }.items()
}
EDGES = {
    # What a JSON or TOML file holds, before it is checked.
    "trtq.calib.toml_files.read_toml",
    "trtq.calls.call_file.read_call_file",
    "trtq.checkpoint.layout.read_index",
    "trtq.checkpoint.layout.read_json",
    "trtq.documents.read_object",
    "trtq.lora.settings.parse_json",
    # Former name of `to_json`, for one release.
    "trtq.evaluation.evaluate.result",
    # The record that a command prints as JSON.
    "trtq.commands.output.record_of",
    # Questions to worker processes and their answers: lines and files of JSON.
    "trtq.bench.measure.ask_optional",
    "trtq.bench.process.ask",
    "trtq.bench.rows.ask",
    "trtq.bench.called.draw",
    "trtq.bench.called.open",
    "trtq.bench.called.operations",
    "trtq.bench.called.prepare",
    "trtq.bench.measured.memory",
    "trtq.bench.measured.time",
    "trtq.bench.worker.draw",
    "trtq.bench.worker.open",
    "trtq.bench.worker.operations",
    "trtq.bench.worker.prepare",
    "trtq.child.questions",
    "trtq.engine.prepared.graph.record",
    "trtq.processes.answer",
    "trtq.processes.ask",
    # The keyword arguments of a denoiser.
    "trtq.calls.form.rebuild",
    "trtq.exporter.trace_call.rebuild",
    # What the comparison function of a script reads from its JSON file.
    "trtq.comparison.bounds.call_bounds",
    # The form that another library prescribes: torch's parameter groups, diffusers' arguments and
    # scheduler settings, TensorRT's inspector, OpenAI's errors, Ray's policies.
    "trtq.checkpoint.layout.read_scheduler",
    "trtq.diffusion.scheduler_rules.used_settings",
    "trtq.engine.tensorrt.run.describe",
    "trtq.diffusion.class_conditional.prepare_extra_step_kwargs",
    "trtq.diffusion.families.flatten",
    "trtq.diffusion.families.nest",
    "trtq.serve.http.errors.envelope",
    "trtq.serve.ray.deployment.replicas_wanted",
    "trtq.train.distill.activation_groups",
    "trtq.train.distill.adapter_groups",
    "trtq.train.distill.parameter_groups",
    "trtq.train.distill.tuned_groups",
    "trtq.train.efficientdm.parameter_groups",
    "trtq.train.loop.parameter_groups",
    "trtq.train.quest.parameter_groups",
}
"""Public functions that return `dict[str, Any]`, and why."""
POSIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty", "crypt", "readline"}
POSIX_ARGUMENTS = {"preexec_fn", "pass_fds", "process_group"}
"""Of subprocess; Windows refuses these, and ignores `start_new_session`."""


def _library():
    """The library's files: `trtq/`, and what its links point to."""
    return [
        path
        for path in files_of_project()
        if path.suffix == ".py"
        and path.relative_to(ROOT).parts[0] in ("trtq", "plugins", "calib", "cli.py")
    ]


@cache
def _tree(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def _functions(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "trtq" else ("trtq", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_few_files_are_long():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _library()}
    large = {_module(path): lines for path, lines in sizes.items() if lines > MAX_FILE_LINES}
    assert len(large) <= MAX_LARGE_FILES * len(sizes), large


def test_the_files_that_start_first_exist():
    assert not [name for name in STARTED_FIRST if not (ROOT / name).is_file()]


def test_few_functions_are_long():
    lengths = {
        f"{_module(path)}.{node.name}": node.end_lineno - node.lineno + 1
        for path in _library()
        for node in _functions(path)
    }
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert len(long) < MAX_LONG_FUNCTIONS * len(lengths), long


def test_no_room_is_a_junk_drawer():
    rooms = Counter()
    for path in _library():
        name = _module(path).split(".")
        rooms[name[1] if len(name) > 2 else ""] += len(path.read_text("utf-8").splitlines())
    total = sum(rooms.values())
    assert {room: n / total for room, n in rooms.items() if n > MAX_ROOM * total} == {}


def test_public_functions_return_types_that_say_what_is_in_them():
    """`to_json` and its like are JSON's edge; everything else returns a dataclass or a simple type."""
    bags = [
        f"{_module(path)}.{node.name}"
        for path in _library()
        for node in _functions(path)
        if node.returns is not None
        and re.search(r"dict\[str, Any\]", ast.unparse(node.returns))
        and not node.name.startswith("_")
        and isinstance(node.parent, ast.Module | ast.ClassDef)
        and not getattr(node.parent, "name", "").startswith("_")
        and f"{_module(path)}.{node.name}" not in EDGES
        and node.name not in ("to_json", "as_dict")
    ]
    assert bags == []


def _layers():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = config["tool"]["importlinter"]["contracts"]
    rows = [re.split(r"\s*[|:]\s*", row) for row in contract["layers"]]
    return {name: depth for depth, row in enumerate(rows) for name in row}


def test_every_room_has_a_floor():
    rooms = {".".join(_module(path).split(".")[:2]) for path in _library()} - {"trtq"}
    assert rooms == set(_layers())


def _named_modules(path):
    """Modules of ours that stand in strings: code that is run in another process, lazy imports."""
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        for name in re.findall(r"(?<![\w.])trtq(?:\.\w+)+", node.value):
            if isinstance(node.parent, ast.Expr) and "`" in node.value:
                continue  # A docstring; see the next test.
            yield node.lineno, name


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_modules_named_in_strings_obey_the_layers():
    layers, wrong = _layers(), []
    for path in _library():
        room = ".".join(_module(path).split(".")[:2])
        if room == "trtq":  # The public face stands above all rooms.
            continue
        for line, name in _named_modules(path):
            named = ".".join(name.split(".")[:2])
            if named in layers and layers[named] < layers[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert wrong == []


def test_names_of_ours_in_docstrings_exist():
    """A name in backticks, `trtq.room.module.thing`, is followed by readers and by the documentation."""
    broken = []
    for path in _library():
        for match in re.finditer(r"`(trtq(?:\.\w+)+)`", path.read_text(encoding="utf-8")):
            parts = match[1].split(".")
            if _is_module(match[1]) or match[1] in ("trtq.replaced", "trtq.json"):
                continue
            for cut in range(len(parts) - 1, 0, -1):
                if _is_module(".".join(parts[:cut])):
                    owner = importlib.import_module(".".join(parts[:cut]))
                    break
            for part in parts[cut:]:
                owner = getattr(owner, part, None) or getattr(owner, "model_fields", {}).get(part)
            if owner is None and match[1] not in _METADATA_KEYS:
                broken.append(f"{path.relative_to(ROOT)}: {match[1]}")
    assert broken == []


_METADATA_KEYS = ("trtq.layers", "trtq.timesteps", "trtq.latent_sizes", "trtq.progress")


def _leaves_elsewhere(statement):
    """Whether a statement ends the function on another system than the one that what follows needs."""
    return (
        isinstance(statement, ast.If)
        and re.search(r"hasattr|sys\.platform|os\.name", ast.unparse(statement.test)) is not None
        and isinstance(statement.body[-1], ast.Return | ast.Raise)
    )


def _guarded(node):
    """Whether a use stands behind a test of the system, or behind an except that catches its lack."""
    while node is not None:
        parent = getattr(node, "parent", None)
        if isinstance(parent, ast.Try) and node in parent.body:
            caught = " ".join(ast.unparse(h.type) for h in parent.handlers if h.type is not None)
            if re.search(r"AttributeError|ImportError|ModuleNotFoundError", caught):
                return True
        if isinstance(parent, ast.If | ast.IfExp | ast.BoolOp):
            test = ast.unparse(parent.test if not isinstance(parent, ast.BoolOp) else parent)
            if re.search(r"hasattr|sys\.platform|os\.name|TYPE_CHECKING", test):
                return True
        block = getattr(parent, "body", None)
        before = block[: block.index(node)] if isinstance(block, list) and node in block else []
        if any(_leaves_elsewhere(statement) for statement in before):
            return True
        node = parent
    return False


def test_calls_that_only_posix_has_stand_behind_guards():
    wrong = []
    for path in _library():
        for node in ast.walk(_tree(path)):
            name = None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.attr in POSIX_ONLY.get(node.value.id, ()):
                    name = f"{node.value.id}.{node.attr}"
            elif isinstance(node, ast.Import):
                name = next((a.name for a in node.names if a.name in POSIX_MODULES), None)
            elif isinstance(node, ast.keyword) and node.arg in POSIX_ARGUMENTS:
                name = node.arg
            if name is not None and not _guarded(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert wrong == []


def test_text_is_read_and_written_as_utf_8_on_every_system():
    """Windows' default encoding is another one; `open` in text mode and its like name theirs."""
    wrong = []
    for path in _library():
        for node in ast.walk(_tree(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("read_text", "write_text"):
                named = any(k.arg == "encoding" for k in node.keywords) or (
                    called == "read_text" and node.args
                )
            elif called == "open" and not re.search(
                r"webbrowser|Image\.|os\.|urlopen|tarfile|zipfile|mmap", ast.unparse(node.func)
            ):
                texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
                mode = next((t for t in texts if isinstance(t, str) and len(t) <= 3), "r")
                named = "b" in mode or any(k.arg == "encoding" for k in node.keywords)
            else:
                continue
            if not named:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:60]}")
    assert wrong == []


@pytest.mark.parametrize(
    ("node", "reason", "is_unexpected"),
    [
        ("tests/serve/ray/test_local.py", "Skipped: could not import 'ray'", True),
        ("tests/bench/test_kernels.py::test_x", "Skipped: needs an NVIDIA GPU", False),
        ("tests/bench/test_kernels.py::test_x", "Skipped: needs ray", True),
        ("tests/serve/http/test_page.py::test_x[a]", "Skipped: no Chromium is installed", False),
    ],
)
def test_only_listed_skips_are_allowed(node, reason, is_unexpected):
    assert skips.unexpected(node, reason) is is_unexpected
