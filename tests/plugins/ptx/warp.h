// What the 32 threads of a warp do together; part of runtime.cpp.

#pragma once

// One 4-bit or 8-bit element of a register.
static int element(u32 word, u32 index, u32 bits, bool is_signed) {
  u32 field = word >> (bits * index) & ((1u << bits) - 1);
  return is_signed && field >> (bits - 1) ? (int)field - (1 << bits) : (int)field;
}

// Positions of fragments: PTX ISA, "Matrix Fragments for mma" of .s8/.u8/.s4/.u4. Register j of A holds
// row g + 8 (j % 2) at columns 4 registers' worth apart; B and C in the same way.
static void mma(Thread *lanes, u32 kind) {
  const u32 m = kind & 255, k = kind >> 8 & 255, bits = kind >> 16 & 255, each = 32 / bits;
  const bool signed_a = kind >> 24 & 1, signed_b = kind >> 25 & 1, saturate = kind >> 26 & 1;
  const u32 count_b = k / (4 * each), count_a = count_b * (m / 8);
  static int a[16][64], b[8][64];
  for (u32 l = 0; l < 32; ++l) {
    const u32 g = l / 4, t = l % 4, *in = lanes[l].in;
    for (u32 j = 0; j < count_a; ++j)
      for (u32 e = 0; e < each; ++e) {
        const u32 half = m == 16 ? j % 2 : 0, part = m == 16 ? j / 2 : j;
        a[g + 8 * half][each * t + e + 4 * each * part] = element(in[j], e, bits, signed_a);
      }
    for (u32 j = 0; j < count_b; ++j)
      for (u32 e = 0; e < each; ++e)
        b[g][each * t + e + 4 * each * j] = element(in[count_a + j], e, bits, signed_b);
  }
  for (u32 l = 0; l < 32; ++l)
    for (u32 i = 0; i < m / 4; ++i) {
      const u32 row = l / 4 + 8 * (i / 2), column = l % 4 * 2 + i % 2;
      s64 sum = (s32)lanes[l].in[count_a + count_b + i];
      for (u32 j = 0; j < k; ++j) sum += a[row][j] * b[column][j];
      if (saturate) sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
      lanes[l].out[i] = (u32)sum;
    }
}

// Matrix i of 8 x 8 halves: row r is the 16 bytes at the address of thread 8 i + r. Thread T gets elements
// 2 (T % 4) and the next of row T / 4; transposed, of column T / 4.
static void ldmatrix(Thread *lanes, u32 kind) {
  const u32 count = kind & 255;
  for (u32 l = 0; l < 32; ++l)
    for (u32 i = 0; i < count; ++i) {
      u32 word = 0;
      for (u32 e = 0; e < 2; ++e) {
        const u32 one = l / 4, other = 2 * (l % 4) + e;
        const u32 row = kind >> 8 ? other : one, column = kind >> 8 ? one : other;
        word |= (u32)get<u16>(shared + lanes[8 * i + row].in[0] + 2 * column) << 16 * e;
      }
      lanes[l].out[i] = word;
    }
}

// in: mask, value, b, c; out: value, whether the source is in range.
static void shfl(Thread *lanes, u32 kind) {
  for (int l = 0; l < 32; ++l) {
    const u32 *in = lanes[l].in;
    const int b = (int)(in[2] & 31), clamp = (int)(in[3] & 31), segment = (int)(in[3] >> 8 & 31);
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int from = kind == 'u' ? l - b : kind == 'd' ? l + b : kind == 'b' ? l ^ b : least | (b & ~segment);
    const bool good = kind == 'u' ? from >= most : from <= most;
    if (!good) from = l;
    lanes[l].out[0] = lanes[from].in[1], lanes[l].out[1] = good;
  }
}

// in: mask, predicate; out: the predicates of all.
static void vote(Thread *lanes) {
  u32 ballot = 0;
  for (int l = 0; l < 32; ++l) ballot |= (u32)(lanes[l].in[1] != 0) << l;
  for (int l = 0; l < 32; ++l) lanes[l].out[0] = ballot;
}
