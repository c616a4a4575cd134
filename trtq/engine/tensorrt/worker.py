"""The builder's process: `main` reads a job's file and writes the answer's file."""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from trtq.child import write_answer
from trtq.engine.tensorrt.backends import CURRENT
from trtq.engine.tensorrt.job import NEEDS_PYTHON, Answer, Job, PluginForm, Profile
from trtq.engine.tensorrt.log import collecting_logger
from trtq.engine.tensorrt.precisions import engine_precisions, network_precisions, shortfall
from trtq.errors import KernelError, MissingDependencyError
from trtq.plugins.compile import nvrtc_version, ptx
from trtq.plugins.device import Gpu, current_device
from trtq.plugins.driver import driver_cuda, old_driver
from trtq.plugins.fused.tensorrt import register
from trtq.plugins.low_bit.registry import take_failures
from trtq.plugins.low_bit.tensorrt_aot import register_all
from trtq.resources import peak_rss_bytes

__all__ = ["build"]

_NODE = re.compile(r"\b(?:node|layer|Node)[^\[\"']*[\[\"'](?P<name>[^\]\"']+)[\]\"']")


class _BuildError(Exception):
    def __init__(self, message: str, layer: str | None = None) -> None:
        super().__init__(message)
        self.layer = layer


def build(job: Job) -> Answer:
    """Parse the graph, build the engine and write it. Errors of the builder are part of the answer."""
    trt = importlib.import_module(job.module)
    errors: list[str] = []
    warnings: list[str] = []
    logger = collecting_logger(trt, errors, warnings)
    form, why = _register_plugins(trt)
    start = time.perf_counter()
    try:
        if CURRENT in job.architectures and driver_cuda() is None:
            raise _BuildError(
                "building for the GPU of this machine needs one, and there is no NVIDIA driver on this "
                "machine; TensorRT-RTX builds for other GPUs: --backend tensorrt-rtx --arch sm89"
            )
        builder = _builder(trt, logger, errors)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        start = time.perf_counter()
        _parse(trt, network, logger, job.graph, errors)
        parsed = time.perf_counter()
        config = _configure(trt, builder, network, job)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            messages = [*take_failures(), *errors]
            raise _BuildError("; ".join(messages) or "the builder gave no reason", _named(errors))
    except _BuildError as err:
        return Answer(
            error=str(err), layer=err.layer, warnings=warnings, peak_rss_bytes=peak_rss_bytes()
        )
    plugins = _has_plugins(trt, network)
    if plugins and why is not None:
        warnings.append(f"{NEEDS_PYTHON}: {why}")
    network_has = network_precisions(trt, network)
    engine_has = _inspected(trt, logger, plan) if job.plan and CURRENT in job.architectures else {}
    with job.engine.open("wb") as file:
        file.write(plan)
    return Answer(
        precisions=dict(Counter(network_has.get(name, "missing") for name in job.plan)),
        inspected=sum(name in engine_has for name in job.plan),
        shortfall=shortfall(job.plan, network_has, engine_has),
        layers=network.num_layers,
        parse_seconds=parsed - start,
        build_seconds=time.perf_counter() - parsed,
        peak_rss_bytes=peak_rss_bytes(),
        warnings=warnings,
        plugins=form if plugins else None,
    )


def _inspected(trt: Any, logger: Any, plan: Any) -> dict[str, str]:
    """The precision of layers in the built engine, if it can be loaded here."""
    try:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        rows = json.loads(text).get("Layers", [])
    except Exception:  # The bindings' exceptions share no base; the engine itself is built.
        return {}
    return engine_precisions(row for row in rows if isinstance(row, dict))


def _register_plugins(trt: Any) -> tuple[PluginForm, str | None]:
    """Register plugins whose kernels become part of the engine, if possible; else plugins in Python.

    Only full TensorRT supports kernels in the engine, which then needs no Python to run.

    Returns:
        The form of the plugins, and the reason why kernels cannot be in the engine although the builder
        supports that.
    """
    try:
        plugin = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError:  # TensorRT-RTX has no such module, and needs no GPU to build.
        register(trt)
        return "python", None
    try:
        # A fresh process has no CUDA context yet; TensorRT uses the GPU's primary context, too.
        Gpu()
        device = current_device()
        nvrtc_version()
    except (KernelError, MissingDependencyError) as err:
        register(trt)
        return "python", str(err)
    register_all(trt, plugin, lambda variant: ptx(variant, device.architecture))
    return "engine", None


def _builder(trt: Any, logger: Any, errors: list[str]) -> Any:
    try:
        return trt.Builder(logger)
    except Exception as err:  # The bindings' exceptions share no base; usually a driver is missing.
        why = "; ".join(errors) or str(err)
        raise _BuildError(
            f"the builder cannot start on this machine: {old_driver() or why}"
        ) from err


def _has_plugins(trt: Any, network: Any) -> bool:
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    return trt.LayerType.PLUGIN_V3 in kinds


def _parse(trt: Any, network: Any, logger: Any, graph: Path, errors: list[str]) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    messages = take_failures()
    if not parser.num_errors:
        messages += errors
        raise _BuildError("; ".join(messages) or "the graph cannot be parsed", _named(errors))
    first = parser.get_error(0)
    messages.append(f"{first.node_operator()}: {first.desc()}")
    raise _BuildError("; ".join(messages), first.node_name() or None)


def _named(errors: list[str]) -> str | None:
    """The layer that an error message names; None if it names no layer."""
    for message in errors:
        match = _NODE.search(message)
        if match is not None:
            return match["name"]
    return None


def _configure(trt: Any, builder: Any, network: Any, job: Job) -> Any:
    config = builder.create_builder_config()
    # Full TensorRT builds for the GPU of this machine only.
    if job.architectures != [CURRENT] or hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(job.architectures)
        for index, name in enumerate(job.architectures):
            capability = getattr(trt.ComputeCapability, name.upper(), None)
            if capability is None or not config.set_compute_capability(capability, index):
                raise _BuildError(f"this version of {job.module} cannot build for {name}")
    if CURRENT in job.architectures and hasattr(trt, "ProfilingVerbosity"):
        # The inspector then shows the types of each kernel's inputs.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for wanted, flag in (
        (job.weight_streaming, "WEIGHT_STREAMING"),
        (job.refit, "REFIT"),
    ):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    free = {
        network.get_input(index).name
        for index in range(network.num_inputs)
        if -1 in tuple(network.get_input(index).shape)
    }
    for shapes in job.profiles:
        config.add_optimization_profile(_profile(builder, shapes, free))
    return config


def _profile(builder: Any, shapes: Profile, free: set[str]) -> Any:
    profile = builder.create_optimization_profile()
    missing = free - set(shapes)
    if missing:
        raise _BuildError(f"no range is known for the input {sorted(missing)[0]!r}")
    for name in free:
        profile.set_shape(name, *(tuple(shape) for shape in shapes[name]))
    return profile


def main() -> int:
    """Read the job and write the answer; exit code 0 if the engine was built."""
    job_file, answer_file = (Path(argument) for argument in sys.argv[1:3])
    answer = build(Job.model_validate_json(job_file.read_text(encoding="utf-8")))
    write_answer(answer_file, answer.model_dump(mode="json"))
    return 0 if answer.error is None else 1
