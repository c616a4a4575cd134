"""Faults in the kernels' sources that the suite on the PTX runner has to find."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTATIONS", "Mutation"]

_W8 = ("tiles/w8a8-64x64-1", "two launches/w8a8-odd-nhwc")
_W4 = ("tiles/w4a8-64x64-2", "two launches/w4a8-groups-nchw")
_NATIVE = ("two launches/native-odd-nchw", "tiles/native-64x64-3")
_SUMS = ("two launches/native-odd-nhwc",)


@dataclass(frozen=True)
class Mutation:
    """A change of one source.

    Attributes:
        name: what is wrong then.
        file: name of the source, as `trtq.plugins.compile.sources` gives it.
        old: text that occurs once.
        new: text in its place.
        checks: cases of the suite, of which one at least has to fail.
        kernel: kernel whose main file is meant.
        architecture: architecture that the kernels are compiled for.
    """

    name: str
    file: str
    old: str
    new: str
    checks: tuple[str, ...] = _W8
    kernel: str = "low_bit"
    architecture: str = "sm80"


def _ptx(name: str, old: str, new: str, checks: tuple[str, ...] = _W8, **of: str) -> Mutation:
    return Mutation(name, "ptx.cuh", old, new, checks, **of)


def _product(name: str, old: str, new: str, checks: tuple[str, ...] = _W8) -> Mutation:
    return Mutation(name, "kernel.cu", old, new, checks)


def _quantize(name: str, old: str, new: str, checks: tuple[str, ...] = _SUMS) -> Mutation:
    return Mutation(name, "kernel.cu", old, new, checks, "quantize")


_INSTRUCTIONS = (
    _ptx("rows of A exchanged", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
    _ptx("halves of B exchanged", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
    _ptx(
        "sums exchanged",
        '".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"',
        '".s32 {%0, %2, %1, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %2, %1, %3};"',
    ),
    _ptx("bytes of B without sign", '"m16n8k32", "s8.s8"', '"m16n8k32", "s8.u8"'),
    _ptx("nibbles with sign", '"m16n8k64", "u4.u4"', '"m16n8k64", "s4.s4"', _NATIVE),
    _ptx(
        "small products of other rows",
        "NAME##_8(sums[2], sums[3], a[1], b0);",
        "NAME##_8(sums[2], sums[3], a[2], b0);",
        architecture="sm75",
    ),
    _ptx(
        "small products of nibbles with sign",
        '"m8n8k32", "u4.u4"',
        '"m8n8k32", "s4.s4"',
        _NATIVE,
        architecture="sm75",
    ),
    _ptx(
        "no wait for copies", 'asm volatile("cp.async.wait_group %0;" ::"n"(NEWER) : "memory");', ""
    ),
    _ptx("a wait for one group less", '"n"(NEWER)', '"n"(NEWER + 1)'),
    _ptx("no groups of copies", 'asm volatile("cp.async.commit_group;" ::: "memory");', ""),
    _ptx("half of each copy", "[%0], [%1], 16;", "[%0], [%1], 16, 8;"),
    _ptx("matrices exchanged", '{%0, %1, %2, %3}, [%4];"', '{%0, %2, %1, %3}, [%4];"'),
    _ptx("matrices transposed", "m8n8.x4.shared", "m8n8.x4.trans.shared"),
    _ptx("a neighbour that wraps", "__shfl_xor_sync", "__shfl_down_sync", _SUMS),
    _ptx("halves rounded to zero", "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
    _ptx("ties rounded up", "rintf(value)", "floorf(value + 0.5f)"),
    _ptx(
        "products and sums fused",
        "return __fmul_rn(a, b); }\nDEVICE float add(float a, float b) { return __fadd_rn(a, b); }",
        "return a * b; }\nDEVICE float add(float a, float b) { return a + b; }",
        ("fused/float-w8a8-odd-nhwc", "fused/float-w8a8-1x1-nchw"),
    ),
)
_LOOP = (
    _product(
        "no barrier before a tile is read",
        "finished with the tile that is overwritten next.\n      __syncthreads();",
        "finished with the tile that is overwritten next.\n",
    ),
    _product(
        "no barrier after the loop", "copies_wait<0>();\n  __syncthreads();", "copies_wait<0>();"
    ),
    _product("a tile ahead too many", "tile + STAGES - 1;", "tile + STAGES;"),
    _product("a stage waited for too late", "copies_wait<STAGES - 2>", "copies_wait<STAGES - 1>"),
    _product(
        "the last part of k is missing", "(k_bytes + TILE_K - 1) / TILE_K", "k_bytes / TILE_K"
    ),
    _product("a row below the image", "y >= s.height || x_ < 0", "y > s.height || x_ < 0"),
    _product("a column of weights too many", "n < per_group && offset", "n <= per_group && offset"),
    _product("a chunk of weights too many", "offset < weight_row;", "offset <= weight_row;"),
    _product(
        "a row of outputs too many", "m < (i64)s.batch * pixels", "m <= (i64)s.batch * pixels"
    ),
    _product(
        "high nibbles shifted by 3", "words[word] >> 4 & 0x0f", "words[word] >> 3 & 0x0f", _W4
    ),
    _product("halves of a chunk exchanged", "row, 2 * chunk)", "row, 2 * chunk + 1)", _W4),
    _product(
        "the zero point is added", "0x80808080u) - zero_points", "0x80808080u) + zero_points", _W4
    ),
    _product(
        "the zero point of another group", "int all = group * per_group + n;", "int all = n;", _W4
    ),
)
_EPILOGUE = (
    _product(
        "no barrier before sums are read",
        "__syncthreads();\n    finish.rows(slice, columns, i * SLICE);",
        "finish.rows(slice, columns, i * SLICE);",
    ),
    _product(
        "no barrier after sums are read",
        "finish.rows(slice, columns, i * SLICE);\n    __syncthreads();",
        "finish.rows(slice, columns, i * SLICE);",
    ),
    _product(
        "the zero point's sum has another sign",
        "terms[3 * s.out_channels + n] -\n",
        "terms[3 * s.out_channels + n] +\n",
        _NATIVE,
    ),
    _product(
        "the lowest code's sum is missing",
        "sum += row.low * (int)terms[3 * s.out_channels + n] -",
        "sum += -",
        _NATIVE,
    ),
    _product(
        "the code of zero outside of the image",
        "(u32)(int)-step_row",
        "(u32)(int)step_row",
        _NATIVE,
    ),
    _product("the window's sum outside of the image", ": -out.low * padded;", ": 0;", _NATIVE),
    _product(
        "a column of outputs too many",
        "first_n + column >= per_group) continue",
        "first_n + column > per_group) continue",
    ),
    _product(
        "a row of sums lower", "warp_m + e / 2 * 8 + lane / 4", "warp_m + e / 2 * 4 + lane / 4"
    ),
)
_CODES = (
    Mutation("codes overlap", "codes.cuh", "(u32)codes[3] << 24", "(u32)codes[3] << 16"),
    Mutation(
        "NaN is the largest code",
        "codes.cuh",
        "fminf(fmaxf(code, row.low), row.high)",
        "fmaxf(fminf(code, row.high), row.low)",
        ("not finite/w8a8",),
    ),
    Mutation(
        "a step outside is the first",
        "codes.cuh",
        "step >= 0 && step < steps",
        "step >= 0 && step <= steps",
        ("outside/w8a8",),
    ),
    _quantize("no barrier before the sums of warps", "  __syncthreads();\n", ""),
    _quantize("only two of four lanes are added", "sum += from_lane(sum, 2);", ""),
    _quantize(
        "a value beyond the channels",
        "valid >= 8 && (u64)",
        "valid >= 4 && (u64)",
        ("tokens/w8a8",),
    ),
)
MUTATIONS = (*_INSTRUCTIONS, *_LOOP, *_EPILOGUE, *_CODES)
"""All mutations; the names are unique."""
