"""The command line in any terminal: every text is printed, and no error is a traceback."""

import io
import logging
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from trtq import cli
from trtq.progress import ProgressPrinter
from trtq.terminal import StderrHandler, internal_error, open_streams, sane_environment


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("columns", "kept"),
    [
        *(("0", None), ("1", None), ("19", None), ("-80", None), ("abc", None), ("", None)),
        *(
            ("²", None),
            ("8e1", None),
            ("9" * 30, None),
            ("20", "20"),
            ("80", "80"),
            ("99999", "1000"),
        ),
    ],
)
def test_an_unusable_width_is_dropped(columns, kept):
    variables = sane_environment({"COLUMNS": columns, "LINES": columns, "HOME": "/"})
    assert variables.get("COLUMNS") == kept
    assert variables["HOME"] == "/"


def test_characters_that_an_encoding_lacks_are_written_in_ascii(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    open_streams()
    sys.stdout.write("Fréchet … 3 \u00d7 4 \u2013 図 \ud800")
    sys.stdout.flush()
    assert written.getvalue() == rb"Frechet ... 3 x 4 - \u56f3 \ud800"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed, tmp_path):
    # The next file that is opened must not receive what is printed.
    code = (
        "from trtq.terminal import open_streams; open_streams(); import os, sys;"
        "f = open(sys.argv[1], 'w'); assert f.fileno() > 2; print('x'); sys.stderr.write('x'); f.close()"
    )
    line = f'"$0" -c "$1" "$2" {closed}'
    arguments = ["sh", "-c", line, sys.executable, code, str(tmp_path / "data")]
    assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0
    assert (tmp_path / "data").read_bytes() == b""


def test_the_work_continues_when_its_progress_cannot_be_printed(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    progress = ProgressPrinter(Broken())
    progress("work", 1, 1)
    monkeypatch.setattr(sys, "stderr", None)
    ProgressPrinter()("work", 1, 1)


def test_a_dumb_terminal_gets_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name, escapes in (("dumb", False), ("xterm", True)):
        monkeypatch.setenv("TERM", name)
        stream = Terminal()
        ProgressPrinter(stream)("work", 1, 1)
        assert ("\x1b" in stream.getvalue()) == escapes


ERRORS = {
    "arithmetic": (
        ZeroDivisionError("division\nby zero"),
        "internal error: ZeroDivisionError: division",
    ),
    "bug": (KeyError("steps"), "internal error: KeyError: 'steps'; run with -v"),
    "no message": (AssertionError(), "internal error: AssertionError: no message"),
    "recursion": (RecursionError("maximum"), "internal error: RecursionError: maximum"),
    "memory": (MemoryError(), "error: out of memory (MemoryError"),
    "torch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        "choose fewer images, a smaller batch or a smaller size",
    ),
    "import": (ModuleNotFoundError("No module named 'x'"), "see trtq doctor"),
}


@pytest.mark.parametrize(("error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_an_unexpected_error_is_one_line(error, message, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("trtq.engine.doctor.doctor", fail)
    result = run("doctor")
    message_text = " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert message in message_text
    assert "Traceback" not in message_text
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" in run("doctor", "-v").stderr
    lines = []
    assert internal_error(error, lines.append, verbose=False) == 1
    assert len(lines) == 1
    assert "\n" not in lines[0]


def test_an_error_outside_a_command_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(typer.Typer, "__call__", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["trtq", "doctor"])
    with pytest.raises(SystemExit) as caught:
        cli.app()
    assert caught.value.code == 1


def trtq(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", "from trtq.cli import app; app()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


ODD = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "narrow": {"COLUMNS": "0", "TERM": "dumb"},
    "nonsense": {"COLUMNS": "²", "LINES": "-1", "NO_COLOR": "1"},
    "latin": {"PYTHONIOENCODING": "latin-1", "COLUMNS": "30"},
}


@pytest.mark.parametrize("environment", ODD.values(), ids=ODD.keys())
def test_results_are_shown_in_any_terminal(environment):
    process = trtq("doctor", **environment)
    out, err = process.communicate(timeout=120)
    assert len(out) > 300
    assert b"Error" not in err
    out.decode("latin-1" if environment.get("PYTHONIOENCODING") == "latin-1" else "utf-8")


def test_a_closed_pipe_is_no_error():
    with trtq("doctor", "--json") as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(120) == 141


def test_a_full_disk_behind_stdout_is_reported():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from trtq.cli import app; app()", "doctor"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    text = " ".join(done.stderr.decode().split())
    assert text == "error: cannot write the result to standard output: No space left on device"


NUMBERS = {
    "generate": ("--images", "--steps", "--guidance", "--seed"),
    "quantize": ("--steps", "--seed", "--iterations"),
    "eval": ("--images", "--steps", "--guidance", "--seed"),
    "bench": ("--images", "--turns", "--threads", "--steps", "--guidance", "--seed"),
    "build": ("--workspace",),
    "serve": (
        *("--port", "--threads", "--max-batch", "--queue", "--max-images", "--max-steps"),
        *("--deadline-seconds", "--drain-seconds"),
    ),
    "demo": ("--images", "--iterations", "--seed"),
}
REALS = ("--guidance", "--deadline-seconds", "--drain-seconds")


@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for verb, options in NUMBERS.items() for option in options]
)
def test_every_number_is_bounded(verb, option, tmp_path):
    values = ["-1", "1" + "0" * 30, "x", ""]
    values += ["nan", "inf", "-inf", "1e999"] if option in REALS else ["1" + "0" * 5000, "1.5"]
    more = {"eval": ["--reference", "digits"]}.get(verb, [])
    path = [] if verb == "demo" else ["digits"]
    for value in values:
        result = run(verb, *path, "-o", tmp_path / "x.png", *more, f"{option}={value}")
        if verb == "serve":
            result = run(verb, *path, f"{option}={value}")
        assert result.exit_code == 2, (value, result.output)
        assert option in result.stderr
        assert "Traceback" not in result.stderr
        if value in ("-1", "nan", "inf"):
            assert "is out of range; choose" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


TEXTS = {
    "size": ("export", "--size"),
    "batch": ("export", "--batch-range"),
    "former batch": ("export", "--batch"),
    "budget": ("quantize", "--budget"),
    "bits": ("quantize", "--bits"),
    "lora": ("quantize", "--lora"),
    "quantize size": ("quantize", "--size"),
    "bench batch": ("bench", "--batch-sizes"),
    "gate": ("eval", "--gate"),
    "sizes": ("serve", "--batch-sizes"),
}


@pytest.mark.parametrize(("verb", "option"), TEXTS.values(), ids=TEXTS.keys())
def test_every_text_is_parsed_or_refused(verb, option, tmp_path):
    more = {"eval": ["--reference", "digits"], "quantize": ["--dry-run"]}.get(verb, [])
    place = [] if verb == "serve" else ["-o", tmp_path / "out"]
    for text in (
        "",
        "x",
        "1" * 5000,
        "-1:-1",
        "nan",
        "1_0x1_0",
        "size=nanx",
        "x:nan",
        "x:1e999",
        "fd<=nan",
    ):
        result = run(verb, "digits", *place, *more, f"{option}={text}")
        assert result.exit_code in (1, 2), (text, result.output)
        assert "internal error" not in result.stderr, (text, result.stderr)
        # File names are quoted unabridged by the operating system.
        assert len(result.stderr) < 2000 or option == "--lora", text
    assert list(tmp_path.iterdir()) == []


def test_log_records_go_to_the_current_stderr_and_nowhere_when_it_is_closed(monkeypatch, capsys):
    logger = logging.getLogger("trtq.test_terminal")
    logger.propagate = False
    handler = StderrHandler()
    logger.addHandler(handler)
    first, second = io.StringIO(), io.StringIO()
    for stream in (first, second):
        monkeypatch.setattr("sys.stderr", stream)
        logger.warning("seen")
    second.close()
    logger.warning("not seen")
    logger.removeHandler(handler)
    assert first.getvalue() == "seen\n"
    monkeypatch.undo()
    assert "Logging error" not in capsys.readouterr().err
