"""The counts of instructions: how nvdisasm's text is read, and what the recorded table has to hold."""

import importlib.util
import json
import sys

import pytest

from tests.vocabulary import ROOT
from trtq.plugins.variants import ARCHITECTURES, all_variants

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


def test_the_recorded_table_has_every_variant_and_hardly_a_spill(script):
    rows = json.loads(script.OUT.read_text())["rows"]
    wanted = {(name, str(variant)) for name in ARCHITECTURES for variant in all_variants(name)}
    assert {(row["architecture"], row["variant"]) for row in rows} == wanted
    spills = {row["variant"]: row["spilled_bytes"] for row in rows if row["spilled_bytes"]}
    assert all("fused" in name for name in spills), "the two launches spill nothing"
    assert max(spills.values()) <= 24
    assert not [row["variant"] for row in rows if not row["blocks"]]
    without_loop = {row["variant"] for row in rows if row["loop"] is None}
    assert all(name.startswith("quantize") for name in without_loop)
