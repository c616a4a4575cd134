"""The counts of instructions: how nvdisasm's text is read, and what the recorded table has to hold."""

import importlib.util
import json
import sys
from dataclasses import astuple

import pytest

from tests.vocabulary import ROOT
from trtq.plugins.variants import ARCHITECTURES, all_variants
from trtq.selftest.loading import listed

SAMPLE = """
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;
.L_x_2:
        /*0020*/              @!P0 LDGSTS.E [R2], [R4.64] ;
        /*0030*/                   IADD3 R5, R5, -0x1, RZ ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/              @UP0 BRA `(.L_x_1) ;
        /*0060*/               @P0 BRA `(.L_x_3) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
        /*00a0*/                   NOP;
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "kernels_sass", ROOT / "benchmarks/kernels_sass.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels_sass"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kernels_sass"]


def test_instructions_and_loops_are_counted(script):
    opcodes, loops = script.opcodes_of(SAMPLE)
    assert opcodes == ["MOV", "IMMA", "LDGSTS", "IADD3", "BRA", "BRA", "BRA", "EXIT", "EXIT"]
    assert loops == [(2, 4), (1, 5)]


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 203, 72 << 10, 1),  # Registers and shared memory.
        (256, 125, 48 << 10, 2),
        (128, 80, 24 << 10, 4),
        (128, 40, 512, 12),  # Threads.
    ],
)
def test_blocks_of_a_processor_are_limited_by_what_is_scarcest(
    script, threads, registers, shared, blocks
):
    assert script.blocks_per_processor("sm89", threads, registers, shared) == blocks


@pytest.fixture(scope="module")
def record(script):
    return json.loads(script.OUT.read_text())


def test_the_record_is_of_these_sources(script, record):
    assert record["sources"] == script.digest(), "run benchmarks/kernels_sass.py again"


def test_the_table_of_the_package_is_that_of_the_record(script, record):
    assert script.TABLE.read_text() == script.table_text(record), "run benchmarks/kernels_sass.py"
    version, table = listed()
    assert version == record["nvrtc"]
    rows = {(row["architecture"], row["variant"]): row for row in record["rows"]}
    assert {(name, variant) for name, of in table.items() for variant in of} == set(rows)
    for (architecture, variant), row in rows.items():
        values = [row[key] for key in ("registers", "spilled_bytes", "shared_bytes", "blocks")]
        assert list(astuple(table[architecture][variant])) == values


def test_the_record_has_every_variant_and_no_spill(record):
    rows = record["rows"]
    wanted = {(name, str(variant)) for name in ARCHITECTURES for variant in all_variants(name)}
    assert {(row["architecture"], row["variant"]) for row in rows} == wanted
    assert not [row["variant"] for row in rows if row["spilled_bytes"]]
    assert not [row["variant"] for row in rows if not row["blocks"]]
    without_loop = {row["variant"] for row in rows if row["loop"] is None}
    assert all(name.startswith("quantize") for name in without_loop)


def test_recorded_instructions_are_within_the_limits(script, record):
    rows = {row["variant"]: row for row in record["rows"] if row["architecture"] == "sm89"}
    limits = script.guarded()
    assert len(limits) == 24
    for variant, limit in limits.items():
        row = rows[str(variant)]
        assert row["loop"] <= limit, variant
        assert row["instructions"] <= script.MAX_INSTRUCTIONS, variant
        assert row["blocks"] == 2, variant


def test_instructions_are_within_the_limits(script, tmp_path, monkeypatch):
    """Compile with the installed NVRTC the convolution of each number of weight bits."""
    tools = script.tools_folder()
    if tools is None:
        pytest.skip("needs nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump")
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path))
    for variant, limit in script.guarded().items():
        if variant.half and not (variant.pointwise or variant.channels_last or variant.native_4):
            row = script.measure(variant, "sm89", tools, tmp_path)
            assert row.loop is not None
            assert row.loop <= limit
            assert row.instructions <= script.MAX_INSTRUCTIONS
            assert (row.spilled_bytes, row.blocks) == (0, 2)
