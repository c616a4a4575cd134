"""One denoising step of Stable Diffusion 1.5's size on the CPU: float and low-bit, by provider.

    python benchmarks/cpu_path.py --folder DIR [--rounds 3 --calls 3]
    python benchmarks/cpu_path.py --folder DIR --pair       (per-step against constant scales)

Random weights in the published configuration, 64 x 64 latents, batch 1. Checkpoint, runs and graphs are
kept in DIR and reused. Every row is timed in a separate process, in interleaved rounds; the first call
of each process includes compilation and is not counted. "constant" is a graph with the scales of one
step. W7A8 is the widest format that a processor without VNNI multiplies in integers. If nncf is
installed, an additional row measures OpenVINO's runtime on OpenVINO's post-training int8 model of the
same float graph. The difference between per-step and constant scales is smaller than the variation
between processes, so `--pair` loads both graphs in one process and interleaves their calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sd_size import stage, write_checkpoint

from trtq.artefact.manifest_file import package_versions
from trtq.bench.device import cpu_name
from trtq.bench.turns import take_turns, time_calls
from trtq.engine.base import TensorSpec, graph_specs
from trtq.engine.open import open_engine
from trtq.graph.runtimes.prepare import load_graph
from trtq.processor import has_vnni, processor_features
from trtq.quant.tensors import LayerTensors
from trtq.resources import peak_rss_bytes

BITS = ("w8a8", "w7a8", "w4a8")
ROWS = (
    ("float", "cpu"),
    ("float", "openvino"),
    ("w8a8", "cpu"),
    ("w8a8", "openvino"),
    ("w7a8", "openvino"),
    ("w4a8", "openvino"),
    ("constant", "openvino"),
)
RIVAL = ("nncf", "openvino")


def make(folder: Path) -> None:
    """Create the missing checkpoint, runs and graphs."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint)
    recipe = folder / "recipe.toml"
    recipe.write_text("[calibration]\nimages = 1\n")
    for bits in BITS:
        run, onnx = folder / f"run_{bits}", folder / bits
        if not run.is_dir():
            stage(
                *("quantize", str(checkpoint), "-o", str(run), "--method", "minmax"),
                *("--bits", bits, "--steps", "4", "--recipe", str(recipe)),
            )
        if not onnx.is_dir():
            stage("export", str(run), "-o", str(onnx))
    if not (folder / "float").is_dir():
        stage("export", str(checkpoint), "-o", str(folder / "float"))
    if not (folder / "constant").is_dir():
        _write_constant(folder / "run_w7a8", folder / "constant" / "unet")


def _write_constant(run_folder: Path, out: Path) -> None:
    """Write the graph of a run that uses the scales of its first step at all steps."""
    from trtq.exporter.graph import write_graph
    from trtq.runs.folder import open_run

    run = open_run(run_folder)
    for name, layer in run.stored.layers.items():
        assert isinstance(layer, LayerTensors)
        constant = {
            key: getattr(layer.activation, key)[:1].expand(len(run.table)).contiguous()
            for key in ("scale", "inv_scale", "low", "high")
        }
        activation = replace(layer.activation, **constant)
        run.stored.layers[name] = replace(layer, activation=activation)
    source = run.source()
    size = "x".join(map(str, source.image_size))
    write_graph(out, run.float_skeleton(), source, run, size, half=False)


def make_rival(folder: Path) -> bool:
    """Create NNCF's int8 model of the float graph; False if nncf is not installed."""
    try:
        import nncf
        import openvino
    except ImportError:
        return False
    if (folder / "nncf").is_dir():
        return True
    graph = folder / "float" / "unet" / "model.onnx"
    specs = _specs(graph)
    model = openvino.Core().read_model(graph)
    model.reshape({name: list(array.shape) for name, array in _feeds(specs).items()})
    dataset = nncf.Dataset([_feeds(specs, seed) for seed in range(4)])
    preset = nncf.QuantizationPreset.PERFORMANCE
    quantized = nncf.quantize(model, dataset, preset=preset, subset_size=4)
    openvino.save_model(quantized, folder / "nncf" / "model.xml", compress_to_fp16=False)
    return True


def _specs(graph: Path) -> dict[str, TensorSpec]:
    """Input specifications of a graph, read without loading its weights."""
    return graph_specs(load_graph(graph).graph.inputs)


def _feeds(specs: Mapping[str, TensorSpec], seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of batch size 1."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for key, spec in specs.items():
        shape = [size if isinstance(size, int) else 1 for size in spec.shape]
        values = generator.standard_normal(shape).astype(spec.dtype)
        feeds[key] = np.full(shape, 501, spec.dtype) if key == "timestep" else values
    return feeds


def time_one(folder: Path, name: str, provider: str, calls: int) -> dict[str, Any]:
    """Load one graph and time `calls` calls."""
    start = time.perf_counter()
    call: Callable[[], object]
    if (name, provider) == RIVAL:
        import openvino

        specs = _specs(folder / "float" / "unet" / "model.onnx")
        start = time.perf_counter()
        model = openvino.Core().compile_model(folder / "nncf" / "model.xml", "CPU")
        call = partial(model.create_infer_request().infer, _feeds(specs))
    else:
        engine = open_engine(folder / name / "unet" / "model.onnx", provider)
        call = partial(engine.run, _feeds(engine.inputs))
    call()
    loaded = time.perf_counter() - start
    seconds = time_calls(call, calls)
    return {"load_seconds": loaded, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def time_pair(folder: Path, calls: int) -> dict[str, Any]:
    """Time interleaved calls of the per-step and the constant graph in one process."""
    engines = {
        name: open_engine(folder / name / "unet" / "model.onnx", "openvino")
        for name in ("w7a8", "constant")
    }
    feeds = _feeds(engines["w7a8"].inputs)
    # The uncounted warm-up call compiles.
    seconds = take_turns(
        {name: partial(engine.run, feeds) for name, engine in engines.items()}, calls
    )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "calls": calls,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Create missing files, measure, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument(
        "--pair", action="store_true", help="Compare per-step with constant scales only."
    )
    parser.add_argument("--row", nargs=2, help="Time one row in this process.")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/cpu_path.json")
    )
    arguments = parser.parse_args()
    record: dict[str, Any]
    if arguments.row:
        print(json.dumps(time_one(arguments.folder, *arguments.row, arguments.calls)))
        return
    make(arguments.folder)
    if arguments.pair:
        record = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
        record["pair"] = time_pair(arguments.folder, arguments.calls)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")
        print(f"per-step / constant {record['pair']['ratio']:.3f}")
        return
    present = (*ROWS, RIVAL) if make_rival(arguments.folder) else ROWS
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {row: [] for row in present}
    for _ in range(arguments.rounds):
        for row, timings in rows.items():
            command = [sys.executable, __file__, "--folder", str(arguments.folder), "--row", *row]
            command += ["--calls", str(arguments.calls)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            timings.append(json.loads(done.stdout.splitlines()[-1]))
    record = {
        "device": cpu_name(),
        "vnni": has_vnni(),
        "cpu_features": sorted(processor_features()),
        "threads": torch.get_num_threads(),
        "packages": package_versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": [],
    }
    for (name, provider), timings in rows.items():
        seconds = sorted(second for timing in timings for second in timing["seconds"])
        quartiles = statistics.quantiles(seconds, n=4)
        row = {
            "name": name,
            "provider": provider,
            "median_seconds": statistics.median(seconds),
            "quartiles": [quartiles[0], quartiles[2]],
            "load_seconds": statistics.median(timing["load_seconds"] for timing in timings),
            "peak_rss_bytes": max(timing["peak_rss_bytes"] for timing in timings),
        }
        record["rows"].append(row)
        print(f"{name:10s} {provider:9s} {row['median_seconds']:.2f} s")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
