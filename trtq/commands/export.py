"""`trtq export`: write the ONNX folder of a run or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtq.commands.early import check_calls, check_folder, check_model, say_loading
from trtq.commands.options import (
    AsJson,
    CallFile,
    Config,
    Inputs,
    Overwrite,
    Verbose,
    one_of,
    output_option,
)
from trtq.commands.output import command, print_lines, show
from trtq.progress import ProgressPrinter

__all__ = ["export"]

OnnxFolder = Annotated[
    Path,
    output_option("Folder for the ONNX graphs; for the target comfy also a .safetensors file."),
]
RunOrModel = Annotated[
    str, typer.Argument(metavar="ARTEFACT", help="Run, or checkpoint for the float baseline.")
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        autocompletion=one_of("qdq", "plugin", "comfy"),
        help="Form of low-bit layers: qdq for every runtime, plugin for trtq's own kernels in "
        "TensorRT, or comfy for one file that ComfyUI reads.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        autocompletion=one_of("fp32", "fp16"),
        help="Floating-point type of all other tensors: fp32 or fp16.",
    ),
]
BatchRange = Annotated[
    str, typer.Option("--batch-range", help="Images per call that engines accept, MIN:MAX.")
]
SizeRange = Annotated[
    str | None,
    typer.Option(
        "--size",
        help="Image size in pixels, HEIGHTxWIDTH or MIN:MAX of two such sizes. Default: the size "
        "of the run.",
    ),
]

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory to use, e.g. 24GB; only for a run. If the export needs more, codes stay packed in "
        "their files; the graph is the same. Default: what is available.",
    ),
]


def export(
    artefact: RunOrModel,
    output: OnnxFolder,
    target: Target = "qdq",
    precision: Precision = "fp32",
    batch_range: BatchRange = "1:8",
    size: SizeRange = None,
    call: CallFile = None,
    inputs: Inputs = None,
    config: Config = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write ONNX graphs with the per-step scales, and compare them with torch at every step.

    Example: trtq export run -o onnx

    With --target comfy, write the denoiser as one file of ComfyUI's quantised layers.

    Example: trtq export run --target comfy --precision fp16 -o model.safetensors
    """
    with command(verbose):
        check_calls([] if call is None else [call])
        if target != "comfy":
            check_folder(output, artefact, "onnx", overwrite=overwrite)
        check_model(artefact, config)
        say_loading()
        from trtq.artefact.opened import open_artefact
        from trtq.calls.files import read_call, read_inputs
        from trtq.exporter.export import export as write_graphs
        from trtq.exporter.export import parse_batch
        from trtq.report.lines import comfy_rows, export_rows

        changes = {} if call is None else dict(read_call(call).arguments)
        changes |= read_inputs(inputs or [])
        result = write_graphs(
            artefact if config is None else open_artefact(artefact, verify=False, config=config),
            output,
            target=target,
            precision=precision,
            batch=parse_batch(batch_range),
            size=size,
            call=changes or None,
            memory=memory,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )
        if target == "comfy":
            show(result, as_json, lambda r: print_lines(f"comfy: {output}", comfy_rows(r)))
        else:
            show(result, as_json, lambda r: print_lines(f"onnx: {output}", export_rows(r)))
