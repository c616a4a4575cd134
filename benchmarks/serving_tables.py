"""Result files of the server benchmarks as Markdown: load, start, hostile clients, Ray Serve."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

__all__ = ["serve", "serve_hostile", "serve_ray", "serve_start"]

TIMES = {"0": "never", "1": "once", "2": "twice"}


def serve(record: dict[str, Any]) -> str:
    """`serve.json` as Markdown, or `serve_side_by_side.json`, which holds the load only."""
    lines = [
        f"`python benchmarks/serve.py`, {record['device']}, {record['date']}, W4A8 on "
        f"{record['provider']}, one thread per operator, up to {record['max_batch']} rows in a call; "
        f"load of the machine {record['load_before']:.1f} before, {record['load_after']:.1f} after. "
        f"{_one_at_a_time(record)}Load: {record['seconds']:g} s a round at 80 % of the smaller maximum, "
        f"{record.get('load_order', 'the servers alternate')}.",
        "",
        "| requests | images/s when full, by step | by request | arrivals/s | p95 by step | "
        "by request | ratio, median of rounds (all) | p50 ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, load in record["load"].items():
        rounds = load["p95_ratio_rounds"]
        full = {key: load["capacity_images_per_second"][key] for key in ("step", "request")}
        p95 = {key: load["rows"][key]["p95_seconds"] for key in ("step", "request")}
        cells = [
            name,
            *(f"{statistics.median(values):.1f}" for values in full.values()),
            f"{load['arrivals_per_second']:.1f}",
            *(f"{value:.2f} s" for value in p95.values()),
            f"{load['p95_ratio']:.2f} x ({min(rounds):.2f}-{max(rounds):.2f})",
            f"{load['p50_ratio']:.2f} x",
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
        f"Digits: start to ready {started['median']:.2f} s (min {min(started.values()):.2f}); one "
        f"request at a time against bare calls of the graph, {cost['images']} images, interleaved, "
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
    return text + (f" Schemathesis at the same time: {cases[-1]}." if cases else "")


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
    ratio, rounds, kills = record["ratio"], record["ratio_rounds"], record["kills"]
    total = {
        key: sum(kill[key] for kill in kills)
        for key in ("requests", "answered_once", "under_way_at_the_kill", "pictures_equal")
    }
    times: Counter[str] = Counter()
    for kill in kills:
        times.update(kill["drawn_times"])
    drawn = ", ".join(f"{times[key]:,} {TIMES.get(key, key + ' times')}" for key in sorted(times))
    different = max(kill["largest_difference"] for kill in kills)
    slowest = max(kill["slowest_seconds"] for kill in kills)
    median = statistics.median(kill["median_before_seconds"] for kill in kills)
    return (
        f"`python benchmarks/serve_ray.py`, {record['device']}, {record['date']}, load of the machine "
        f"{record['load_before']:.1f} before, {record['load_after']:.1f} after: one process "
        f"{rates['one process']}, two replicas of one thread each on Ray Serve {rates['two replicas']}; "
        f"ratio of a round, median of {len(rounds)}: {ratio['median']:.2f} x (quartiles "
        f"{ratio['q1']:.2f}-{ratio['q3']:.2f}, {min(rounds):.2f}-{max(rounds):.2f} in all). A "
        f"replica killed in the middle of {record['kill_seconds']:g} s of {record['clients']} clients, "
        f"{len(kills)} times: {total['requests']:,} requests, {total['under_way_at_the_kill']} of them "
        f"under way then, {total['answered_once']:,} answered once and with 200; drawn to the end "
        f"{drawn}; {total['pictures_equal']:,} pictures equal to those of one process, largest "
        f"difference of the rest {different} of 255. The slowest waited {slowest:.1f} s (median before "
        f"the kill {median:.1f} s)."
    )
