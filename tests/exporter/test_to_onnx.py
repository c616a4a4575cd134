"""A program is translated to the same graph whether or not torch decomposes it first."""

import contextlib
from types import SimpleNamespace

import onnx_ir as ir
import pytest
import torch
from torch import nn

from tests.families.pipelines import build
from trtq.diffusion.loading import open_pipeline
from trtq.engine.ort import OrtEngine
from trtq.exporter import to_onnx
from trtq.exporter.trace import trace, trace_module
from trtq.graph.file import save_graph


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


def cast(x, y):
    return (x.to(torch.float64) + y.to(torch.float32).to(torch.float64)).to("cpu", torch.float32)


def on_new_memory(x, y):
    product = x @ y.transpose(1, 2)
    product += torch.min(x, y).sum(2, keepdim=True)
    return product


def masked(x, y):
    return x * (((x > 0) & (y > 0)) | (y < -1))


def asserted(x, y):
    torch._check(x.shape[0] < 100)
    return x.flatten(1) * y.flatten(1)


def on_an_input(x, y):
    x = x.clone()
    x.add_(y)
    return x * y


def on_a_view(x, y):
    total = x + y
    total[:, 0].mul_(y[:, 0])
    return total


def read_before(x, y):
    product = x * y
    flat = product.flatten(1)
    product.add_(y)
    return flat


def of_another_type(x, y):
    product = x.double() * y.double()
    product.add_(y)
    return product.float()


def normed(x, y):
    return nn.functional.rms_norm(x, [4], eps=1e-6) + torch.outer(y[0, 0], y[0, 1]).sum()


def of_mixed_types(x, y):
    """Operands that need casts: of integers and floats, of two floats, of tensors and numbers."""
    counts = (x > 0).sum(2, keepdim=True)
    low = y.half() * 2.5 + torch.arange(3)[:, None]
    return counts * y + low + torch.where(counts > 1, 1, x) / (counts + 1)


PLAIN = {f.__name__: f for f in (cast, on_new_memory, masked, asserted)}
OTHERS = {f.__name__: f for f in (on_an_input, on_a_view, read_before, of_another_type, normed)}


def examples():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, generator=generator) for _ in range(2)]


def computed(function, folder):
    """What onnxruntime computes, for another batch than that of the trace."""
    module, inputs = Function(function), dict(zip("xy", examples(), strict=True))
    model = trace_module(module, inputs, ["out"])
    assert [str(value.shape) for value in model.graph.inputs] == ["[batch,3,4]"] * 2
    save_graph(model, folder)
    larger = {name: torch.cat([value, -value, value]) for name, value in inputs.items()}
    feeds = {name: value.numpy() for name, value in larger.items()}
    given = OrtEngine(folder / "model.onnx").run(feeds)["out"]
    return torch.from_numpy(given), module(*larger.values())


@pytest.fixture
def decomposed(monkeypatch):
    """Whether torch has decomposed the program."""
    seen = SimpleNamespace(plain=None)
    is_plain = to_onnx._is_plain

    def spy(*arguments):
        seen.plain = is_plain(*arguments)
        return seen.plain

    monkeypatch.setattr(to_onnx, "_is_plain", spy)
    return seen


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_a_program_computes_what_torch_computes(name, decomposed, tmp_path):
    given, expected = computed((PLAIN | OTHERS)[name], tmp_path / "graph")
    assert decomposed.plain is (name in PLAIN)
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


def test_a_torch_with_another_registry_is_used_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(to_onnx, "_registry", lambda: None)
    given, expected = computed(cast, tmp_path / "graph")
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


def test_the_registry_is_torchs_own_again_after_an_export(tmp_path):
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = vars(ONNXRegistry)["from_torchlib"]
    computed(cast, tmp_path / "graph")
    assert vars(ONNXRegistry)["from_torchlib"] is before
    assert to_onnx._registry() is to_onnx._registry()


@pytest.mark.parametrize("function", [cast, of_another_type, of_mixed_types, normed])
def test_casts_are_inserted_as_if_torch_had_computed_the_values(function, monkeypatch):
    texts = []
    for values in (to_onnx._known_values, contextlib.nullcontext):
        monkeypatch.setattr(to_onnx, "_known_values", values)
        inputs = dict(zip("xy", examples(), strict=True))
        model = trace_module(Function(function), inputs, ["out"])
        texts.append(ir.serde.serialize_model(model).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]


def test_the_pass_of_casts_is_torchs_own_again_after_an_export(tmp_path):
    from torch.onnx._internal.fx.passes import type_promotion

    before = vars(type_promotion._TypePromotionInterpreter)["run_node"]
    computed(cast, tmp_path / "graph")
    assert vars(type_promotion._TypePromotionInterpreter)["run_node"] is before


def test_a_float_transformer_is_plain(decomposed):
    """Its code compares the batch size with 1, which the trace turns into an assertion."""
    source = open_pipeline(build("sd_3"))
    generator = torch.Generator().manual_seed(0)
    conditions = source.draw_conditions(2, generator)
    trace(source.denoiser, torch.zeros(2, *source.sample_shape), conditions, set())
    assert decomposed.plain


@pytest.mark.parametrize("cell", [1, 2])
@pytest.mark.parametrize("plain", [True, False])
def test_free_axes_have_names(cell, plain, monkeypatch):
    if not plain:
        monkeypatch.setattr(to_onnx, "_is_plain", lambda *_: False)
    inputs = {"x": torch.ones(2, 3, 8, 8), "y": torch.ones(1, 5)}
    module = Function(lambda x, y: (nn.functional.avg_pool2d(x, cell) * y.sum(), x + 1))
    model = trace_module(module, inputs, ["half", "same"], shared=["y"], images={"x": cell})
    shapes = {v.name: str(v.shape) for v in [*model.graph.inputs, *model.graph.outputs]}
    assert shapes["x"] == shapes["same"] == "[batch,3,height,width]"
    assert shapes["y"] == "[1,5]"
