"""The parts of `tensorrt.plugin` that our definitions use; sizes are integers."""

import copy

import numpy as np

described: dict = {}
implemented: dict = {}


class TensorDesc:
    def __init__(self, shape, dtype):
        self.shape_expr, self.dtype = list(shape), dtype

    def like(self):
        return copy.deepcopy(self)


class KernelLaunchParams:
    grid_x = grid_y = grid_z = block_x = 1
    shared_mem = 0


def SymIntExprs(length):
    return [None] * length


SymInt32 = int


def register(name):
    return lambda function: described.setdefault(name, function)


def aot_impl(name):
    return lambda function: implemented.setdefault(name, function)


def launch_of(name):
    """Kernel, code and launch of a linear layer of 256 outputs, which uses the larger tile."""
    from trtq.plugins.low_bit.attributes import fields_of
    from trtq.plugins.spec import LayerSpec

    fields = fields_of(LayerSpec(64, 256, 4, 4, 8)).values()
    tensors = [TensorDesc((2, 77, 64), "half"), *[TensorDesc((1,), "float")] * 4]
    values = [*tensors, *(np.array(field, np.int32) for field in fields)]
    out = described[name](*values)
    kernel, code, launch, _ = implemented[name](*values, (out,), 0)
    return kernel, code, launch
