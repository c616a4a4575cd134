"""Tables, summary sentences and gate of a benchmark result."""

import pytest

from trtq.bench.page import bench_tables, failures, statements


def row(path, *, low_bit=True, verdict="faster", images=None, measured=True):
    """Create a row of a result with one batch size."""
    summary = {"p50": 2.0, "q1": 1.0, "q3": 3.0, "p90": 4.0, "p99": None, "calls": 60}
    speedup = {"baseline": "digits@torch", "ratio": 0.5, "low": 0.4, "high": 0.6}
    speedup["verdict"] = verdict
    entry = {"batch": 1, "parts": {"denoiser": summary}, "images_per_second": 3.0}
    entry |= {"joules_per_image": 1.5, "speedup": speedup if low_bit else None}
    entry |= {"images_per_second_interval": [2.0, 4.0], "batch_of_images": summary | {"calls": 8}}
    of_images = entry["speedup"] and entry["speedup"] | {"verdict": images or verdict}
    entry |= {"images_speedup": of_images}
    fields = {"path": path, "provider": "cpu", "bits": "w8a8", "low_bit": low_bit}
    fields |= {"measured": measured, "reason": None if measured else "its process was killed"}
    fields |= {"batches": [entry] if measured else [], "speedup": entry["speedup"]}
    fields |= {"load_seconds": 1.0, "build_seconds": None, "denoiser_bytes": 10, "roofline": None}
    return fields | {"memory": {"gpu_bytes": 5 << 20}, "psnr_db": 30.0}


def result(*rows, slower=(), unjudged=(), undecided=()):
    """Create a result with these rows."""
    fields = {"rows": list(rows), "notes": ["see there"], "against": None}
    fields |= {"undecided": list(undecided)}
    return fields | {"slower": list(slower), "unjudged": list(unjudged)}


def test_a_slower_row_is_stated_and_fails_the_gate():
    slower = row("onnx", verdict="slower", images="within the spread")
    benchmark_result = result(slower, slower=["onnx@cpu"])
    lines = statements(benchmark_result)
    assert lines[0] == "onnx@cpu, batch 1, one step: SLOWER than digits@torch: 0.50 x (0.40-0.60)"
    assert lines[1] == (
        "onnx@cpu, batch 1, whole images: no significant difference from digits@torch: "
        "0.50 x (0.40-0.60), at 30.0 dB"
    )
    assert lines[-1] == "note: see there"
    assert failures(benchmark_result) == ["slower than float: onnx@cpu"]
    assert failures(result(row("onnx"))) == []


def test_rows_without_measurement_or_comparison_fail_the_gate():
    lost = result(row("onnx", measured=False))
    assert failures(lost) == ["not measured: onnx@cpu"]
    assert "onnx@cpu: not measured: its process was killed" in statements(lost)
    assert failures(result(row("onnx"), unjudged=["onnx@cuda"])) == [
        "not compared with float: onnx@cuda"
    ]
    assert failures(result(row("onnx"), undecided=["onnx@cpu"])) == [
        "too few rounds for a verdict against float: onnx@cpu"
    ]
    assert failures(result(row("digits", low_bit=False))) == ["no low-bit row: nothing to compare"]


def test_tables_show_gpu_memory_and_energy_if_measured():
    tables = bench_tables(result(row("onnx"), row("gone", measured=False)))
    memory = tables["loading, memory in MB, share of the peak"]
    assert memory.header[-2:] == ("GPU", "J per image")
    assert memory.rows[0][-1] == "1.5"
    shares = [cells[memory.header.index("of peak")] for cells in memory.rows]
    assert shares == ["unknown", "-"]
    for table in tables.values():
        assert all(len(cells) == len(table.header) for cells in table.rows)


def test_tables_show_the_number_of_calls():
    tables = bench_tables(result(row("onnx")))
    step, images = tables["one denoising step"], tables["whole images"]
    shown = dict(zip(step.header, step.rows[0], strict=True))
    assert (shown["p90"], shown["p99"], shown["calls"]) == ("4", "not measured", "60")
    shown = dict(zip(images.header, images.rows[0], strict=True))
    assert (shown["images/s"], shown["batches"]) == ("3 (2-4)", "8")
    assert shown["vs float"] == "0.50 x (0.40-0.60)"


@pytest.mark.parametrize(
    ("paths", "names", "shared"),
    [
        (["/tmp/w/a/onnx", "/tmp/w/b/onnx"], ["a/onnx", "b/onnx"], "/tmp/w"),
        (["/tmp/w/onnx", "digits"], ["onnx", "digits"], "/tmp/w"),
        (["runs/a/", "runs/b"], ["a", "b"], "runs"),
        (["../a", "../b"], ["a", "b"], ".."),
        (["onnx", "float"], ["onnx", "float"], ""),
        (["./onnx", "./float"], ["./onnx", "./float"], ""),
        (["/a/onnx", "/b/onnx"], ["/a/onnx", "/b/onnx"], ""),
        (["/a/onnx", "b/onnx"], ["/a/onnx", "b/onnx"], ""),
        (["/tmp/w/digits", "digits"], ["/tmp/w/digits", "digits"], ""),
    ],
)
def test_tables_omit_the_common_folder_of_all_rows(paths, names, shared):
    benchmark_result = result(*(row(path) for path in paths))
    for table in bench_tables(benchmark_result).values():
        assert [cells[0] for cells in table.rows] == [f"{name}@cpu" for name in names]
    lines = statements(benchmark_result)
    assert [line for line in lines if "row names" in line] == (
        [f"row names in the tables are relative to {shared}"] if shared else []
    )
