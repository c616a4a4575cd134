"""Check that the runtime opens an artefact's graphs, and that the pipeline can call them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtq.artefact.manifest import Manifest
from trtq.artefact.options import EngineOptions
from trtq.engine.base import Engine, TensorSpec
from trtq.engine.profile import axis_ranges
from trtq.engine.tensorrt.run import obstacle, open_tensorrt
from trtq.engine.trial import TRIAL_SECONDS, Trial, try_graph
from trtq.errors import ArtefactError, TrtqError
from trtq.graph.file import ENGINE_FILE, MODEL_FILE, graphs_of
from trtq.graph.runtimes.prepare import external_files, load_graph
from trtq.pipelines.open import engine_source
from trtq.progress import ProgressCallback, silent
from trtq.runs.folder import check_calibrated
from trtq.seeds import seeded_generator

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["check_engines", "check_graphs", "refuse_damaged", "refuse_problems", "require_graphs"]

_RTX_MAGIC = b"vtrt"
_MAX_LINE = 400


def check_graphs(
    folder: Path,
    manifest: Manifest,
    *,
    provider: str = "cpu",
    seconds: float = TRIAL_SECONDS,
    progress: ProgressCallback = silent,
) -> dict[str, str | None]:
    """Open every graph of an ONNX folder in onnxruntime and call it once, at its smallest sizes.

    Each graph runs in a separate process. Then the pipeline is assembled from stand-ins with the
    reported inputs and outputs, and calls its denoiser; nothing is computed.

    Args:
        folder: the ONNX folder.
        manifest: verified manifest of the folder.
        provider: `cpu` or `openvino`.
        seconds: time limit for one graph, in seconds.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        Problem of each graph, in one line, by name of the graph; None for a graph without a problem.

    Raises:
        UsageError: onnxruntime or the provider is not installed.
    """
    # A graph that the manifest does not list is ignored, since no loader would open it.
    names = sorted({manifest.denoiser, *graphs_of(manifest)})
    problems: dict[str, str | None] = {}
    trials: dict[str, Trial] = {}
    for index, name in enumerate(names):
        progress("open in the runtime", index, len(names))
        try:
            sizes = _smallest(folder, name, manifest)
        except (
            TrtqError
        ) as err:  # A missing or wrong file; the runtime's message would be less clear.
            problems[name] = _line(err)
            continue
        trials[name] = try_graph(folder / name / MODEL_FILE, sizes, provider, seconds)
        problems[name] = trials[name].problem
    progress("open in the runtime", len(names), len(names))
    if not any(problems.values()):
        problems[manifest.denoiser] = _why_not_called(folder, manifest, trials)
    return problems


def require_graphs(
    folder: Path,
    manifest: Manifest,
    progress: ProgressCallback = silent,
    *,
    seconds: float = TRIAL_SECONDS,
) -> None:
    """Raise unless the runtime can open and call every graph of an ONNX folder.

    The arguments are those of `check_graphs`.

    Raises:
        ArtefactError: the runtime cannot open or call a graph.
    """
    refuse_problems(folder, check_graphs(folder, manifest, seconds=seconds, progress=progress))


def refuse_problems(folder: Path, problems: Mapping[str, str | None]) -> None:
    """Raise for the first graph with a problem.

    Args:
        folder: the ONNX folder.
        problems: result of `check_graphs`.

    Raises:
        ArtefactError: a graph has a problem.
    """
    for name, problem in problems.items():
        if problem is not None:
            raise ArtefactError(
                f"{folder / name / MODEL_FILE} cannot be used: {problem}; export the "
                f"model again, or see trtq verify {folder}"
            )


def check_engines(folder: Path, manifest: Manifest) -> dict[str, str | None]:
    """Check the header of each engine's file, and open the engine if there is a GPU.

    Returns:
        Problem of each engine, in one line, by component; None for an engine without a problem.
    """
    backend = _backend(manifest)
    files = [folder / name / ENGINE_FILE for name in graphs_of(manifest, ENGINE_FILE)]
    problems: dict[str, str | None] = {file.parent.name: _damage(file, backend) for file in files}
    if manifest.denoiser not in problems:
        problems[manifest.denoiser] = f"there is no {ENGINE_FILE} of it"
    if backend not in ("tensorrt-rtx", "tensorrt"):
        return dict.fromkeys(problems, f"the manifest names the unknown backend {backend[:40]!r}")
    if any(problems.values()) or obstacle(backend) is not None:
        return problems
    for file in files:
        try:
            open_tensorrt(file, backend)
        except TrtqError as err:
            problems[file.parent.name] = _line(err)
    return problems


def _backend(manifest: Manifest) -> str:
    options = manifest.options
    return str(options.backend) if isinstance(options, EngineOptions) else "none"


def _damage(file: Path, backend: str) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(24)
    if not any(head):
        return "its file is empty"
    if backend != "tensorrt-rtx":
        return None
    if head[:4] != _RTX_MAGIC:
        return "its file is no engine of TensorRT-RTX"
    if int.from_bytes(head[16:24], "little") != size:
        return f"its file has {size} bytes, but its head gives another size: it was cut"
    return None


def _smallest(folder: Path, name: str, manifest: Manifest) -> dict[str, int]:
    """Smallest length of every free axis of a graph, by name of the axis.

    Raises:
        TrtqError: neither the graph nor the folder gives the length of an axis.
    """
    model = load_graph(folder / name / MODEL_FILE)
    try:
        refuse_damaged(model, name, manifest)
        ranges = axis_ranges(folder, name, manifest, model, None)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as err:
        if isinstance(err, TrtqError):
            raise
        raise ArtefactError(
            f"its sizes cannot be read: {type(err).__name__}: {_line(err)}"
        ) from err
    return {axis: minimum for axis, (minimum, _, _) in ranges.items()}


def refuse_damaged(model: ir.Model, name: str, manifest: Manifest) -> None:
    """Raise if a graph takes weights from a file that is not listed, or holds NaN.

    Args:
        model: the graph.
        name: name of the graph's folder.
        manifest: manifest of the ONNX folder.

    Raises:
        ArtefactError: the graph is damaged.
    """
    foreign = sorted({f"{name}/{file}" for file in external_files(model)} - set(manifest.files))
    if foreign:
        raise ArtefactError(f"it takes weights from {foreign[0]}, which the manifest does not list")
    _check_numbers(model)


def _check_numbers(model: ir.Model) -> None:
    """Raise if a weight or table holds NaN, which casts and rounding silently turn into a number.

    Raises:
        ArtefactError: a tensor holds NaN.
    """
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            if bool(np.isnan(tensor.numpy().astype(np.float32, copy=False)).any()):
                raise ArtefactError(f"its tensor {name[:100]!r} holds NaN")


class _Dummy(Engine):
    """Stand-in for a graph, with the same inputs and outputs, that returns ones."""

    def __init__(self, trial: Trial) -> None:
        super().__init__("none", trial.inputs, trial.outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        axes: dict[str, int] = {}
        for name, spec in self.inputs.items():
            if name not in feeds:
                raise ArtefactError(f"the pipeline does not give its input {name!r}")
            given = feeds[name].shape
            if len(given) != len(spec.shape):
                raise ArtefactError(
                    f"its input {name!r} has {len(spec.shape)} axes, and the pipeline gives {len(given)}"
                )
            axes |= {a: n for a, n in zip(spec.shape, given, strict=True) if isinstance(a, str)}
        return {
            name: np.ones(
                [n if isinstance(n, int) else axes.get(n, 1) for n in spec.shape], spec.dtype
            )
            for name, spec in self.outputs.items()
        }


def _why_not_called(folder: Path, manifest: Manifest, trials: Mapping[str, Trial]) -> str | None:
    """Reason why the pipeline cannot call its denoiser; None if it can call it."""
    import torch

    def dummy(name: str) -> Engine | None:
        return _Dummy(trials[name]) if name in trials else None

    try:
        source = engine_source(folder, manifest.denoiser, manifest.options.size, dummy)
        check_calibrated(source, manifest)
        trial = trials[manifest.denoiser]
        wrong = _wrong_types(trial, source.family.sample)
        if wrong is not None:
            return wrong
        conditions = source.draw_conditions(1, seeded_generator(0, "verify"))
        x = torch.ones(1, *source.sample_shape)
        timestep = torch.tensor([(manifest.timesteps or [1.0])[0]])
        arguments = conditions.family.arguments(
            x, timestep, conditions.conditional | conditions.shared
        )
        source.denoiser(**arguments, return_dict=False)
    except TrtqError as err:
        return f"the pipeline cannot call it: {_line(err)}"
    except Exception as err:  # An edited folder can raise any error in torch or diffusers.
        return f"the pipeline cannot call it: {type(err).__name__}: {_line(err)}"
    return None


def _wrong_types(trial: Trial, sample: str) -> str | None:
    """Problem with the types or shapes of the denoiser's inputs and output; None without a problem."""
    if len(trial.outputs) != 1:
        return (
            f"it has {len(trial.outputs)} outputs ({', '.join(trial.outputs)}), a denoiser has one"
        )
    ((output, spec),) = trial.outputs.items()
    named: dict[str, TensorSpec] = {output: spec}
    for name in (sample, "timestep"):
        if name not in trial.inputs:
            return f"it has no input {name!r}; it has {', '.join(trial.inputs)}"
    named[sample] = trial.inputs[sample]
    for name, tensor in named.items():
        if not np.issubdtype(tensor.dtype, np.floating):
            return (
                f"{name!r} is of type {tensor.dtype.name}; images and predictions are float32 or "
                "float16"
            )
    if trial.inputs["timestep"].dtype == np.bool_:
        return "its input 'timestep' is of type bool"
    given = trial.given.get(output, ())
    if len(given) != len(trial.inputs[sample].shape):
        return (
            f"its output {output!r} has the shape {list(given)}, which is not that of a prediction"
        )
    return None


def _line(err: Any) -> str:
    return " ".join(str(err).split())[:_MAX_LINE]
