"""The tile and the splits of a product, by a model of the processor's time that knows resident blocks.

The model is a prediction that orders tiles; its numbers are not measurements. Everything is in clock
cycles of one processor (streaming multiprocessor) with four schedulers:

    block = start + tiles along k * tile + epilogue - overlap
    tile  = the longest of: products, instructions, shared memory and L2 of all resident blocks, and the
            products of one block after the latency of its loads

Two resident blocks overlap one's epilogue with the other's products, by half of the shorter of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from trtq.plugins.spec import Problem
from trtq.plugins.variants import TILE_BYTES, TILES, Tile, fits

__all__ = [
    "Plan",
    "Processor",
    "block_cycles",
    "choose_plan",
    "layer_cycles",
    "loop_instructions",
    "processor",
    "resident_blocks",
]

_START, _LATENCY = 1800, 300
"""Cycles before a block's first product, and from a tile's barrier to its first product."""
_ISSUE = 0.85
"""Instructions per cycle of a scheduler."""
_L2_BYTES, _SHARED_BYTES = 48, 128
"""Bytes per cycle from the L2 cache and from shared memory."""
_EPILOGUE_FIXED, _EPILOGUE_PER_SUM = 300, 13
"""Instructions of a warp after the last product, per thread and per sum of a thread: see
`benchmarks/kernels_sass.py`."""
_LOOP_FIXED, _LOOP_PACKED = 55, 1.5
"""Instructions of a warp in a tile without products: fixed, and for a word of packed weights."""

_SPLITS, _TILES_PER_SPLIT = (1, 2, 3, 4, 6, 8), 4
"""Possible numbers of splits, and the fewest tiles of one."""


@dataclass(frozen=True)
class Processor:
    """What the model knows of an architecture's processors.

    Attributes:
        product_cycles: cycles of a 16 x 8 x 32-byte product on one of four tensor cores.
        shared_kib: shared memory, in KiB.
        threads: number of threads.
    """

    product_cycles: float
    shared_kib: int
    threads: int


_PROCESSORS = {
    "sm75": Processor(16, 64, 1024),
    "sm80": Processor(8, 164, 2048),
    "sm87": Processor(16, 164, 1536),
    # mma.sync reaches 63 % of Hopper's tensor cores, arXiv 2402.13499.
    "sm90": Processor(6.4, 228, 2048),
    "sm100": Processor(6.4, 228, 2048),
}
_LATER = Processor(16, 100, 1536)


def processor(architecture: str) -> Processor:
    """The processor of an architecture, from NVIDIA's tables; unknown ones are like a GeForce."""
    return _PROCESSORS.get(architecture, _LATER)


def resident_blocks(tile: Tile, architecture: str, *, packed: bool) -> int:
    """Number of blocks that a processor holds at once, by registers, shared memory and threads."""
    of = processor(architecture)
    by_memory = (of.shared_kib << 10) // (tile.shared_bytes(packed=packed) + 1024)
    return max(1, min(tile.blocks, by_memory, of.threads // tile.threads))


def loop_instructions(tile: Tile, *, packed: bool) -> float:
    """Number of instructions of a warp in one turn of the main loop, for all kinds of kernels."""
    rows, columns = tile.m // tile.warps_m, tile.n // tile.warps_n
    matrices = 2 * rows / 16 + 2 * columns / 16
    unpacked = _LOOP_PACKED * columns / 4 * 2 if packed else 0.0
    return _products(tile) + matrices + _LOOP_FIXED + unpacked


def _products(tile: Tile) -> int:
    """Number of products of a warp in a tile along k."""
    return tile.m // tile.warps_m // 16 * (tile.n // tile.warps_n // 8) * 2


def block_cycles(tile: Tile, tiles: int, blocks: int, of: Processor, *, packed: bool) -> float:
    """Predicted cycles of `blocks` resident blocks that run together.

    Args:
        tile: tile of the product.
        tiles: number of tiles along k.
        blocks: number of resident blocks.
        of: the processor.
        packed: whether bytes of codes meet packed nibbles of weights.
    """
    warps = tile.warps_m * tile.warps_n
    rows, columns = tile.m // tile.warps_m, tile.n // tile.warps_n
    issue = warps / 4 * loop_instructions(tile, packed=packed) / _ISSUE
    weights = TILE_BYTES // 2 if packed else TILE_BYTES
    copied = tile.m * TILE_BYTES + tile.n * weights
    read = warps * (rows * TILE_BYTES + columns * weights)
    alone = warps / 4 * _products(tile) * of.product_cycles
    loop = tiles * max(
        blocks * alone,
        blocks * issue,
        blocks * (copied + read) / _SHARED_BYTES,
        blocks * copied / _L2_BYTES,
        alone + _LATENCY,
    )
    sums = tile.m * tile.n / tile.threads
    epilogue = blocks * warps / 4 * (_EPILOGUE_FIXED + _EPILOGUE_PER_SUM * sums) / _ISSUE
    overlap = min(loop, epilogue) / 2 if blocks > 1 else 0.0
    return _START + loop + epilogue - overlap


@dataclass(frozen=True)
class Plan:
    """How the product kernel divides a call.

    Attributes:
        tile: outputs of a block.
        splits: number of blocks that divide the tiles along k of the same outputs.
    """

    tile: Tile
    splits: int = 1


def layer_cycles(
    problem: Problem,
    plan: Plan,
    processors: int,
    architecture: str,
    *,
    packed: bool,
    native_4: bool,
) -> float:
    """Predicted cycles of the product kernel of a call; arguments are those of `choose_plan`."""
    tile = plan.tile
    blocks = problem.blocks(tile) * plan.splits
    tiles = -(-problem.k_tiles(native_4=native_4) // plan.splits)
    resident = resident_blocks(tile, architecture, packed=packed)
    of = processor(architecture)
    waves, rest = divmod(-(-blocks // processors), resident)
    cycles = waves * block_cycles(tile, tiles, resident, of, packed=packed)
    cycles += block_cycles(tile, tiles, rest, of, packed=packed) if rest else 0.0
    if plan.splits > 1:
        # Each block writes its sums; the last one reads those of the others.
        cycles += plan.splits * 4 * tile.m * tile.n / _L2_BYTES + _START
    return cycles


def choose_plan(
    problem: Problem,
    processors: int,
    architecture: str,
    *,
    packed: bool,
    native_4: bool = False,
    scratch_bytes: int = 0,
) -> Plan:
    """The plan with the fewest predicted cycles.

    Args:
        problem: sizes of the call.
        processors: number of streaming multiprocessors of the GPU.
        architecture: architecture of the GPU.
        packed: whether bytes of codes meet packed nibbles of weights.
        native_4: whether both factors are nibbles.
        scratch_bytes: size of the memory for sums, see `Problem.split_bytes`; 0: no splits.
    """
    tiles = problem.k_tiles(native_4=native_4)

    def possible(plan: Plan) -> bool:
        if plan.splits == 1:
            return fits(plan.tile, architecture)
        enough = problem.plan_bytes(plan.tile, plan.splits) <= scratch_bytes
        return enough and fits(plan.tile, architecture) and tiles >= _TILES_PER_SPLIT * plan.splits

    def cycles(plan: Plan) -> float:
        return layer_cycles(
            problem, plan, processors, architecture, packed=packed, native_4=native_4
        )

    plans = [Plan(tile, splits) for tile in TILES for splits in _SPLITS]
    return min(filter(possible, plans), key=cycles)
