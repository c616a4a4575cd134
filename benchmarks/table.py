"""Write the README's tables from the files in benchmarks/results.

python benchmarks/table.py
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WIDTHS = ("W8A8", "W7A8", "W4A8", "W4A4", "W3A4", "mixed")
PER_STEP, STATIC = "W4A4 per-step, search", "W4A4 static, search"


def _digits_row(row: dict[str, Any], float_bytes: int) -> str:
    parity = ""
    if "parity_ties" in row:
        least = row["parity_db_min"]
        parity = "exact" if least >= 200 else f"{least:.0f} dB"
        parity += f", {row['parity_ties']:.1%} ties"
    cells = [
        row["name"],
        f"{row['fd']:.2f}",
        f"{row['fd_ratio']:.2f} x" if "fd_ratio" in row else "",
        f"{row['class_accuracy']:.1%}",
        f"{row['fine_tune_seconds']:.0f} s" if row.get("fine_tune_seconds") else "",
        parity,
        f"{row.get('bytes_after', float_bytes) / 1e6:.2f} MB",
    ]
    return "| " + " | ".join(cells) + " |"


def digits(record: dict[str, Any]) -> str:
    """`digits.json` as Markdown."""
    provider = record["rows"][-1]["provider"]
    float_bytes = record["rows"][-1]["bytes_before"]
    lines = [
        f"`python benchmarks/digits.py` on {record['device']}, {record['date']}, {record['images']:,} "
        f"images, {record['steps']} DDIM steps, one run; low-bit rows on onnxruntime ({provider}). The "
        "float denoiser's size is that of its parameters in float32.",
        "",
        "| digits model | FD | to float | accuracy | fine-tuning | parity | denoiser |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_digits_row(row, float_bytes) for row in record["rows"]),
        "",
        "Per-step tables against one static table, same graph otherwise, median ms of a call "
        "(quartiles), calls in turns:",
        "",
        "| | per-step | static | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in record["latency_ms"].items():
        ours, base = values[PER_STEP], values[STATIC]
        cells = [f"{v['median']:.2f} ({v['q1']:.2f}-{v['q3']:.2f})" for v in (ours, base)]
        ratio = ours["median"] / base["median"]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {ratio:.3f} x |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    """Mean, and smallest and largest where there are several."""
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)}-{format(max(values), form)})"


def ablation(record: dict[str, Any]) -> str:
    """`ablation.json` as Markdown: mean over the seeds, and smallest and largest."""
    low, high = record["fd_float_interval"]
    dates = sorted({row["date"] for row in record["rows"]})
    threads = sorted({row["threads"] for row in record["rows"]})
    lines = [
        f"`python benchmarks/ablation.py`, {dates[-1]}, {record['images']:,} images in torch, "
        f"{' or '.join(map(str, threads))} thread(s). Float: FD {record['fd_float']:.2f} (95 % interval "
        f"{low:.2f}-{high:.2f}), accuracy {record['class_accuracy_float']:.1%}.",
        "",
        "| digits model | seeds | FD | to float | accuracy | PSNR to float |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    names = dict.fromkeys(row["name"] for row in record["rows"])
    for name in sorted(names, key=lambda name: WIDTHS.index(name.split()[0])):
        rows = [row for row in record["rows"] if row["name"] == name]
        cells = [
            name,
            str(len(rows)),
            _spread([row["fd"] for row in rows], ".2f"),
            f"{statistics.fmean(row['fd_ratio'] for row in rows):.2f} x",
            _spread([row["class_accuracy"] for row in rows], ".1%"),
            _spread([row["psnr_db"] for row in rows], ".1f") + " dB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shapes(record: dict[str, Any]) -> str:
    """`shapes.json` as Markdown."""
    rows = record["rows"]
    low, high = record["faithfulness_float_interval"]
    lines = [
        f"`python benchmarks/shapes.py`, {rows[-1]['date']}, {record['images']:,} pictures, "
        f"{record['steps']} steps, guidance {record['guidance']:g}, {rows[-1]['threads']} thread(s), "
        f"onnxruntime ({rows[-1]['provider']}). Float: faithfulness {record['faithfulness_float']:.1%} "
        f"(95 % interval {low:.1%}-{high:.1%}).",
        "",
        "| shapes model | faithfulness | FD | PSNR to float | parity | fine-tuning | denoiser |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = row["fine_tune_seconds"]
        cells = [
            row["name"],
            f"{row['faithfulness']:.1%}",
            f"{row['fd']:.2f}",
            f"{row['psnr_db']:.1f} dB",
            "exact" if row["parity_db_min"] >= 200 else f"{row['parity_db_min']:.0f} dB",
            f"{seconds:.0f} s" if seconds else "",
            f"{row['bytes_after'] / 1e6:.2f} MB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lora = record.get("lora")
    if lora:
        lines += [
            "",
            f"A LoRA that makes every shape purple, exchanged in the finished {SWAPPED_NAME} run in "
            f"{lora['seconds']:.1f} s: purple first shapes in {lora['style_without']:.0%} of "
            f"{lora['images']} pictures without it, {lora['style_float']:.0%} with it in the float "
            f"model, {lora['style_low_bit']:.0%} in the low-bit one. SNR of the noise prediction "
            f"against the float model with the same weights {lora['snr_db_before']:.1f} dB before, "
            f"{lora['snr_db_after']:.1f} dB after.",
        ]
    return "\n".join(lines)


def sd_size(record: dict[str, Any]) -> str:
    """`sd_size.json` as Markdown."""
    lines = [
        "| UNet | run | stage | seconds | peak memory | run's denoiser to float32 | threads, date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        options, made = row["options"], row.get("quantize")
        what = f"{options['bits'].upper()} {options['method']}, {options['steps']} step(s), "
        what += f"{options['images']} image(s)"
        if options["iterations"] is not None:
            what += f", {options['iterations']} iterations of {options['batch']} image(s)"
        size = f"{made['bytes_after'] / made['bytes_before']:.3f} x" if made else ""
        for stage in ("quantize", "export"):
            if stage in row:
                cells = [
                    MODELS[options["model"]],
                    what,
                    stage,
                    f"{row[stage]['seconds']:.0f}",
                    f"{row[stage]['peak_rss_bytes'] / 1e9:.1f} GB",
                    size if stage == "quantize" else "",
                    f"{row['threads']}, {row['date']}",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def build(record: dict[str, Any]) -> str:
    """`build.json` as Markdown."""
    whole = {
        tuple(row["architectures"]): row["engine_bytes"]
        for row in record["rows"]
        if row["graph"] == "float"
    }
    lines = [
        f"`python benchmarks/build.py`, {record['device']}, no GPU, {record['builder']}, "
        f"{record['date']}, batch 1-8, half precision.",
        "",
        "| UNet | built for | seconds | peak memory | engine | to the float engine |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        cells = [
            row["graph"],
            ", ".join(row["architectures"]),
            f"{row['seconds']:.0f}",
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB",
            f"{row['engine_bytes'] / 1e6:.0f} MB",
            f"{row['engine_bytes'] / whole[tuple(row['architectures'])]:.2f} x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cpu_path(record: dict[str, Any]) -> str:
    """`cpu_path.json` as Markdown."""
    median = {(row["name"], row["provider"]): row["median_seconds"] for row in record["rows"]}
    lines = [
        f"`python benchmarks/cpu_path.py`, {record['device']} "
        f"{'with' if record['vnni'] else 'without'} VNNI, {record['threads']} threads, "
        f"{record['date']}, one run, rows in turns: seconds of one call, batch 1, median (quartiles).",
        "",
        "| UNet | runs on | seconds | against float on cpu | against float on openvino | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        seconds, (low, high) = row["median_seconds"], row["quartiles"]
        cells = [
            KINDS.get(row["name"], row["name"].upper()),
            "openvino's own runtime" if row["name"] == "nncf" else row["provider"],
            f"{seconds:.2f} ({low:.2f}-{high:.2f})",
            f"{median['float', 'cpu'] / seconds:.2f} x",
            f"{median['float', 'openvino'] / seconds:.2f} x",
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    pair = record.get("pair")
    if pair:
        low, high = pair["quartiles"]
        lines += [
            "",
            "Per-step against constant scales, both in one process and called in turns, "
            f"{pair['calls']} times: {pair['ratio']:.3f} x ({low:.3f}-{high:.3f}).",
        ]
    return "\n".join(lines)


def serve(record: dict[str, Any]) -> str:
    """`serve.json` as Markdown, or `serve_side_by_side.json`, which holds the load only."""
    lines = [
        f"`python benchmarks/serve.py`, {record['device']}, {record['date']}, W4A8 on "
        f"{record['provider']}, one thread per operator, up to {record['max_batch']} rows in a call; "
        f"load of the machine {record['load_before']:.1f} before, {record['load_after']:.1f} after. "
        f"{_one_at_a_time(record)}Load: {record['seconds']:g} s a round at 80 % of the smaller maximum, "
        f"{record.get('load_order', 'in turns')}.",
        "",
        "| requests | images/s when full, by step | by request | arrivals/s | p95 by step | "
        "by request | ratio, median of rounds (all) | p50 ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in record["load"].items():
        full = {key: found["capacity_images_per_second"][key] for key in ("step", "request")}
        p95 = {key: found["rows"][key]["p95_seconds"] for key in ("step", "request")}
        rounds = found["p95_ratio_rounds"]
        cells = [
            name,
            *(f"{statistics.median(values):.1f}" for values in full.values()),
            f"{found['arrivals_per_second']:.1f}",
            *(f"{value:.2f} s" for value in p95.values()),
            f"{found['p95_ratio']:.2f} x ({min(rounds):.2f}-{max(rounds):.2f})",
            f"{found['p50_ratio']:.2f} x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _one_at_a_time(record: dict[str, Any]) -> str:
    if "overhead" not in record:
        return ""
    cost, started = record["overhead"], record["start_seconds"]
    launches = cost["launches"]
    low, high = min(launches["overhead"]), max(launches["overhead"])
    return (
        f"Digits: start to ready {started['median']:.2f} s (least {started['min']:.2f}); one request "
        f"at a time against bare calls of the graph, {cost['images']} images in turns, "
        f"{len(launches['overhead'])} launches: {cost['overhead']:+.1%} by the clock "
        f"({low:+.1%} to {high:+.1%}), {cost['overhead_processor']:+.1%} of processor time, of "
        f"{statistics.median(launches['bare_seconds']) * 1000:.0f} ms. "
    )


def serve_hostile(record: dict[str, Any]) -> str:
    """`serve_hostile.json` as Markdown."""
    statuses = ", ".join(f"{count:,} x {name}" for name, count in record["statuses"].items())
    cut_off = ", ".join(f"{n:,} x {name}" for name, n in record["cut_off_after_the_answer"].items())
    counted, memory = record["counted_by_the_server"], record["memory_bytes"]
    files = record["open_files"]
    text = (
        f"`python benchmarks/serve_hostile.py`, {record['device']}, {record['date']}: "
        f"{record['minutes']:g} minutes, {record['requests']:,} requests ({statuses}); "
        f"{record['server_errors']} answers of 5xx, {record['unanswered']} without an answer, "
        f"{record['wrong']} wrong ones. Answered while the client still sent, which could then send no "
        f"more: {cut_off or 'none'}. The server's own counts at the end: {counted['internal_errors']:g} "
        f"internal errors, {counted['answers_of_5xx']:g} answers of 5xx, "
        f"{counted['images_under_way']:g} images under way. Medians of the last fifth of the time "
        f"against those when all had settled: memory {memory['ratio']:.3f} x, open files "
        f"{files['last']:g} against {files['settled']:g}. Exit code {record['exit_code']}."
    )
    if "endless_bodies" in record:
        endless, kinds = record["endless_bodies"], record["kinds"]
        shown = {
            "bodies without end": "endless",
            "foreign hosts": "foreign_hosts",
            "foreign origins": "foreign_origins",
            "what is no request": "no_requests",
        }
        text += " Among them " + "; ".join(
            f"{name}: {', '.join(f'{n:,} x {status}' for status, n in kinds.get(kind, {}).items())}"
            for name, kind in shown.items()
        )
        text += (
            f". Of the bodies without end {endless['open_15_s_after_the_answer']} connections were open "
            f"15 s after their answer (longest: {endless['longest_open_after_the_answer_s']:g} s); "
            f"{record['connections_open_at_the_end']} of all 15 s after the end."
        )
    cases = [line.strip() for line in record["schemathesis"] if "generated" in line]
    return text + (f" Schemathesis beside it: {cases[-1]}." if cases else "")


def serve_start(record: dict[str, Any]) -> str:
    """`serve_start.json` as Markdown."""
    lines = [
        f"`python benchmarks/serve_start.py`, {record['device']}, {record['date']}; load of the machine "
        f"{record['load_before']:g} before, {record['load_after']:g} after. Digits at W4A8, from "
        "starting the process to ready; *first* is the start that prepares the graph.",
        "",
        "| provider | `TRTQ_CPU` | s, median (min-max) | starts | first, s | imports |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        seconds = row["seconds"]
        lines.append(
            f"| {row['provider']} | `{row['TRTQ_CPU']}` | {row['median']:.2f} ({min(seconds):.2f}-"
            f"{max(seconds):.2f}) | {len(seconds)} | {row['cold_seconds']:.2f} | "
            f"{', '.join(row['heavy_modules']) or 'no torch, onnx, diffusers'} |"
        )
    return "\n".join(lines)


def serve_ray(record: dict[str, Any]) -> str:
    """`serve_ray.json` as Markdown."""
    rates = {
        name: f"{statistics.median(values):.1f} images/s ({min(values):.1f}-{max(values):.1f})"
        for name, values in record["images_per_second"].items()
    }
    ratio, kills = record["ratio"], record["kills"]
    total = {
        key: sum(one[key] for one in kills)
        for key in ("requests", "answered_once", "under_way_at_the_kill", "pictures_equal")
    }
    times: Counter[str] = Counter()
    for one in kills:
        times.update(one["drawn_times"])
    drawn = ", ".join(f"{times[key]:,} {TIMES.get(key, key + ' times')}" for key in sorted(times))
    different = max(one["largest_difference"] for one in kills)
    slowest = max(one["slowest_seconds"] for one in kills)
    median = statistics.median(one["median_before_seconds"] for one in kills)
    return (
        f"`python benchmarks/serve_ray.py`, {record['device']}, {record['date']}, load of the machine "
        f"{record['load_before']:.1f} before, {record['load_after']:.1f} after: one process "
        f"{rates['one process']}, two replicas of one thread each on Ray Serve {rates['two replicas']}; "
        f"ratio of a round, median of {len(record['ratio_rounds'])}: {ratio['median']:.2f} x (quartiles "
        f"{ratio['q1']:.2f}-{ratio['q3']:.2f}, {ratio['min']:.2f}-{ratio['max']:.2f} in all). A "
        f"replica killed in the middle of {record['kill_seconds']:g} s of {record['clients']} clients, "
        f"{len(kills)} times: {total['requests']:,} requests, {total['under_way_at_the_kill']} of them "
        f"under way then, {total['answered_once']:,} answered once and with 200; drawn to the end "
        f"{drawn}; {total['pictures_equal']:,} pictures equal to the one process's, largest difference "
        f"of the rest {different} of 255. The slowest waited {slowest:.1f} s (median before the kill "
        f"{median:.1f} s)."
    )


TIMES = {"0": "never", "1": "once", "2": "twice"}
MODELS = {"sd_1": "SD 1.5, 859.5 M", "sd_xl": "SD XL, 2,567 M"}
KINDS = {
    "float": "float",
    "constant": "W7A8, constant scales",
    "nncf": "int8 by NNCF (W8A8, static)",
}
SWAPPED_NAME = "W4A8 search"
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "digits": digits,
    "ablation": ablation,
    "shapes": shapes,
    "sd_size": sd_size,
    "cpu_path": cpu_path,
    "build": build,
    "serve": serve,
    "serve_side_by_side": serve,
    "serve_hostile": serve_hostile,
    "serve_start": serve_start,
    "serve_ray": serve_ray,
}


def main() -> None:
    """Replace what stands between the marks of each table whose results are there."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        path = RESULTS / f"{name}.json"
        if not path.is_file() or begin not in text:
            continue
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{make(json.loads(path.read_text()))}\n{end}{tail}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
