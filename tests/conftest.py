"""Small models that several tests share."""

import functools
import os
import shutil
import sys

import pytest
import torch

from tests.skips import unexpected
from trtq.diffusion.loading import open_pipeline
from trtq.exporter.export import export
from trtq.processor import VARIABLE, has_vnni
from trtq.runs.quantize import quantize

# Intra-op threads spin. On a busy machine tests of tiny models ran many times slower with two threads
# than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

STARTED_FIRST = (
    *("tests/families/test_families.py", "tests/test_docs.py", "tests/commands/test_cli.py"),
    *("tests/train/test_quest.py", "tests/exporter/test_component_worker.py"),
    *("tests/exporter/test_export.py", "tests/exporter/test_comfy.py"),
    *("tests/pipelines/test_text.py", "tests/calls/test_free_axes.py", "tests/train/test_train.py"),
    *("tests/exporter/test_hazards.py", "tests/pipelines/test_loaded_pipelines.py"),
    *("tests/commands/test_hostile_verbs.py", "tests/runs/test_format_runs.py"),
    *("tests/runs/test_weight_only_runs.py", "tests/calib/test_transforms.py"),
    *(
        "tests/checkpoint/test_prepared.py",
        "tests/lora/test_exchange.py",
        "tests/test_packaging.py",
    ),
    *(
        "tests/test_torch_settings.py",
        "tests/demo/test_digits_dit.py",
        "tests/train/test_called.py",
    ),
)
"""The files that take longest. They start first, so that no process waits for one of them at the end."""

_STRICT = os.environ.get("TRTQ_STRICT_SKIPS") == "1"
_skipped: dict[str, str] = {}


def _note_skip(report):
    """Note a skipped test or file, and the reason; an expected failure is reported as skipped, too."""
    if report.skipped and not hasattr(report, "wasxfail"):
        place = report.longrepr
        _skipped[report.nodeid] = place[2] if isinstance(place, tuple) else str(place)


def pytest_runtest_logreport(report):
    _note_skip(report)


def pytest_collectreport(report):
    _note_skip(report)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(STARTED_FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_terminal_summary(terminalreporter):
    """List the skips that `tests/skips.py` does not allow."""
    rows = [f"{node}: {reason}" for node, reason in _skipped.items() if unexpected(node, reason)]
    if rows and _STRICT:
        terminalreporter.section("unexpected skips: install what is missing, or see tests/skips.py")
        for row in rows:
            terminalreporter.write_line(row)


def pytest_sessionfinish(session):
    """End with 1 if a test was skipped without permission, in the process that sums up."""
    in_worker = hasattr(session.config, "workerinput")
    bad = any(unexpected(node, reason) for node, reason in _skipped.items())
    if _STRICT and bad and not in_worker and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_COMPUTED_RIGHTLY = [True, False] if has_vnni() else [False]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is left in the user's cache, and nothing in it is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv(VARIABLE, raising=False)
        yield


def _unmeasured(function):
    """The function, called while coverage takes a break."""

    @functools.wraps(function)
    def call(*arguments, **options):
        tracer = sys.gettrace()
        if not type(tracer).__module__.startswith("coverage"):
            return function(*arguments, **options)
        sys.settrace(None)
        try:
            return function(*arguments, **options)
        finally:
            sys.settrace(tracer)

    return call


@pytest.fixture(scope="session", autouse=True)
def _torch_traces_unmeasured():
    """Coverage nearly doubles the time of an export, and almost all of that time is torch's own.

    What torch calls while it traces is not measured then: the forward functions of the layers, which
    other tests call.
    """
    with pytest.MonkeyPatch.context() as patch:
        for place in (torch.export, torch.onnx):
            patch.setattr(place, "export", _unmeasured(place.export))
        yield


@pytest.fixture(params=[True, False], ids=["vnni", "no vnni"])
def vnni(request, monkeypatch):
    """The test runs as on both kinds of processors; whether this one is taken to have VNNI.

    For what is written, imported or refused. What the other kind of processor computes cannot be seen.
    """
    monkeypatch.setenv(VARIABLE, "+vnni" if request.param else "-vnni")
    return request.param


@pytest.fixture(params=_COMPUTED_RIGHTLY, ids=lambda vnni: "vnni" if vnni else "no vnni")
def computed_vnni(request, monkeypatch):
    """As `vnni`, for what is computed: a graph for processors without VNNI is right on all of them."""
    monkeypatch.setenv(VARIABLE, "+vnni" if request.param else "-vnni")
    return request.param


def shared(factory, name, make):
    """The folder `name`, which `make(folder)` fills once for all processes of the test run.

    Nobody changes what is in it; a test that changes it makes a copy.
    """
    import fcntl

    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    complete = folder.with_name(f"{name}.complete")
    with open(folder.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder


def tiny_pipeline(seed=0):
    """A class-conditional pipeline with 30-odd layers and 20 thousand parameters."""
    from diffusers import DDIMScheduler, UNet2DModel

    from trtq.diffusion.class_conditional import ClassConditionalPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 12),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            num_class_embeds=4,
        ).eval()
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    return ClassConditionalPipeline(unet, scheduler, null_class=3)


@pytest.fixture
def tiny():
    return open_pipeline(tiny_pipeline())


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The digits at W4A4 without fine-tuning, four steps."""
    recipe = {"method": "search", "steps": 4, "calibration": {"images": 16}}
    return (
        shared(tmp_path_factory, "digits", lambda f: quantize("digits", recipe, f / "run")) / "run"
    )


@pytest.fixture(scope="session")
def digits_onnx(digits_run, tmp_path_factory):
    # Commands look for the run next to the folder that was made from it.
    out = digits_run.parent / "onnx"
    shared(tmp_path_factory, "digits_onnx", lambda _: export(digits_run, out))
    return out


@pytest.fixture(scope="session")
def inpainting_model(tmp_path_factory):
    """The folder of a tiny inpainting pipeline, which trtq knows through its call only."""
    from tests.calls.inpainting import inpainting

    folder = tmp_path_factory.mktemp("inpainting") / "model"
    inpainting().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inpainting_run(inpainting_model):
    """A run that was recorded inside the pipeline's call."""
    from tests.calls.inpainting import RECIPE, arguments

    folder = inpainting_model.parent / "run"
    quantize(inpainting_model, RECIPE, folder, calls=[arguments()])
    return folder
