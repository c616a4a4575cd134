"""The parts of full TensorRT that our builder uses, with one network of one plugin.

A build treats the kernel of an ahead-of-time plugin like TensorRT: it loads the kernel through the
driver and starts it without a request for more shared memory.
"""

import ctypes

TRUE_PLUGIN = "trtq::LowBitLinear"


class _Base:
    def __init__(self, *_):
        pass


class ILogger(_Base):
    ERROR, WARNING = 1, 2


class IPluginV3(_Base):
    pass


class IPluginV3OneCore(_Base):
    pass


class IPluginV3OneBuild(_Base):
    pass


class IPluginV3OneRuntime(_Base):
    pass


class IPluginCreatorV3One(_Base):
    pass


class DataType:
    HALF, FLOAT = "half", "float"


class PluginFieldType:
    INT32 = 4


class LayerType:
    PLUGIN_V3 = "plugin"


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1


class MemoryPoolType:
    WORKSPACE = 0


PluginField = _Base
PluginFieldCollection = list
created: dict = {}


class _Registry:
    def get_creator(self, name, version, namespace):
        return created.get(name)

    def register_creator(self, creator, namespace):
        created[creator.name] = creator
        return True


def get_plugin_registry():
    return _Registry()


class _Layer:
    type, name = LayerType.PLUGIN_V3, "a plugin"
    num_inputs = num_outputs = 0


class _Network:
    num_layers, num_inputs = 1, 0

    def get_layer(self, index):
        return _Layer()


class OnnxParser:
    def __init__(self, network, logger):
        pass

    def parse_from_file(self, path):
        return True


class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return _Network()

    def create_builder_config(self):
        return _Base()

    def create_optimization_profile(self):
        return _Base()

    def build_serialized_network(self, network, config):
        from tensorrt import plugin

        if not plugin.implemented:
            return b"an engine that needs Python"
        try:
            return _start(*plugin.launch_of(TRUE_PLUGIN))
        except RuntimeError as err:
            self.logger.log(ILogger.ERROR, str(err))
            return None


def _start(name, code, launch):
    cuda = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    nothing = (ctypes.c_void_p * 1)()
    sizes = (launch.grid_x, launch.grid_y, launch.grid_z, launch.block_x, 1, 1, launch.shared_mem)
    for what, status in (
        ("cuModuleLoadData", lambda: cuda.cuModuleLoadData(ctypes.byref(module), code)),
        (
            "cuModuleGetFunction",
            lambda: cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
        ),
        ("cuLaunchKernel", lambda: cuda.cuLaunchKernel(function, *sizes, None, nothing, None)),
    ):
        result = status()
        if result:
            raise RuntimeError(f"{what} failed with {result}")
    return b"an engine with its kernels inside"
