"""A fake of TensorRT-RTX and of the GPU's memory."""

import contextlib
import ctypes
import threading
from types import SimpleNamespace

import numpy as np

from trtq.errors import KernelError
from trtq.plugins.low_bit.registry import recording_failures


class Memory:
    """A fake of the GPU's memory, on the host."""

    stream = 5

    def __init__(self):
        self.areas = {}
        self.freed = []

    def enter(self):
        self.entered = threading.get_ident()

    def allocate(self, size):
        area = ctypes.create_string_buffer(size)
        self.areas[ctypes.addressof(area)] = area
        return ctypes.addressof(area)

    def free(self, address):
        self.freed.append(address)

    def upload(self, address, host):
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def download(self, host, address):
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def wait(self):
        pass


def fake_module(loads=True, works=True, starts=True, streamable=0, automatic=0, raises=None):
    """A fake module whose only engine adds one to x[batch, 3], for 1 to 4 items."""

    kept = {"cache": b""}

    def fail(self):
        raise KernelError(raises)

    class Cache:
        restored = None

        def serialize(self):
            return kept["cache"]

        def deserialize(self, content):
            Cache.restored = content

    class Config:
        cuda_graph_strategy = None

        def create_runtime_cache(self):
            return Cache()

        def set_runtime_cache(self, cache):
            pass

    class Context:
        def __init__(self):
            self.addresses = {}

        def set_input_shape(self, name, shape):
            self.shape = shape
            return len(shape) == 2 and 1 <= shape[0] <= 4 and shape[1] == 3

        def get_tensor_shape(self, name):
            return self.shape

        def set_tensor_address(self, name, address):
            self.addresses[name] = address

        def execute_async_v3(self, stream):
            assert stream == Memory.stream
            if raises is not None:  # Like an error in a Python plugin, which TensorRT only prints.
                with contextlib.suppress(KernelError):
                    recording_failures(fail)(SimpleNamespace(plugin_name="LowBitLinear"))
                return False
            kept["cache"] = f"kernels of {self.shape[0]}".encode()
            count = int(np.prod(self.shape))
            x, y = (
                np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name]))
                for name in "xy"
            )
            y[:] = x + 1
            return works

    class Engine:
        num_io_tensors = 2
        config = None
        streamable_weights_size = streamable
        weight_streaming_budget_v2 = streamable

        def get_weight_streaming_automatic_budget(self):
            return automatic

        def get_tensor_name(self, index):
            return "xy"[index]

        def get_tensor_shape(self, name):
            return (-1, 3)

        def get_tensor_dtype(self, name):
            return "float"

        def get_tensor_mode(self, name):
            return {"x": "in", "y": "out"}[name]

        def get_tensor_profile_shape(self, name, index):
            return (1, 3), (2, 3), (4, 3)

        def create_runtime_config(self):
            Engine.config = Config()
            return Engine.config

        def create_execution_context(self, config):
            Engine.budget_of_context = self.weight_streaming_budget_v2
            return Context()

        def create_engine_inspector(self):
            return Inspector()

    class Inspector:
        def get_engine_information(self, form):
            return {"json": '{"Layers": ["first", {"Name": "second", "Precision": "INT8"}]}'}[form]

    class Logger:
        ERROR = 1

        def __init__(self):
            pass

    class Runtime:
        def __init__(self, logger):
            self.logger = logger
            if not starts:
                logger.log(0, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, content):
            if not loads:
                self.logger.log(0, "Version tag does not match")
            return Engine() if loads else None

    class Module:
        ILogger = Logger
        TensorIOMode = type("TensorIOMode", (), {"INPUT": "in"})
        LayerInformationFormat = type("LayerInformationFormat", (), {"JSON": "json"})
        CudaGraphStrategy = type("CudaGraphStrategy", (), {"WHOLE_GRAPH_CAPTURE": "whole"})

        @staticmethod
        def nptype(_):
            return np.float32

    Module.Runtime, Module.engine, Module.cache = Runtime, Engine, Cache
    return Module
