"""What ptxas makes of each kernel: instructions, registers, shared memory, blocks per processor.

    pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump
    python benchmarks/kernels_sass.py [--architecture sm89 ...] [--tools FOLDER]

Counts are of the cubins that users load (NVRTC has ptxas inside), read by nvdisasm and cuobjdump; no GPU
is needed, and nothing here is a time. The main loop is the innermost backward branch around the
maximum number of matrix products, counted from its first to its last address.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trtq.plugins.compile import cubin, nvrtc_version, sources
from trtq.plugins.variants import ARCHITECTURES, Variant, all_variants

OUT = Path(__file__).parent / "results" / "kernels_sass.json"
TABLE = Path(__file__).parent.parent / "trtq" / "selftest" / "kernels.json"
"""The part of the record that `trtq selftest` compares with, in the package."""
PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvdisasm", "nvidia-cuda-cuobjdump", "cuda-bindings")
SIZES = {
    # Threads and KiB of shared memory per processor, KiB that the system takes per block (from sm90 on,
    # the KiB is part of the kernel's static memory).
    "sm75": (1024, 64, 0),
    "sm80": (2048, 164, 1),
    "sm86": (1536, 100, 1),
    "sm89": (1536, 100, 1),
    "sm90": (2048, 228, 0),
    "sm120": (1536, 100, 0),
}
"""From the table of compute capabilities in NVIDIA's programming guide."""
REGISTERS, REGISTER_UNIT = 65_536, 256
"""Registers of a processor, and the unit in which a warp gets them."""
QUANTIZE_THREADS = 128
GUARDED = {"w8 1x1": 120, "w8": 180, "w4 1x1": 130, "w4": 185, "w4-a4 1x1": 120, "w4-a4": 180}
"""Maximum number of instructions in the main loop with the tile 128x128 on sm89, by form and kernel."""
MAX_INSTRUCTIONS = 2200
"""Maximum number of instructions of these kernels."""
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Row:
    """One variant for one architecture.

    Attributes:
        variant: name of the variant.
        architecture: architecture, e.g. `sm89`.
        instructions: instructions of the kernel, without padding at its end.
        loop: instructions of the main loop; None without matrix products.
        products: matrix products in the main loop.
        loop_opcodes: the eight commonest opcodes of the main loop.
        registers: registers of a thread.
        spilled_bytes: stack and local memory of a thread.
        shared_bytes: static and dynamic shared memory of a block.
        blocks: blocks that a processor holds, by threads, registers and shared memory.
    """

    variant: str
    architecture: str
    instructions: int
    loop: int | None
    products: int
    loop_opcodes: dict[str, int]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks: int


def digest() -> str:
    """A hash of the kernels' sources, which says whether the record is of these sources."""
    files = [sources(kernel) for kernel in ("low_bit", "quantize")]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def guarded() -> dict[Variant, int]:
    """The variants whose instructions are limited, with the limits of their main loops."""
    limits = {}
    for variant in all_variants("sm89"):
        tile = variant.tile
        if tile is None or variant.fused or (tile.m, tile.n) != (128, 128):
            continue
        form = f"w{variant.weight_bits}" + "-a4" * variant.native_4 + " 1x1" * variant.pointwise
        limits[variant] = GUARDED[form]
    return limits


def opcodes_of(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes of a kernel in nvdisasm's text, and first and last index of its loops."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = len(opcodes)
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        opcodes.append(instruction[2].partition(".")[0])
        target = _TARGET.search(instruction[3])
        if opcodes[-1] == "BRA" and target is not None and target[1] in labels:
            loops.append((labels[target[1]], len(opcodes) - 1))
    while opcodes and opcodes[-1] in ("NOP", "BRA"):  # A branch to itself, and padding.
        opcodes.pop()
    return opcodes, [loop for loop in loops if loop[1] < len(opcodes)]


def blocks_per_processor(architecture: str, threads: int, registers: int, shared: int) -> int:
    """Blocks that a processor holds at once."""
    max_threads, kib, reserved = SIZES[architecture]
    units = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // units // (threads // 32)
    by_shared = (kib << 10) // (shared + (reserved << 10)) if shared + reserved else max_threads
    return min(max_threads // threads, by_registers, by_shared)


def main_loop(opcodes: list[str], loops: list[tuple[int, int]]) -> list[str]:
    """The opcodes of the main loop; none without matrix products."""

    def products(loop: tuple[int, int]) -> int:
        return opcodes[loop[0] : loop[1] + 1].count("IMMA")

    # The maximum number of products; of nested loops, the innermost.
    main = max(loops, key=lambda loop: (products(loop), loop[0] - loop[1]), default=None)
    return opcodes[main[0] : main[1] + 1] if main is not None and products(main) else []


def measure(variant: Variant, architecture: str, tools: Path, folder: Path) -> Row:
    """Compile and read one variant."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin(variant, architecture))

    def read(*command: str) -> str:
        arguments = [str(tools / command[0]), *command[1:], str(path)]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

    opcodes, loops = opcodes_of(read("nvdisasm", "-c"))
    usage = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", read("cuobjdump", "-res-usage")
    )
    assert usage is not None
    registers, stack, static, local = map(int, usage.groups())

    body = main_loop(opcodes, loops)
    tile = variant.tile
    threads = QUANTIZE_THREADS if tile is None else tile.threads
    shared = static + variant.shared_bytes
    return Row(
        variant=str(variant),
        architecture=architecture,
        instructions=len(opcodes),
        loop=len(body) or None,
        products=body.count("IMMA"),
        loop_opcodes=dict(Counter(body).most_common(8)),
        registers=registers,
        spilled_bytes=stack + local,
        shared_bytes=shared,
        blocks=blocks_per_processor(architecture, threads, registers, shared),
    )


def tools_folder() -> Path | None:
    """Where pip has put nvdisasm; None: it is not installed."""
    programs = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvdisasm*"))
    return programs[-1].parent if programs else None


def versions(tools: Path) -> dict[str, str]:
    """Versions of the packages; those of `--tools` from the folder that pip has made."""
    installed = {}
    for name in PACKAGES:
        folders = sorted(tools.parents[2].glob(f"{name.replace('-', '_')}-*.dist-info"))
        if folders:
            installed[name] = folders[-1].name.removesuffix(".dist-info").rpartition("-")[2]
            continue
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def table_text(record: dict[str, Any]) -> str:
    """The text of `TABLE`: registers, spilled bytes, shared bytes and blocks of each variant."""
    lines = []
    for architecture in dict.fromkeys(row["architecture"] for row in record["rows"]):
        variants = {
            row["variant"]: [
                row[key] for key in ("registers", "spilled_bytes", "shared_bytes", "blocks")
            ]
            for row in record["rows"]
            if row["architecture"] == architecture
        }
        rows = ",\n".join(f"   {json.dumps(name)}: {values}" for name, values in variants.items())
        lines.append(f"  {json.dumps(architecture)}: {{\n{rows}\n  }}")
    body = ",\n".join(lines)
    nvrtc = json.dumps(record["nvrtc"])
    return f'{{\n "nvrtc": {nvrtc},\n "architectures": {{\n{body}\n }}\n}}\n'


def main() -> None:
    """Measure all variants, print a line for each, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--architecture", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES
    )
    parser.add_argument("--tools", type=Path, help="folder with nvdisasm and cuobjdump")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    given = options.tools or tools_folder()
    if given is None:
        sys.exit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump")
    tools = given.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in options.architecture:
            for variant in all_variants(architecture):
                row = measure(variant, architecture, tools, Path(folder))
                rows.append(row)
                print(
                    f"{row.architecture:6} {row.variant:32} {row.instructions:6} instructions, loop "
                    f"{row.loop or '-':>4}, {row.registers:3} registers, {row.blocks} blocks",
                    flush=True,
                )
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "nvrtc": ".".join(map(str, nvrtc_version())),
        "packages": versions(tools),
        "sources": digest(),
        "rows": [asdict(row) for row in rows],
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.out == OUT:
        TABLE.write_text(table_text(record), encoding="utf-8")


if __name__ == "__main__":
    main()
