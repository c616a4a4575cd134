"""The PTX runner: instructions against numbers from elsewhere, and the faults that it has to find."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction

import numpy as np
import pytest

from tests.conftest import shared
from tests.plugins.emulator import Memory
from tests.plugins.ptx import Builder, Program, PtxError, PtxFault, needs_ptx, translate

pytestmark = needs_ptx

HEADER = """
.version 7.0
.target sm_80
.address_size 64
.visible .entry k(
	.param .u64 k_param_0,
	.param .u64 k_param_1
)
.maxntid 64, 1, 1
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .f32 	%f<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<9>;
	.shared .align 16 .b8 tile[512];
	ld.param.u64 	%rd1, [k_param_0];
	ld.param.u64 	%rd2, [k_param_1];
	cvta.to.global.u64 	%rd1, %rd1;
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 64;
	add.s64 	%rd3, %rd1, %rd3;
	mul.wide.u32 	%rd4, %r1, 64;
	add.s64 	%rd4, %rd2, %rd4;
	mov.u32 	%r2, tile;
	shl.b32 	%r3, %r1, 4;
	add.s32 	%r3, %r2, %r3;
"""
"""Start of a kernel: rows of 64 bytes per thread at %rd3 (input) and %rd4 (output), and a place of 16
bytes in shared memory at %r3."""


@pytest.fixture(scope="session")
def builder(tmp_path_factory):
    return Builder(shared(tmp_path_factory, "ptx", lambda _: None))


def run(builder, body, rows, *, threads=32, seed=0):
    """Run a body; return the output rows, uint32[threads, 16]."""
    program = Program(builder.library(f"{HEADER}{body}\n\tret;\n}}\n"))
    memory, given = Memory(), np.zeros((threads, 16), np.uint32)
    given[: len(rows), : rows.shape[1]] = rows
    source = memory.put(given, "input")
    out = memory.put(np.full((threads, 16), 0xBADBAD, np.uint32), "output", writable=True)
    arguments = (ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    program.run(arguments, memory, threads=threads, seed=seed)
    return np.array(out)


LOAD = "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd3];\n"


def scalar(builder, operations, rows):
    """Results of several operations on %r10 to %r13 (also %f1 to %f4): uint32[threads, operations]."""
    body = LOAD + "".join(f"mov.b32 %f{n + 1}, %r{10 + n};\n" for n in range(4))
    for place, operation in enumerate(operations):
        body += f"{operation}\nst.global.u32 [%rd4+{4 * place}], %r20;\n"
    padded = np.resize(rows, (32, rows.shape[1]))  # Repeats the rows.
    return run(builder, body, padded)[: len(rows), : len(operations)]


def words(*rows):
    return np.array([[value % (1 << 32) for value in row] for row in rows], np.uint32)


def floats(values):
    return np.asarray(values, np.float32).view(np.uint32)


def test_integer_instructions(builder):
    rows = words(
        (0x80000001, 7, 3, 9),
        (0xFFFFFFFF, 0x12345678, 40, 5),
        (0x01FF80F0, -3, 31, 16),
        (-77, 10, 1, 31),
    )
    operations = [
        "mul.hi.s32 %r20, %r10, %r11;",
        "mul.hi.u32 %r20, %r10, %r11;",
        "mad.lo.s32 %r20, %r10, %r11, %r12;",
        "shr.s32 %r20, %r10, %r12;",
        "shr.u32 %r20, %r10, %r12;",
        "shl.b32 %r20, %r10, %r12;",
        "div.s32 %r20, %r10, %r11;",
        "rem.s32 %r20, %r10, %r11;",
        "bfe.s32 %r20, %r10, %r13, 8;",
        "bfe.u32 %r20, %r10, %r13, 8;",
        "bfi.b32 %r20, %r10, %r11, %r13, 6;",
        "dp4a.s32.u32 %r20, %r10, %r11, %r12;",
        "lop3.b32 %r20, %r10, %r11, %r12, 0xCA;",
        "prmt.b32 %r20, %r10, %r11, 0x9b52;",
        "shf.l.wrap.b32 %r20, %r10, %r11, %r12;",
        "{ .reg .b16 h; cvt.u16.u32 h, %r10; mul.wide.s16 %r20, h, -2; }",
    ]
    results = scalar(builder, operations, rows)
    for row, out in zip(rows.tolist(), results.tolist(), strict=True):
        a, b, c, d = row
        sa, sb = (v - (v >> 31 << 32) for v in (a, b))

        def byte(word, place, sign):
            value = word >> 8 * place & 255
            return value - (value >> 7 << 8) if sign else value

        field = a >> d & ((1 << min(8, 32 - d)) - 1)
        top = a >> min(d + 7, 31) & 1
        mask = ((1 << 6) - 1) << d & 0xFFFFFFFF
        both = b << 32 | a
        picked = [both >> 8 * p & 255 for p in (2, 5, 3, 1)]
        picked[2] = 255 * (picked[2] >> 7)
        picked[3] = 255 * (picked[3] >> 7)
        low = a & 0xFFFF
        wanted = [
            sa * sb >> 32,
            a * b >> 32,
            a * b + c,
            sa >> min(c, 31),
            a >> c if c < 32 else 0,
            a << c if c < 32 else 0,
            math.trunc(Fraction(sa, sb)),
            sa - sb * math.trunc(Fraction(sa, sb)),
            field - (top << 8 if d <= 24 else top << (32 - d)),
            field,
            b & ~mask | a << d & mask,
            c + sum(byte(a, p, True) * byte(b, p, False) for p in range(4)),
            a & b | ~a & c,
            sum(value << 8 * place for place, value in enumerate(picked)),
            ((b << 32 | a) << (c & 31)) >> 32,
            (low - (low >> 15 << 16)) * -2,
        ]
        assert out == [value % (1 << 32) for value in wanted], row


def test_a_product_and_sum_is_rounded_once_in_the_given_direction(builder):
    rng = np.random.default_rng(3)
    values = rng.standard_normal((32, 4)).astype(np.float32)
    values[::3, 2] = -values[::3, 0] * values[::3, 1]  # Nearly cancels.
    values[1] = [3, -2, 6, 0]
    modes = ("rn", "rm", "rp", "rz")
    operations = [f"fma.{mode}.f32 %f8, %f1, %f2, %f3; mov.b32 %r20, %f8;" for mode in modes]
    results = scalar(builder, operations, floats(values)).view(np.float32)
    for (a, b, c, _), out in zip(values.tolist(), results, strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        nearest, down, up, to_zero = (Fraction(float(value)) for value in out)
        assert down <= exact <= up
        assert (down == up) == (down == exact)
        assert up in (down, Fraction(float(np.nextafter(np.float32(down), np.float32(np.inf)))))
        assert abs(nearest - exact) == min(exact - down, up - exact)
        assert to_zero == (down if exact > 0 else up)
    assert np.signbit(results[1]).tolist() == [False, True, False, False], (
        "3 * -2 + 6 rounded down is -0"
    )


def test_conversions_of_floats(builder):
    values = [
        0.5,
        1.5,
        -2.5,
        3e9,
        -3e9,
        math.nan,
        math.inf,
        -0.3,
        65519.9,
        65520.0,
        6e-8,
        1e-8,
        3e-5,
    ]
    values += [1.00048828125, 2049.0 / 2048 / 16384, -7.9]
    x = np.array(values, np.float32)
    given = np.zeros((len(values), 4), np.float32)
    given[:, 0] = x
    operations = [
        "cvt.rni.f32.f32 %f8, %f1; mov.b32 %r20, %f8;",
        "cvt.rzi.s32.f32 %r20, %f1;",
        "cvt.rmi.u32.f32 %r20, %f1;",
        "cvt.sat.f32.f32 %f8, %f1; mov.b32 %r20, %f8;",
        "cvt.rn.f16.f32 %rs1, %f1; cvt.u32.u16 %r20, %rs1;",
        "cvt.rn.f16.f32 %rs1, %f1; cvt.f32.f16 %f8, %rs1; mov.b32 %r20, %f8;",
        "cvt.rzi.s32.f32 %r21, %f1; cvt.rn.f32.s32 %f8, %r21; mov.b32 %r20, %f8;",
        "cvt.rn.f16x2.f32 %r20, %f1, %f2;",
    ]
    out = scalar(builder, operations, floats(given))
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    number = ~np.isnan(x)
    canonical = np.where(number, np.round(x), np.nan)
    assert np.array_equal(out[:, 0].view(np.float32), canonical.astype(np.float32), equal_nan=True)
    limits = np.clip(np.trunc(np.nan_to_num(x.astype(np.float64))), -(2**31), 2**31 - 1)
    assert out[:, 1].view(np.int32).tolist() == limits.astype(np.int64).tolist()
    whole = np.clip(np.floor(np.nan_to_num(x.astype(np.float64))), 0, 2**32 - 1)
    assert out[:, 2].tolist() == whole.astype(np.int64).tolist()
    assert np.array_equal(out[:, 3].view(np.float32), np.clip(np.nan_to_num(x, nan=0), 0, 1))
    assert np.array_equal(out[number, 4], half.view(np.uint16)[number])
    assert out[5, 4] == 0x7FFF
    assert np.array_equal(out[number, 7], half.view(np.uint16)[number].astype(np.uint32) << 16)
    assert np.array_equal(out[:, 5].view(np.float32), half.astype(np.float32), equal_nan=True)
    assert np.array_equal(out[:, 6].view(np.float32), limits.astype(np.int32).astype(np.float32))


def test_float_comparisons_and_extremes_with_nan(builder):
    given = np.array([[1, 2], [2, 2], [math.nan, 2], [1, math.nan], [-0.0, 0.0]], np.float32)
    test = "{0} %p1, %f1, %f2; selp.u32 %r20, 1, 0, %p1;"
    names = ("lt", "ltu", "ne", "neu", "nan", "num")
    operations = [test.format(f"setp.{name}.f32") for name in names]
    operations += [f"{n}.f32 %f8, %f1, %f2; mov.b32 %r20, %f8;" for n in ("min", "max", "add")]
    out = scalar(builder, operations, floats(np.pad(given, ((0, 0), (0, 2)))))
    less, unordered = [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]
    different = [1, 0, 0, 0, 0]
    columns = [
        less,
        [a | b for a, b in zip(less, unordered, strict=True)],
        different,
        [a | b for a, b in zip(different, unordered, strict=True)],
        unordered,
        [1 - a for a in unordered],
    ]
    assert out[:, :6].T.tolist() == columns
    assert out[:, 6].view(np.float32).tolist() == [1, 2, 2, 1, -0.0]
    assert np.signbit(out[4, 6:8].view(np.float32)).tolist() == [True, False]
    assert out[2:4, 8].tolist() == [0x7FFFFFFF] * 2


SHAPES = {
    # rows, k, bits of an element
    "m8n8k16": (8, 16, 8),
    "m8n8k32": (8, 32, 4),
    "m16n8k16": (16, 16, 8),
    "m16n8k32": (16, 32, 8),
    "m16n8k32 of 4 bits": (16, 32, 4),
    "m16n8k64": (16, 64, 4),
}


def a_position(rows, k, bits, lane, i):
    """Row and column of element i of A, as the PTX ISA prints them for each shape."""
    group, t = lane >> 2, lane % 4
    if rows == 8:
        return group, t * (32 // bits) + i
    if (k, bits) == (16, 8):
        return group if i < 4 else group + 8, t * 4 + (i & 3)
    if (k, bits) == (32, 8):
        row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
        return row, t * 4 + (i & 3) + (0 if i < 8 else 16)
    if (k, bits) == (32, 4):
        return group if i < 8 else group + 8, t * 8 + (i & 7)
    row = group if 0 <= i < 8 or 16 <= i < 24 else group + 8
    return row, t * 8 + (i & 7) + (0 if i < 16 else 32)


def b_position(bits, lane, i):
    """Row and column of element i of B."""
    group, t = lane >> 2, lane % 4
    each = 32 // bits
    return t * each + i % each + (0 if i < each else 4 * each), group


def c_position(lane, i):
    """Row and column of element i of the sums."""
    return (lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)


def packed(values, bits):
    return sum((int(value) & ((1 << bits) - 1)) << bits * e for e, value in enumerate(values))


@pytest.mark.parametrize("shape", SHAPES)
def test_matrix_products_have_the_fragments_of_the_isa(builder, shape):
    """Products of the same bits as signed and as unsigned integers, of each factor."""
    rows, k, bits = SHAPES[shape]
    rng = np.random.default_rng(rows + k)
    each = 32 // bits
    a, b = rng.integers(0, 1 << bits, (rows, k)), rng.integers(0, 1 << bits, (k, 8))
    c = rng.integers(-(2**31), 2**31, (rows, 8))
    count_a, count_b, count_c = rows * k // 32 // each, 8 * k // 32 // each, rows // 4
    given = np.zeros((32, 16), np.uint32)
    for lane in range(32):
        left = [a[a_position(rows, k, bits, lane, i)] for i in range(count_a * each)]
        right = [b[b_position(bits, lane, i)] for i in range(count_b * each)]
        registers = [packed(left[each * j : each * (j + 1)], bits) for j in range(count_a)]
        registers += [packed(right[each * j : each * (j + 1)], bits) for j in range(count_b)]
        registers += [int(c[c_position(lane, i)]) % (1 << 32) for i in range(count_c)]
        given[lane, : len(registers)] = registers

    names = [f"%r{10 + n}" for n in range(count_a + count_b + count_c)]
    body = "".join(f"ld.global.u32 {name}, [%rd3+{4 * n}];\n" for n, name in enumerate(names))
    parts = [names[:count_a], names[count_a : count_a + count_b], names[count_a + count_b :]]
    left, right, sums = (f"{{{', '.join(part)}}}" for part in parts)
    products = [f"%r{30 + n}" for n in range(count_c)]
    all_signs = ("ss", "su", "us", "uu")
    for place, (sign_a, sign_b) in enumerate(all_signs):
        opcode = f"mma.sync.aligned.{shape.partition(' ')[0]}.row.col.s32"
        opcode += f".{sign_a}{bits}.{sign_b}{bits}.s32"
        body += f"{opcode} {{{', '.join(products)}}}, {left}, {right}, {sums};\n"
        for n, name in enumerate(products):
            body += f"st.global.u32 [%rd4+{16 * place + 4 * n}], {name};\n"
    out = run(builder, body, given)

    def signed(values, sign):
        return values - (values >> (bits - 1) << bits) if sign == "s" else values

    for place, (sign_a, sign_b) in enumerate(all_signs):
        wanted = (c + signed(a, sign_a) @ signed(b, sign_b)) % (1 << 32)
        for lane in range(32):
            for i in range(count_c):
                assert out[lane, 4 * place + i] == wanted[c_position(lane, i)], (lane, i)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_distributed_as_the_isa_says(builder, count, trans):
    halves = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    names = [f"%r{20 + n}" for n in range(count)]
    # Each thread stores the row that its number names from the end, and passes the address of its own.
    body = f"""{LOAD}
	xor.b32 %r4, %r1, 31;
	shl.b32 %r4, %r4, 4;
	add.s32 %r4, %r2, %r4;
	st.shared.v4.u32 [%r4], {{%r10, %r11, %r12, %r13}};
	bar.sync 0;
	ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(names)}}}, [%r3];
	""" + "".join(f"st.global.u32 [%rd4+{4 * n}], {name};\n" for n, name in enumerate(names))
    out = run(builder, body, halves.view(np.uint32))[:, :count]
    matrices = halves[::-1].reshape(4, 8, 8)[:count]
    matrices = matrices.transpose(0, 2, 1) if trans else matrices
    wanted = np.ascontiguousarray(matrices).reshape(count, 32, 2).view(np.uint32)[..., 0]
    assert np.array_equal(out, wanted.T)


def test_shuffles_and_votes(builder):
    body = LOAD
    for n, (way, b, c) in enumerate(
        [("bfly", 5, 31), ("up", 3, 0), ("down", 3, 31), ("idx", 9, 31), ("idx", 2, 0x181F)]
    ):
        body += f"shfl.sync.{way}.b32 %r20|%p1, %r10, {b}, {c}, -1; selp.u32 %r21, 1, 0, %p1;\n"
        body += f"st.global.v2.u32 [%rd4+{8 * n}], {{%r20, %r21}};\n"
    body += "setp.gt.u32 %p2, %r10, 100; vote.sync.ballot.b32 %r20, %p2, -1;\n"
    body += "st.global.u32 [%rd4+40], %r20;\n"
    values = np.arange(32, dtype=np.uint32)[:, None] * 7
    out = run(builder, body, values)
    lanes = np.arange(32)
    for n, (source, good) in enumerate(
        [
            (lanes ^ 5, lanes >= 0),
            (lanes - 3, lanes >= 3),
            (lanes + 3, lanes + 3 < 32),
            (lanes * 0 + 9, lanes >= 0),
            (lanes // 8 * 8 + 2, lanes >= 0),
        ]
    ):
        assert np.array_equal(out[:, 2 * n], np.where(good, source, lanes) * 7), n
        assert np.array_equal(out[:, 2 * n + 1], good), n
    assert (out[:, 10] == sum(1 << lane for lane in range(32) if 7 * lane > 100)).all()


COPY = "cp.async.cg.shared.global [%r3], [%rd3], 16;\n"
ALL = "cp.async.commit_group;\ncp.async.wait_group 0;\n"
READ = "ld.shared.v4.u32 {%r20, %r21, %r22, %r23}, [%r3];\n"
WRITE = "st.global.v4.u32 [%rd4], {%r20, %r21, %r22, %r23};\n"
NEXT = "xor.b32 %r4, %r3, 16;\nld.shared.u32 %r20, [%r4];\n"


def test_copies_arrive_at_the_wait_for_their_group(builder):
    rows = np.arange(32 * 16, dtype=np.uint32).reshape(32, 16)
    body = f"{COPY}{ALL}{READ}{WRITE}"
    assert np.array_equal(run(builder, body, rows)[:, :4], rows[:, :4])
    short = "cp.async.ca.shared.global [%r3], [%rd3], 16, 4;\n"
    out = run(builder, f"{short}{ALL}{READ}{WRITE}", rows)
    assert np.array_equal(out[:, 0], rows[:, 0])
    assert not out[:, 1:4].any()


FAULTS = [
    (f"{COPY}cp.async.commit_group;\n{READ}", "before the wait for a copy"),
    (f"{COPY}cp.async.commit_group;\ncp.async.wait_group 1;\n{READ}", "before the wait for a"),
    (f"{COPY}cp.async.wait_group 0;\n{READ}", "before the wait for a copy"),
    (f"{COPY}{ALL}{NEXT}", "without a barrier after the store|that nothing was written"),
    (f"{LOAD}st.shared.u32 [%r3], %r10;\n{NEXT}", "without a barrier|that nothing was written"),
    (
        f"{LOAD}st.shared.u32 [%r3], %r10;\nbar.sync 0;\n{NEXT}st.shared.u32 [%r3], %r1;",
        "(written|read) without a barrier after the (load|store) of",
    ),
    ("st.shared.u32 [tile], %r1;", "written without a barrier after the store"),
    (READ, "that nothing was written to"),
    ("st.shared.u32 [%r3+512], %r1;", "beyond the block's 512 bytes"),
    ("st.shared.v2.u32 [%r3+4], {%r1, %r1};", "8 bytes at an address that is not aligned"),
    ("cp.async.cg.shared.global [%r3], [%rd3+8], 16;", "not aligned"),
    ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r3+4];", "not aligned"),
    ("ld.global.u64 %rd5, [%rd3+4];", "8 bytes at an address that is not aligned"),
    ("ld.global.u32 %r20, [%rd1+2048];", "2048 bytes into input, which has 2048"),
    ("ld.global.u32 %r20, [%rd1+-4];", "4 bytes before input"),
    ("st.global.u32 [%rd3], %r1;", "a store to input, which is read only"),
    ("div.u32 %r20, %r1, %r1;", "division by zero"),
    ("shfl.sync.bfly.b32 %r20, %r1, 1, 31, 15;", "only all threads of a warp"),
    (
        "setp.lt.u32 %p1, %r1, 5;\n@%p1 vote.sync.ballot.b32 %r20, %p1, -1;\n"
        "@!%p1 vote.sync.ballot.b32 %r20, %p1, -1;",
        "threads of a warp wait in different instructions",
    ),
    (
        "setp.lt.u32 %p1, %r1, 5;\n@%p1 bar.sync 0;\n@!%p1 bar.sync 0;",
        "threads of a warp wait in different barriers",
    ),
    ("setp.lt.u32 %p1, %r1, 5;\n@%p1 vote.sync.ballot.b32 %r20, %p1, -1;", "wait for ever"),
]
"""Bodies, and what the runner says about them."""


def test_a_barrier_of_the_warp_orders_its_shared_memory_only(builder):
    body = """
	and.b32 %r3, %r1, 31;
	shl.b32 %r3, %r3, 4;
	add.s32 %r3, %r2, %r3;
	st.shared.u32 [%r3], %r1;
	bar.warp.sync -1;
	xor.b32 %r4, %r3, 16;
	ld.shared.u32 %r20, [%r4];
	bar.warp.sync -1;
	st.shared.u32 [%r3], %r20;
	st.global.u32 [%rd4], %r20;
	"""
    out = run(builder, body, np.zeros((1, 1), np.uint32))
    assert np.array_equal(out[:, 0], np.arange(32) ^ 1)
    with pytest.raises(PtxFault, match="without a barrier after"):  # Two warps share the memory.
        run(builder, body, np.zeros((1, 1), np.uint32), threads=64)


@pytest.mark.parametrize("case", range(len(FAULTS)), ids=[text for _, text in FAULTS])
def test_faults_are_found_in_any_order_of_threads(builder, case):
    """One kernel has all bodies, and executes the one that the last word of the input names."""
    body = "ld.global.u32 %r30, [%rd1+60];\n"
    for number, (text, _) in enumerate(FAULTS):
        body += f"setp.ne.u32 %p8, %r30, {number};\n@%p8 bra $L_{number};\n{text}\n$L_{number}:\n"
    rows = np.full((1, 16), case, np.uint32)
    for seed in range(3):
        with pytest.raises(PtxFault, match=FAULTS[case][1]):
            run(builder, body, rows, seed=seed)


def test_a_fault_names_the_line_and_the_thread(builder):
    body = "setp.eq.u32 %p1, %r1, 7;\n@%p1 st.global.u32 [%rd3], %r1;"
    line = (HEADER + body).count("\n") + 1
    with pytest.raises(PtxFault, match=rf"\(PTX line {line}, block 0,0,0, thread 7\)$"):
        run(builder, body, np.zeros((1, 1), np.uint32))


def test_more_threads_than_the_kernel_allows_are_refused(builder):
    with pytest.raises(PtxFault, match="at most 64 threads"):
        run(builder, "", np.zeros((1, 1), np.uint32), threads=96)


def test_arguments_of_other_sizes_are_refused(builder):
    program = Program(builder.library(f"{HEADER}\tret;\n}}\n"))
    with pytest.raises(PtxFault, match=r"takes arguments of \[8, 8\] bytes, got \[8, 4\]"):
        program.run((ctypes.c_void_p(0), ctypes.c_int(0)), Memory())


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        ("add.ftz.f32 %f1, %f1, %f1;", "no rule for the instruction add.ftz.f32"),
        ("add.sat.s32 %r1, %r1, %r1;", "no rule for the instruction add.sat.s32"),
        ("ld.u32 %r1, [%rd1];", "no rule for the instruction ld.u32"),
        ("bar.sync 1, 32;", "only barrier 0"),
        ("mov.u32 %r1, %clock;", "no rule for the operand '%clock'"),
        ("mov.u32 %r1, other;", "no rule for the operand 'other'"),
        ("call.uni f, (%r1);", "no rule for the instruction call.uni"),
        (".local .align 4 .b8 depot[16];", "no rule for the directive"),
        ("cp.async.cg.shared.global [%r3], [%rd3], 8;", "a copy of 8 bytes"),
        (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r1}, {%r1}, {%r1}, {%r1,%r1};",
            "another number of registers",
        ),
    ],
)
def test_what_the_runner_does_not_know_is_an_error(instruction, text):
    with pytest.raises(PtxError, match=text):
        translate(f"{HEADER}\t{instruction}\n\tret;\n}}\n")
