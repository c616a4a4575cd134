"""Faults in the kernels' sources that the suite on the PTX runner has to find."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTATIONS", "Mutation"]

_W8 = ("tiles/w8a8-64x64-1", "two launches/w8a8-odd-nhwc")
_W4 = ("tiles/w4a8-64x64-2", "two launches/w4a8-groups-nchw")
_NATIVE = ("two launches/native-odd-nchw", "tiles/native-64x64-3")
_SUMS = ("two launches/native-odd-nhwc",)
_TURING = ("tiles/w8a8-64x64-1", "tiles/w8a8-64x64-2")
_DIVIDED = ("splits/w8a8-odd-64-3", "splits/w4a8-1x1-64-3")
_LINEAR = ("tiles/w8a8-64x64-2", "tokens/w8a8", "two launches/w8a8-1x1-nchw")
_FUSED = ("fused/half-w4a8-odd-nchw", "two stages/w4a8-3")
_RESIDUAL = (
    "residual/whole stores-w8a8-nchw",
    "residual/single stores-w8a8-nchw",
    "residual/whole stores-w8a8-nhwc",
)
_FLOAT = ("residual/float-whole stores-nhwc", "residual/float-whole stores-nchw")


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


def _product(
    name: str, old: str, new: str, checks: tuple[str, ...] = _W8, file: str = "kernel.cu", **of: str
) -> Mutation:
    return Mutation(name, file, old, new, checks, **of)


def _loads(name: str, old: str, new: str, checks: tuple[str, ...] = _W8, **of: str) -> Mutation:
    return _product(name, old, new, checks, "loads.cuh", **of)


def _epilogue(name: str, old: str, new: str, checks: tuple[str, ...] = _W8, **of: str) -> Mutation:
    return _product(name, old, new, checks, "epilogue.cuh", **of)


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
    _ptx("half of each copy", '"r"(inside ? 16 : 0)', '"r"(inside ? 8 : 0)'),
    _ptx("no zeros beyond the image", '"r"(inside ? 16 : 0)', '"r"(16)'),
    _ptx(
        "codes without sign",
        'multiply_s8_u8, "m16n8k32", "s8.u8"',
        'multiply_s8_u8, "m16n8k32", "u8.u8"',
        _W4,
    ),
    _ptx("halves of a pair exchanged", '"f"(second), "f"(first)', '"f"(first), "f"(second)'),
    _ptx(
        "halves of a pair exchanged on Turing",
        "return low | (u32)high << 16;",
        "return high | (u32)low << 16;",
        _TURING,
        architecture="sm75",
    ),
    _ptx(
        "no zeros beyond k on Turing",
        "  kept = make_uint4(0, 0, 0, 0);\n  if (inside) kept",
        "  kept",
        _TURING,
        architecture="sm75",
    ),
    _ptx("a byte counts twice", "0x01010101, sum)", "0x01010102, sum)", _FUSED),
    _ptx("no barrier of a warp", "{ __syncwarp(); }", "{}"),
    _ptx("matrices exchanged", 'b16 {%0, %1, %2, %3}, [%4];"', 'b16 {%0, %2, %1, %3}, [%4];"'),
    _ptx("matrices transposed", "m8n8.x4.shared", "m8n8.x4.trans.shared"),
    _ptx("a neighbour that wraps", "__shfl_xor_sync", "__shfl_down_sync", _SUMS),
    _ptx("halves rounded to zero", "cvt.rn.f16x2.f32", "cvt.rz.f16x2.f32"),
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
        "finished with the tile that is overwritten next.\n    __syncthreads();",
        "finished with the tile that is overwritten next.\n",
    ),
    _product(
        "no barrier after the loop",
        "copies_wait<0>();\n  __syncthreads();",
        "copies_wait<0>();",
        # The last tile lies where the rows' values are written.
        ("two launches/w8a8-1x1-nhwc",),
    ),
    _product(
        "a tile too many",
        "if (left >= STAGES) {\n      a.fetch",
        "if (left > STAGES - 2) {\n      a.fetch",
    ),
    _product("a stage waited for too late", "copies_wait<STAGES - 2>", "copies_wait<STAGES - 1>"),
    _product(
        "a stage too few", "stage == last_stage ? first_stage", "stage >= first_stage ? first_stage"
    ),
    _product(
        "the tile after the next is overwritten", "ahead = stage;", "ahead = stage + STAGE_BYTES;"
    ),
    _product(
        "the last tile is like others",
        "b.fetch(ahead + b_target, left == STAGES);",
        "b.fetch(ahead + b_target, false);",
    ),
    _product(
        "tiles are not kept on Turing",
        "      a.keep(ahead + a_target);\n      b.keep(ahead + b_target);\n    }\n    ahead",
        "    }\n    ahead",
        _TURING,
        architecture="sm75",
    ),
    _product("high nibbles shifted by 3", "word >> 4 & 0x0f", "word >> 3 & 0x0f", _W4),
    _product(
        "low nibbles with neighbours",
        "MIXED ? word & 0x0f0f0f0fu",
        "MIXED ? word & 0x1f0f0f0fu",
        _W4,
    ),
    _product("halves of weights exchanged", "(MIXED ? half : 0)]", "(MIXED ? 1 - half : 0)]", _W4),
    _product("the other half of k", "bit = 2 * CHUNK * half;", "bit = CHUNK * half;"),
    _product(
        "the last part of k is missing",
        "(k_bytes() + TILE_K - 1) / TILE_K",
        "k_bytes() / TILE_K",
        file="layer.cuh",
    ),
    _loads(
        "a row below the image",
        "(u32)y < (u32)s.height && (u32)x <",
        "(u32)y <= (u32)s.height && (u32)x <",
    ),
    _loads(
        "a column right of the image",
        "(u32)x < (u32)s.width;",
        "(u32)x <= (u32)s.width;",
        ("two launches/w8a8-odd-nhwc", "tiles/w8a8-64x64-1"),
    ),
    _loads(
        "a chunk of weights too many",
        "chunk < k_chunks - (s.tiles() - 1) * B_CHUNKS",
        "chunk <= k_chunks - (s.tiles() - 1) * B_CHUNKS",
        (*_LINEAR, *_W8),
    ),
    _loads(
        "a chunk of codes too many",
        "chunk < k_chunks - (s.tiles() - 1) * A_CHUNKS",
        "chunk <= k_chunks - (s.tiles() - 1) * A_CHUNKS",
        _LINEAR,
    ),
    _loads(
        "a column of weights too many",
        "i * B_STEP, s.per_group() - 1)",
        "i * B_STEP, s.per_group())",
        _LINEAR,
    ),
    _loads(
        "the next tap one byte late", "channel >= s.channel_bytes()", "channel > s.channel_bytes()"
    ),
    _loads(
        "the next line one tap late",
        "x >= s.kernel_w * s.dilation_w",
        "x > s.kernel_w * s.dilation_w",
    ),
    _loads("no dilation along y", "y += s.dilation_h;", "++y;", ("two launches/w8a8-odd-nhwc",)),
    _loads(
        "every thread begins with the first chunk",
        "chunk <= (int)threadIdx.x % A_CHUNKS",
        "chunk < (int)threadIdx.x % A_CHUNKS",
    ),
    _loads(
        "the first group's codes",
        "(pixel * s.groups + group) * tap;",
        "(pixel * s.groups) * tap;",
        ("two launches/w8a8-groups-nhwc",),
    ),
    _loads(
        "the first group's weights",
        "(u32)(group * s.per_group() + n) * k_chunks",
        "(u32)n * k_chunks",
        ("two launches/w8a8-groups-nhwc",),
    ),
    _loads(
        "another image's code of zero",
        "outside[i] = zeros + row.image;",
        "outside[i] = zeros;",
        _NATIVE,
    ),
    _loads("zeros outside of the image", "NATIVE_4 || inside, kept", "inside, kept", _NATIVE),
    _loads("channels in the order of bytes", "(MIXED ? 4 : 16) * half", "16 * half", _FUSED),
    _loads("the sum of one lane less", "      sums[i] += from_lane(sums[i], 2);\n", "", _FUSED),
)
_SPLITS = (
    _product("a split too early", "!= splits - 1) return", "!= splits - 2) return", _DIVIDED),
    _product("the first split twice", "if (other != split)", "if (other != 0)", _DIVIDED),
    _product(
        "no barrier before the rows' values",
        "  __syncthreads();\n  return true;",
        "  return true;",
        _DIVIDED,
    ),
    _product(
        "a split begins a tile late",
        "s.tiles() * part / splits, end",
        "s.tiles() * part / splits + 1, end",
        _DIVIDED,
    ),
    _product("codes of the first split", "  a.skip(first_tile,", "  a.skip(0,", _DIVIDED),
    _product("weights of the first split", "  b.skip(first_tile,", "  b.skip(0,", _DIVIDED),
    _product(
        "no split has the end of k",
        "b.skip(first_tile, end_tile < s.tiles())",
        "b.skip(first_tile, true)",
        ("splits/w4a8-3x3-128-3", "splits/native-3x3-64-4"),
    ),
    _quantize("counters are not zero", "    counters[i] = 0;", "    ;", _DIVIDED),
)
_EPILOGUE = (
    _epilogue(
        "no barrier before vectors are read",
        "DEVICE void store(int block) const {\n    warp_barrier();",
        "DEVICE void store(int block) const {",
    ),
    _epilogue(
        "no barrier after vectors are read",
        "out[at] = lines[place]; });\n    warp_barrier();",
        "out[at] = lines[place]; });",
    ),
    _epilogue(
        "no barrier after the residual is read",
        "8 * j + lane % 4 * 2 + e);\n        warp_barrier();",
        "8 * j + lane % 4 * 2 + e);",
        _RESIDUAL,
    ),
    _epilogue(
        "no barrier before the residual is read",
        "lines[place] = residual[at]; });\n    warp_barrier();",
        "lines[place] = residual[at]; });",
        _RESIDUAL,
    ),
    _epilogue(
        "rows and columns of the residual exchanged",
        "? row * LINE + column : column * LINE + row]",
        "? row * LINE + column : column * LINE + row + 1]",
        _RESIDUAL,
    ),
    _epilogue("the zero point is added", "sum -= zero_point", "sum += zero_point", _W4),
    _epilogue("the zero point of another group", "group * s.per_group() + column;", "column;", _W4),
    _epilogue(
        "the zero point of a neighbour",
        "term[2 * s.out_channels];",
        "term[2 * s.out_channels - 1];",
        _W4,
    ),
    _epilogue(
        "the lowest code's sum is missing",
        "if (NATIVE_4) sum += row.low * total[j][e];",
        "",
        _NATIVE,
    ),
    _epilogue(
        "the window's sum outside of the image", "? -out.low * s.padded() : 0", "? 0 : 0", _NATIVE
    ),
    _epilogue(
        "a window of one column less",
        "kx < s.kernel_w; ++kx",
        "kx + 1 < s.kernel_w; ++kx",
        ("two launches/w4a8-odd-nchw",),
    ),
    _epilogue(
        "a row below the image in the window",
        "(u32)y < (u32)s.height",
        "(u32)y <= (u32)s.height",
        ("two launches/w4a8-odd-nchw", "tiles/w4a8-64x64-1"),
    ),
    _epilogue(
        "another group's sums", "sums[pixel * s.groups + group]", "sums[pixel * s.groups]", _W4
    ),
    _epilogue(
        "a column of outputs too many",
        "? n + column < s.per_group() ?",
        "? n + column <= s.per_group() ?",
        ("tiles/w8a8-64x64-2",),
    ),
    _epilogue(
        "a channel of outputs too many",
        "0 : s.per_group() - n - column;",
        "0 : s.per_group() - n - column + 1;",
        ("residual/whole stores-w8a8-nchw", "tiles/w8a8-64x64-0"),
    ),
    _epilogue(
        "a row of outputs beyond the image",
        "s.rows() - m - row : 0",
        "s.rows() - m - row + 1 : 0",
        ("tiles/w8a8-64x64-2", "tiles/w8a8-64x64-3"),
    ),
    _epilogue(
        "a value of outputs too many",
        "if (m + row < s.rows() && n + column < s.per_group())",
        "if (m + row < s.rows() && n + column <= s.per_group())",
        ("two launches/w8a8-odd-nhwc", "residual/single stores-w8a8-nhwc"),
    ),
    _epilogue(
        "lanes of a pair exchanged",
        "odd ? 0x3276 : 0x5410",
        "odd ? 0x7632 : 0x1054",
        ("tiles/w8a8-64x64-1",),
    ),
    _epilogue(
        "a row of sums lower",
        "const int row = 8 * upper + lane / 4;",
        "const int row = 4 * upper + lane / 4;",
    ),
    _epilogue(
        "the second float of a pair",
        "make_float2(first, second)",
        "make_float2(second, first)",
        _FLOAT,
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
        "valid >= 4 && (u64)",
        "valid >= 2 && (u64)",
        ("tokens/w8a8",),
    ),
    _quantize(
        "codes in the order of channels", "number % 4 * 8 + number / 4 * 4", "4 * number", _W4
    ),
    _quantize(
        "the code of zero for the first image",
        "((uint4 *)zeros)[image] =",
        "((uint4 *)zeros)[0] =",
        _NATIVE,
    ),
    _quantize(
        "the code of zero has another sign", "(u32)(int)-row.low", "(u32)(int)row.low", _NATIVE
    ),
    _quantize(
        "a sum of one code less",
        "i < (NATIVE_4 ? 8 : 4); ++i) sum",
        "i < (NATIVE_4 ? 7 : 3); ++i) sum",
        ("two launches/w4a8-odd-nchw",),
    ),
)
MUTATIONS = (*_INSTRUCTIONS, *_LOOP, *_SPLITS, *_EPILOGUE, *_CODES)
"""All mutations; the names are unique."""
