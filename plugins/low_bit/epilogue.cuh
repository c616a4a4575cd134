// From sums to outputs. A warp converts 16 rows at a time, in the places where the products left them;
// the warp's part of shared memory turns them into vectors of 16 bytes, neighbours in the output:
//
//   sums -> y = sum (d[n] s[step]) + bias[n] (+ residual) -> SiLU -> Value -> shared -> 16-byte stores

#pragma once
#include "layer.cuh"

static constexpr int VECTOR = 16 / (int)sizeof(Value);  // Values of a store.
static constexpr int BLOCK_M = 16;
// A line of the warp's memory is an output row with channels last, otherwise an output channel. The
// padding puts what a warp writes at once into different banks.
static constexpr int LINES = CHANNELS_LAST ? BLOCK_M : WARP_N;
static constexpr int LINE = (CHANNELS_LAST ? WARP_N : BLOCK_M) + (CHANNELS_LAST || VALUE_HALF ? 8 : 4);
static constexpr int VECTORS = (CHANNELS_LAST ? WARP_N : BLOCK_M) / VECTOR;  // In a line.
static constexpr int PER_LANE = LINES * VECTORS / 32;

// What the outputs of one row share.
struct OutRow {
  float scale;
  int low, window;    // Smallest code; sum of the codes in the window.
  int image, pixel;   // -1: the row does not exist.
};

static_assert(WARP_N % 32 == 0 || LINES * VECTORS % 32 == 0, "whole warps of vectors");
static_assert(TILE_M * (int)sizeof(OutRow) + WARPS_M * WARPS_N * LINES * LINE * (int)sizeof(Value) <=
                  STAGES * STAGE_BYTES,
              "rows and outputs fit the memory of the tiles");

// `window`: the sum, if it is known.
DEVICE OutRow out_row(const Shape &s, int m, const float *tables, const i64 *step, const int *sums,
                      int group, int window) {
  OutRow out = {0.0f, 0, window, -1, 0};
  if (m >= s.rows()) return out;
  const Row row = row_of(s, m);
  const StepRow numbers = step_row(tables, s.steps, step[row.image]);
  out = {numbers.scale, (int)numbers.low, window, row.image, m - row.image * s.pixels()};
  if (!ZERO_POINTS || FUSED) return out;
  if (POINTWISE) {
    out.window = sums[(i64)m * s.groups + group];
    return out;
  }
  // Beyond the image are codes of zero.
  const int beyond = NATIVE_4 ? -out.low * s.padded() : 0;
  for (int ky = 0; ky < s.kernel_h; ++ky)
    for (int kx = 0; kx < s.kernel_w; ++kx) {
      const int y = row.top + ky * s.dilation_h, x = row.left + kx * s.dilation_w;
      const bool inside = (u32)y < (u32)s.height && (u32)x < (u32)s.width;
      const i64 pixel = ((i64)row.image * s.height + y) * s.width + x;
      out.window += inside ? sums[pixel * s.groups + group] : beyond;
    }
  return out;
}

// The terms of a thread's columns, the same for all of its rows.
struct Columns {
  float scale[WARP_N / 8][2], bias[WARP_N / 8][2];
  int zero_point[WARP_N / 8][2], total[WARP_N / 8][2];

  // n: the first column of the warp within the group.
  DEVICE Columns(const Shape &s, const float *terms, int n, int group) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = min(n + 8 * j + lane % 4 * 2 + e, s.per_group() - 1);
        const float *term = terms + group * s.per_group() + column;
        scale[j][e] = term[0];
        bias[j][e] = term[s.out_channels];
        if (ZERO_POINTS) zero_point[j][e] = (int)term[2 * s.out_channels];
        if (NATIVE_4) total[j][e] = (int)term[3 * s.out_channels];
      }
  }

  DEVICE float value(int sum, const OutRow &row, int j, int e) const {
    if (ZERO_POINTS) sum -= zero_point[j][e] * row.window;
    if (NATIVE_4) sum += row.low * total[j][e];
    return add(multiply((float)sum, multiply(scale[j][e], row.scale)), bias[j][e]);
  }
};

DEVICE float activated(float y) { return SILU ? y / (1.0f + expf(-y)) : y; }

// A warp's outputs. A lane handles the same vectors of each block of 16 rows: PER_LANE lines, LINE_STEP
// apart, from the same place on.
struct Outputs {
  static constexpr int LINE_STEP = 32 / VECTORS;

  const Shape &s;
  const OutRow *rows;  // Of the warp.
  Value *lines;        // Memory of the warp.
  const Value *residual;
  Value *out;
  int m, n, group;     // First row and column of the warp.
  bool whole;          // Whether vectors lie in one row or image, at multiples of 16 bytes.

  // The lane's first line, and the first value in it. Otherwise than with channels last, all vectors of
  // a line are stored at once, and read from different banks.
  DEVICE static int line() {
    const int lane = threadIdx.x % 32;
    return CHANNELS_LAST ? lane / VECTORS : lane % LINE_STEP;
  }
  DEVICE static int first() {
    const int lane = threadIdx.x % 32;
    return (CHANNELS_LAST ? lane % VECTORS : lane / LINE_STEP) * VECTOR;
  }

  // The index of an output in the warp's row and column.
  DEVICE i64 index(int row, int column) const {
    const int all = group * s.per_group() + n + column;
    if (CHANNELS_LAST) return (i64)(m + row) * s.out_channels + all;
    return ((i64)rows[row].image * s.out_channels + all) * s.pixels() + rows[row].pixel;
  }

  // Calls `use(place in the warp's memory, index)` for every vector, or value, that exists.
  template <class Use>
  DEVICE void each_vector(int block, Use use) const {
    const int row = block * BLOCK_M + (CHANNELS_LAST ? line() : first());
    const int column = CHANNELS_LAST ? first() : line();
    const i64 start = index(row, column);
    const i64 step = (i64)LINE_STEP * (CHANNELS_LAST ? s.out_channels : s.pixels());
    const int exist = CHANNELS_LAST ? n + column < s.per_group() ? s.rows() - m - row : 0
                      : rows[row].image < 0 ? 0 : s.per_group() - n - column;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (i * LINE_STEP < exist) use((line() + i * LINE_STEP) * LINE + first(), start + i * step);
  }
  template <class Use>
  DEVICE void each_value(int block, Use use) const {
#pragma unroll 1
    for (int i = 0; i < PER_LANE * VECTOR; ++i) {
      const int at = line() + i / VECTOR * LINE_STEP, value = first() + i % VECTOR;
      const int row = block * BLOCK_M + (CHANNELS_LAST ? at : value);
      const int column = CHANNELS_LAST ? value : at;
      if (m + row < s.rows() && n + column < s.per_group())
        use(at * LINE + value, index(row, column));
    }
  }

  DEVICE void load_residual(int block) const {
    // Values beyond the outputs are used, and not stored.
    for (int i = 0; i < PER_LANE; ++i)
      *(uint4 *)(lines + (line() + i * LINE_STEP) * LINE + first()) = make_uint4(0, 0, 0, 0);
    if (whole)
      each_vector(block, [&](int place, i64 at) {
        *(uint4 *)(lines + place) = *(const uint4 *)(residual + at);
      });
    else
      each_value(block, [&](int place, i64 at) { lines[place] = residual[at]; });
    warp_barrier();
  }

  DEVICE void store(int block) const {
    warp_barrier();
    if (whole)
      each_vector(block, [&](int place, i64 at) {
        *(uint4 *)(out + at) = *(const uint4 *)(lines + place);
      });
    else
      each_value(block, [&](int place, i64 at) { out[at] = lines[place]; });
    warp_barrier();
  }

  // Two neighbours in a row, from column `column` on.
  DEVICE void put(int row, int column, float first, float second) const {
    if (CHANNELS_LAST) {
      Value *at = lines + row * LINE + column;
#if VALUE_HALF
      *(u32 *)at = two_halves(first, second);
#else
      *(float2 *)at = make_float2(first, second);
#endif
      return;
    }
#if VALUE_HALF
    // Lanes of even rows take the first column of two rows, the others the second.
    const int odd = row % 2;
    const u32 pair = two_halves(first, second), other = from_lane((int)pair, 4);
    *(u32 *)(lines + (column + odd) * LINE + row - odd) =
        choose_bytes(pair, other, odd ? 0x3276 : 0x5410);
#else
    lines[column * LINE + row] = first, lines[(column + 1) * LINE + row] = second;
#endif
  }

  DEVICE float residual_at(int row, int column) const {
    return to_float(lines[CHANNELS_LAST ? row * LINE + column : column * LINE + row]);
  }

  // Sixteen rows: `block` of the warp.
  DEVICE void write(const int (&sums)[WARP_N / 8][4], const Columns &columns, int block) const {
    const int lane = threadIdx.x % 32;
    if (RESIDUAL) load_residual(block);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int row = 8 * upper + lane / 4;
      const OutRow &numbers = rows[block * BLOCK_M + row];
      float added[WARP_N / 8][2];
      if (RESIDUAL) {
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) added[j][e] = residual_at(row, 8 * j + lane % 4 * 2 + e);
        warp_barrier();
      }
#pragma unroll
      for (int j = 0; j < WARP_N / 8; ++j) {
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          y[e] = columns.value(sums[j][2 * upper + e], numbers, j, e);
          if (RESIDUAL) y[e] = add(y[e], added[j][e]);
          y[e] = activated(y[e]);
        }
        put(row, 8 * j + lane % 4 * 2, y[0], y[1]);
      }
    }
    store(block);
  }
};
