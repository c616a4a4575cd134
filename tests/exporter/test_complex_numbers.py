"""Rotary embeddings in complex numbers become real graphs that compute the same."""

import pytest
import torch
from torch import nn

from tests.exporter.recorded import Form, in_onnxruntime, in_torch
from trtq.errors import LegalityError
from trtq.exporter.trace_call import trace_call
from trtq.graph.passes import DecomposeTimestepEmbedding
from trtq.snr import snr_db


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rotary(nn.Module):
    """Rotates pairs of channels by a table that is a constant, or computed by polar."""

    def __init__(self, *, constant):
        super().__init__()
        self.constant = constant
        self.table = self.angles(torch.arange(64))

    @staticmethod
    def angles(positions):
        angle = positions.double()[:, None] / 10 ** torch.arange(4).double()
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)

    def forward(self, x, positions):
        # As Qwen-Image (a slice of a symbolic length) and Z-Image (rows by index, padded).
        table = self.table if self.constant else self.angles(torch.arange(64))
        halves = table.split([1, 3], dim=1)
        table = torch.cat([halves[0][: x.shape[1]], halves[1][positions]], dim=-1)
        table = torch.nn.functional.pad(table, (0, 0, 0, 2))[:-2]
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        with torch.autocast("cuda", enabled=False):
            rotated = pairs * table.unsqueeze(0)
        return torch.view_as_real(rotated).flatten(2)


def rotary_form(tokens):
    return Form(x=values(2, tokens, 8), positions=torch.arange(tokens).flip(0))


@pytest.mark.parametrize("constant", [True, False])
def test_a_rotation_of_a_free_length_equals_torch(constant):
    form = rotary_form(5)
    free = {"x": [1], "positions": [0]}
    traced = trace_call(Rotary(constant=constant), form, form.tensors, set(), free=free)
    assert traced.free == {"x": (1,), "positions": (0,)}
    DecomposeTimestepEmbedding()(traced.model)
    for tokens in (5, 9):
        other = rotary_form(tokens)
        result = in_onnxruntime(traced.model, other)[0]
        expected = in_torch(Rotary(constant=constant), other)[0]
        # torch's kernel rounds after each product and sum, in the order of the graph.
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


class Arithmetic(nn.Module):
    def forward(self, x):
        z = torch.view_as_complex(x)
        y = (z * 2 + z.conj() - z * (1 + 2j)) / 4
        y = torch.stack([y, -y], dim=-1).permute(2, 0, 1)[:, 1:].expand(2, -1, 3)
        return torch.view_as_real(y), y.real, z.imag


def test_sums_products_with_numbers_and_moves_equal_torch():
    form = Form(x=values(4, 3, 2))
    traced = trace_call(Arithmetic(), form, form.tensors, set())
    results = in_onnxruntime(traced.model, form)
    for result, expected in zip(results, in_torch(Arithmetic(), form), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.view_as_real(torch.view_as_complex(x).cumsum(0))


def test_an_operator_without_a_real_form_is_named():
    form = Form(x=values(4, 2))
    with pytest.raises(LegalityError, match=r"aten\.cumsum\.default has complex operands"):
        trace_call(Spectrum(), form, form.tensors, set())


class Passed(nn.Module):
    def forward(self, x, table):
        return torch.view_as_real(torch.view_as_complex(x) * table)


def test_a_complex_input_is_refused():
    form = Form(x=values(4, 2), table=torch.ones(4, dtype=torch.complex64))
    with pytest.raises(LegalityError, match="is complex, and ONNX has no complex type"):
        trace_call(Passed(), form, form.tensors, set())


def randomised(model):
    """The model with small random parameters, also where diffusers leaves them uninitialised."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.1)
    return model.eval()


def qwen_image():
    """Qwen-Image's tables are constants, sliced by the sizes of images and the text's length."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )

    def form(words, rows=1):
        return Form(
            hidden_states=values(rows, 16, 16),
            encoder_hidden_states=values(rows, words, 16, seed=1),
            encoder_hidden_states_mask=torch.ones(rows, words, dtype=torch.int64),
            timestep=torch.full((rows,), 0.5),
            img_shapes=[[(1, 4, 4)]] * rows,
        )

    return randomised(model), form(6), form(6)


def z_image():
    """Z-Image reads rows of its tables by position; its inputs are lists."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )

    def form(words):
        return Form(
            x=[values(4, 1, 8, 8)], t=torch.tensor([0.5]), cap_feats=[values(words, 16, seed=1)]
        )

    return randomised(model), form(6), form(9)


@pytest.mark.slow
@pytest.mark.parametrize("case", [qwen_image, z_image])
def test_true_transformers_with_complex_tables_equal_torch(case):
    model, form, longer = case()
    references = [in_torch(model, each) for each in (form, longer)]
    free = {
        name: [
            axis
            for axis, size in enumerate(tensor.shape)
            if size != longer.tensors[name].shape[axis]
        ]
        for name, tensor in form.tensors.items()
    }
    traced = trace_call(model, form, form.tensors, set(), free=free)
    DecomposeTimestepEmbedding()(traced.model)
    assert traced.free == {name: tuple(axes) for name, axes in free.items()}
    for each, expected in zip((form, longer), references, strict=True):
        results = in_onnxruntime(traced.model, each)
        for result, reference in zip(results, expected, strict=True):
            assert snr_db(reference, result) > 100
