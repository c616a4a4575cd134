"""`trtq bench`: speed and memory of artefacts, and `trtq bench kernels`: speed of the CUDA kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trtq.commands.early import check_rows, say_loading
from trtq.commands.options import (
    PROVIDERS,
    AsJson,
    Guidance,
    Overwrite,
    ReportFolder,
    Seed,
    Steps,
    Verbose,
    one_of,
    output_option,
    within,
)
from trtq.commands.output import (
    command,
    folding_table,
    print_error,
    print_line,
    print_table,
    record_of,
    show,
)
from trtq.errors import GateError
from trtq.limits import MAX_IMAGES, MAX_THREADS
from trtq.progress import ProgressPrinter

__all__ = ["BenchGroup", "bench", "bench_kernels"]

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="ARTEFACT[@PROVIDER]",
        help="Artefacts and checkpoints, each with an optional provider. The float checkpoint is "
        "added unless one is given.",
    ),
]
Providers = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        autocompletion=one_of(*PROVIDERS),
        help="Provider for artefacts given without @PROVIDER: cpu, openvino, cuda, tensorrt-rtx, "
        "tensorrt or torch; may be repeated.",
    ),
]
BatchSizes = Annotated[
    str | None,
    typer.Option(
        "--batch-sizes",
        help="Numbers of images per call, e.g. 1 or 1,4,16. Default: 1,4, or 1 for pipelines that are "
        "used through their own call.",
    ),
]
Images = Annotated[
    int,
    typer.Option(
        "--images",
        callback=within(1, MAX_IMAGES),
        help="Minimum number of images to generate per row.",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        "--turns",
        callback=within(2, 10_000),
        help="Timing rounds per row (about 0.5 s each, rows interleaved). Default: 10, or as many as "
        "the significance test needs.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        callback=within(1, MAX_THREADS),
        help="Threads per operator in every row. Default: the number of cores.",
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option("--baseline", help="JSON file of an earlier result to compare with."),
]
Gate = Annotated[
    bool,
    typer.Option(
        "--gate",
        help="Exit code 1 if a low-bit row is slower than its float row, or cannot be compared.",
    ),
]
Forms = Annotated[
    list[str] | None,
    typer.Option(
        "--form",
        autocompletion=one_of("w8a8", "w4a8", "w4a4"),
        help="Bits of weights and activations: w8a8, w4a8 or w4a4; may be repeated. Default: all.",
    ),
]
Predict = Annotated[
    str | None,
    typer.Option(
        "--predict",
        metavar="ARCH",
        autocompletion=one_of("sm80", "sm86", "sm89", "sm90", "sm120"),
        help="Predict the times for an architecture (sm80, sm86, sm89, sm90 or sm120) by a model, "
        "without a GPU; measure nothing.",
    ),
]
ResultFile = Annotated[Path | None, output_option("JSON file for the result.")]


class BenchGroup(typer.core.TyperGroup):
    """`trtq bench ARTEFACT...` measures artefacts; `trtq bench kernels` is a separate command."""

    default = "artefacts"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command unless a command is named."""
        named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if named else [self.default, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve the command by the name that the user typed, empty for the default command."""
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == self.default else name), command, rest


def bench(
    artefacts: Paths,
    output: ReportFolder = None,
    provider: Providers = None,
    batch_sizes: BatchSizes = None,
    images: Images = 8,
    turns: Rounds = None,
    threads: Threads = None,
    steps: Steps = None,
    guidance: Guidance = None,
    baseline: Baseline = None,
    gate: Gate = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare the speed and memory of artefacts, and what the device could reach.

    Each row runs in a process of its own; the rows are timed in interleaved rounds, so that all meet
    the same conditions.

    Example: trtq bench onnx@openvino onnx@cpu float_onnx@openvino --batch-sizes 1,4 -o report
    """
    from trtq.report.folder import report_folder, write_report

    with command(verbose), report_folder(output, kind="bench", overwrite=overwrite):
        check_rows(artefacts, provider or [])
        say_loading()
        from trtq.bench.artefacts import parse_batches
        from trtq.bench.page import bench_page, failures
        from trtq.bench.run import benchmark as measure

        result = measure(
            artefacts,
            providers=provider or [],
            batches=None if batch_sizes is None else parse_batches(batch_sizes),
            turns=turns,
            images=images,
            steps=steps,
            guidance=guidance,
            threads=threads,
            seed=seed,
            against=baseline,
            judge=gate,
            progress=ProgressPrinter(),
        )
        record = record_of(result)
        # Printed before the report is written: a full disk must not cost a long measurement.
        place = {} if output is None else {"report": str(output / "index.html")}
        show(record | place, as_json, _print_bench)
        if output is not None:
            write_report(output, bench_page(record), record, kind="bench", overwrite=overwrite)
        failed = failures(record)
        if gate and failed:
            raise GateError("; ".join(failed))


def _print_bench(record: dict[str, Any]) -> None:
    from trtq.bench.page import bench_tables, statements

    for title, table in bench_tables(record).items():
        print_table(folding_table(title, table.header, table.rows))
        print_line()
    for line in statements(record):
        print_line(line)


def bench_kernels(
    forms: Forms = None,
    predict: Predict = None,
    output: ResultFile = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare trtq's CUDA kernels with cuBLAS and cuDNN in half precision, layer by layer.

    Needs an NVIDIA GPU. Each layer is first compared with its definition, integer by integer; the exit
    code is 1 if a layer is wrong or fails, after all layers are measured. With --predict, nothing is
    measured, and no GPU is needed.

    Example: trtq bench kernels -o kernels.json
    """
    from trtq.artefact.outputs import check_file, new_file
    from trtq.bench.kernel_prediction import predict_kernels
    from trtq.bench.kernels import FORMS, failed_rows
    from trtq.bench.kernels import bench_kernels as measure

    with command(verbose):
        if output is not None:
            check_file(output, overwrite=overwrite)
        wanted = forms or list(FORMS)
        if predict is None:
            record = record_of(measure(wanted, progress=ProgressPrinter()))
        else:
            record = record_of(predict_kernels(predict, wanted))
        # Printed before the file is written: a full disk must not cost a long measurement.
        show(record, as_json, _print_kernels if predict is None else _print_prediction)
        if output is not None:
            with new_file(output, overwrite=overwrite) as partial:
                partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        failed = failed_rows(record) if predict is None else []
        if failed:
            for text in failed[1:]:
                print_error(f"error: {text}")
            raise GateError(failed[0])


def _print_kernels(record: dict[str, Any]) -> None:
    table = Table(title=str(record["gpu"]), title_justify="left")
    times = ("us", "quantise", "product", "fp16 us", "times", "TOP/s", "of peak")
    for column in ("model", "shape", "form", *times):
        table.add_column(column)
    for row in record["rows"]:
        place = (row["model"], row["shape"], row["form"])
        if row["error"] is not None:
            table.add_row(*place, "failed")
            continue
        share = row["share_of_peak"]
        table.add_row(
            *place,
            f"{row['microseconds']:.1f}" + ("!" if row["wrong_values"] else ""),
            f"{row['quantise_microseconds']:.1f}",
            f"{row['product_microseconds']:.1f}",
            f"{row['fp16_microseconds']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['tera_operations']:.0f}",
            "?" if share is None else f"{share:.0%}",
        )
    print_table(table)


def _print_prediction(record: dict[str, Any]) -> None:
    title = f"Predicted for {record['gpu']} ({record['architecture']}), not measured"
    table = Table(title=title, title_justify="left")
    for column in ("model", "shape", "form", "quantise us", "product us", "fp16 us", "times"):
        table.add_column(column)
    for row in record["rows"]:
        times = ("quantise_microseconds", "product_microseconds", "fp16_microseconds")
        table.add_row(
            *(row[key] for key in ("model", "shape", "form")),
            *(f"{row[key]:.1f}" for key in times),
            f"{row['speedup']:.1f}",
        )
    print_table(table)
    means = (f"{form} {value:.1f}" for form, value in record["mean_speedup"].items())
    print_line(
        f"Predicted mean speed-up: {', '.join(means)}. Expect 30 % of error in a single layer."
    )
