"""The public face: `dir`, `help`, signatures and docstrings of trtq; imports only at first use."""

import inspect
import pkgutil
import pydoc
import subprocess
import sys
import types
from pathlib import Path

import pytest

import trtq
import trtq.errors

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = [
    "benchmark",
    "build",
    "compare",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "quantize",
    "verify",
]
PUBLIC = [
    "ArtefactError",
    "BuildError",
    "CancelledError",
    "GateError",
    "IntegrityError",
    "KernelError",
    "LegalityError",
    "MeasurementError",
    "MissingDependencyError",
    "NonFiniteError",
    "QuantizationError",
    "Recipe",
    "RecipeError",
    "ServerError",
    "StepError",
    "TrtqError",
    "UsageError",
    "__version__",
    *FUNCTIONS,
]
PARAMETERS = {
    "quantize": "recipe out loras resume overwrite progress",
    "export": "out target precision batch size overwrite progress",
    "build": "out backend architectures batch refit overwrite progress",
    "load": "provider",
    "generate": "out images steps guidance seed provider overwrite progress",
    "evaluate": "reference images steps seed gates progress",
    "benchmark": "providers batches steps seed progress",
    "verify": "runtimes layers timeout progress",
    "compare": "provider layers bisect results script overwrite progress",
}


def test_the_public_names_are_these():
    assert dir(trtq) == sorted(trtq.__all__) == PUBLIC


def test_every_exception_is_public():
    tree = {
        name
        for name, value in vars(trtq.errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert tree == set(trtq.errors.__all__) == {n for n in PUBLIC if n.endswith("Error")}
    for name in tree:
        assert getattr(trtq, name) is getattr(trtq.errors, name)
        assert f" {name} " in (trtq.errors.__doc__ or "").replace("\n", " ")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trtq' has no attribute 'quantise'"):
        _ = trtq.quantise


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_its_signature_and_docstring(name):
    function = getattr(trtq, name)
    assert isinstance(function, types.FunctionType)
    assert function.__name__ == name
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    parameters = inspect.signature(function).parameters
    assert set(PARAMETERS.get(name, "").split()) <= set(parameters)
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert len((function.__doc__ or "").splitlines()[0]) > 10


@pytest.mark.parametrize("name", [name for name in PUBLIC if name[0].isupper()])
def test_a_public_class_has_a_docstring(name):
    assert getattr(trtq, name).__doc__.strip()


def test_help_lists_every_name_with_its_first_line():
    text = pydoc.plain(pydoc.render_doc(trtq))
    functions = text[text.index("\nFUNCTIONS\n") :]
    for name in FUNCTIONS:
        assert f"\n    {name}(" in functions
        assert getattr(trtq, name).__doc__.splitlines()[0] in functions
    for name in PUBLIC:
        assert name.startswith("_") or f"class {name}(" in text or name in FUNCTIONS


def test_no_module_shadows_a_public_name():
    modules = {module.name for module in pkgutil.iter_modules(trtq.__path__)}
    assert modules & set(PUBLIC) == set()


def test_names_are_functions_before_and_after_their_modules_are_imported():
    probe = f"""
import sys, types, trtq
names = {FUNCTIONS}
assert not {{"torch", "onnx", "pydantic", "trtq.exporter"}} & set(sys.modules)
dir(trtq)
assert "torch" not in sys.modules
before = [getattr(trtq, name) for name in names]
import trtq.bench, trtq.engine.doctor, trtq.evaluation, trtq.exporter.build, trtq.exporter.export
import trtq.exporter.trace, trtq.exporter.verify, trtq.pipelines.generate, trtq.pipelines.inspect
import trtq.pipelines.open, trtq.runs.quantize, trtq.serve
assert [getattr(trtq, name) for name in names] == before
print(*{{type(value) is types.FunctionType for value in before}})
"""
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True"]


def test_type_checkers_see_what_is_imported():
    source = (ROOT / "trtq" / "__init__.py").read_text(encoding="utf-8")
    block = source[source.index("if TYPE_CHECKING:") : source.index("_MODULES = ")]
    namespace: dict[str, object] = {"TYPE_CHECKING": True}
    exec(block, namespace)
    for name in PUBLIC:
        assert name == "__version__" or namespace[name] is getattr(trtq, name)
