"""Weights in the kernel's layout."""

import numpy as np
import pytest

from trtq.errors import ArtefactError, QuantizationError
from trtq.plugins.low_bit import pack, reference
from trtq.plugins.spec import Geometry
from trtq.selftest.layers import draw


def test_eight_channels_share_four_bytes_as_documented():
    codes = np.zeros((1, 32), np.uint8)
    codes[0, :8] = range(1, 9)
    packed = pack.pack_nibbles(codes, np.zeros(1, int))
    assert packed.view(np.uint8).reshape(-1)[:5].tolist() == [0x51, 0x62, 0x73, 0x84, 0]


@pytest.mark.parametrize("shape", [(3, 1), (5, 32), (2, 33), (4, 7, 3, 2), (1, 64, 1, 1)])
def test_unpacking_inverts_packing(shape):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, shape, np.uint8)
    packed = pack.pack_nibbles(codes, rng.integers(0, 16, shape[0]))
    assert np.array_equal(pack.unpack_nibbles(packed, shape[1]).reshape(shape), codes)
    assert packed.nbytes == shape[0] * np.prod(shape[2:], dtype=int) * -(-shape[1] // 32) * 16
    integers = rng.integers(-128, 128, shape, np.int8)
    again = pack.unpack_bytes(pack.pack_bytes(integers), shape[1])
    assert np.array_equal(again.reshape(shape), integers)


def test_padding_is_the_code_of_zero():
    packed = pack.pack_nibbles(np.full((2, 3), 1, np.uint8), np.array([4, 15]))
    assert pack.unpack_nibbles(packed, 32)[:, 3:].reshape(2, -1).tolist() == [[4] * 29, [15] * 29]


def test_operands_that_do_not_fit_are_named():
    codes, zero_point = np.full((1, 2), 16, np.uint8), np.zeros(1, int)
    with pytest.raises(QuantizationError, match=r"codes span 16 \.\. 16; nibbles hold 0 \.\. 15"):
        pack.pack_nibbles(codes, zero_point)
    with pytest.raises(QuantizationError, match=r"zero points span -1"):
        pack.pack_nibbles(codes - 1, zero_point - 1)
    with pytest.raises(ArtefactError, match="32 channels cannot hold 33"):
        pack.unpack_nibbles(pack.pack_nibbles(codes - 1, zero_point), 33)


def test_weights_with_zero_points_beyond_a_nibble_are_stored_in_bytes():
    assert pack.storage_bits(4, np.array([0, 15])) == 4
    assert pack.storage_bits(4, np.array([0, 16])) == 8
    assert pack.storage_bits(3, np.array([-1, 2])) == 8
    assert pack.storage_bits(5, np.array([0])) == 8


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(),
        Geometry((3, 3), padding=(1, 1)),
        Geometry((2, 3), (1, 2), (0, 2), (2, 1)),
        Geometry((3, 1), padding=(1, 0), groups=4),
    ],
)
def test_the_reference_equals_a_deployed_layer_of_torch(geometry):
    import torch

    from trtq.quant.deployed import DeployedLayer
    from trtq.quant.geometry import ConvGeometry
    from trtq.quant.packing import PackedWeight
    from trtq.quant.tensors import ActivationTensors, LayerTensors

    case = draw(3, geometry=geometry, half=False)
    columns = (-1, 1, 1, 1)
    weight = PackedWeight.of(
        torch.from_numpy(case.codes),
        torch.from_numpy(case.scale).reshape(columns),
        torch.from_numpy(case.zero_point).float().reshape(columns),
        4,
    )
    scale, inverse, low, high = map(torch.from_numpy, case.tables)
    activation = ActivationTensors(scale, inverse, low.int(), high.int(), 4)
    g = geometry
    layer = DeployedLayer(
        LayerTensors(weight, activation, torch.from_numpy(case.bias)),
        ConvGeometry(g.stride, g.padding, g.dilation, g.groups),
    )
    actual = layer(torch.from_numpy(case.x), torch.from_numpy(case.step))
    wanted = reference.low_bit(case.x, case.integers, case.terms, case.tables, case.step, geometry)
    assert np.array_equal(actual.numpy(), wanted)
