// Linear layer or 2-D convolution of integer codes: implicit matrix product on tensor cores.
//
//   out[m, n] = sum_k A[m, k] * W[n, k] * (d[n] * s[step]) + bias[n]      (+ residual, then SiLU)
//
// m counts images and output pixels, n the output channels of a group (blockIdx.z), k kernel rows,
// kernel columns and channels of the group, padded to 32. A linear layer is a convolution with a
// 1 x 1 kernel over an image of one column.
//
// One block computes TILE_M x TILE_N outputs and loops over k in tiles of 64 bytes:
//
//            k ->  64 B                   64 B                 each warp: WARP_M x WARP_N,
//          +---------+                 +---------+             as m16n8 products of 32 bytes
//   m      | codes   | TILE_M      n   | weights | TILE_N
//          +---------+                 +---------+
//
// Shared memory holds STAGES tiles, filled by asynchronous copies ahead of the product. The four
// chunks of 16 bytes in a row are stored in the order chunk ^ (row / 2 % 4), so the eight rows that
// `load_matrices` reads together are in different banks.
//
// Compiled once per combination of
//   VALUE_HALF   inputs and outputs are half (1) or float (0)
//   WEIGHT_BITS  8: W[n, k] are signed bytes. 4: two codes q per byte, W = q - z[n], unpacked to bytes
//                while they are loaded to shared memory (layout: trtq/plugins/low_bit/pack.py)
//   NATIVE_4     1: with WEIGHT_BITS 4, codes A are stored as u = A - lo[step] in 4 bits each, and both
//                factors are multiplied as nibbles. Then
//                  sum A W = sum u q - z[n] sum u + lo[step] sum (q - z[n])
//                where sum u over the kernel's window is computed from the sums per pixel.
//   FUSED        1: the kernel quantises A while it loads shared memory: one launch, no buffer
//   TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES
//
// Sums are int32, exact below 2^31. Scaling is in float32, with each operation rounded as in torch.

#include "codes.cuh"
#include "ptx.cuh"

#if VALUE_HALF
typedef f16 Value;
#else
typedef float Value;
#endif

static constexpr int CHUNK = 16;
static constexpr int TILE_K = 64;  // Bytes.
static constexpr int CHUNKS = TILE_K / CHUNK;
static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
static constexpr int WARP_M = TILE_M / WARPS_M;
static constexpr int WARP_N = TILE_N / WARPS_N;
static constexpr int A_BYTES = TILE_M * TILE_K;
static constexpr int STAGE_BYTES = (TILE_M + TILE_N) * TILE_K;
static constexpr int A_PER_THREAD = TILE_M * CHUNKS / THREADS;
// 16-byte chunks in one tile row of weights in global memory: half as many if the codes are
// unpacked.
static constexpr bool UNPACK = WEIGHT_BITS == 4 && !NATIVE_4;
static constexpr int B_CHUNKS = UNPACK ? CHUNKS / 2 : CHUNKS;
static constexpr int B_PER_THREAD = TILE_N * B_CHUNKS / THREADS;
// Rows that all warps compute together: blocks of 16 rows are assigned to the warps in rotation.
static constexpr int SLICE = 16 * WARPS_M;
static constexpr int MAX_COLUMNS = TILE_N + 8;

static_assert(TILE_M * CHUNKS % THREADS == 0 && TILE_N * B_CHUNKS % THREADS == 0, "even loads");
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "whole products");
static_assert(!(FUSED && NATIVE_4), "sums per pixel come from the quantise kernel");

struct Shape {
  int batch, height, width, channels;      // of a group
  int out_height, out_width, out_channels; // of all groups
  int groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int steps, flags;
};

#define SHAPE_PARAMETERS                                                                        \
  int batch, int height, int width, int channels, int out_height, int out_width,                \
      int out_channels, int groups, int kernel_h, int kernel_w, int stride_h, int stride_w,     \
      int pad_h, int pad_w, int dilation_h, int dilation_w, int steps, int flags
#define SHAPE_VALUES                                                                            \
  {batch,    height,   width,    channels, out_height, out_width,  out_channels, groups, kernel_h, \
   kernel_w, stride_h, stride_w, pad_h,    pad_w,      dilation_h, dilation_w,   steps,  flags}

static constexpr int CHANNELS_LAST = 1, SILU = 2;

// Start of an output row's window. `image` < 0: the row is beyond the last one.
struct Row {
  int image, top, left;
};

DEVICE Row row_of(const Shape &s, i64 m) {
  int pixels = s.out_height * s.out_width;
  Row row = {-1, 0, 0};
  if (m < (i64)s.batch * pixels) {
    row.image = (int)(m / pixels);
    int pixel = (int)(m % pixels);
    row.top = pixel / s.out_width * s.stride_h - s.pad_h;
    row.left = pixel % s.out_width * s.stride_w - s.pad_w;
  }
  return row;
}

// A position along k: kernel row and column, and byte within the group's channels.
struct Tap {
  int row, column, offset;
};

DEVICE void advance(Tap &tap, const Shape &s, int channel_bytes, int bytes) {
  tap.offset += bytes;
  while (tap.offset >= channel_bytes) {
    tap.offset -= channel_bytes;
    if (++tap.column == s.kernel_w) {
      tap.column = 0;
      ++tap.row;
    }
  }
}

DEVICE u8 *place(u8 *tile, int row, int chunk) {
  return tile + row * TILE_K + (chunk ^ (row / 2 % CHUNKS)) * CHUNK;
}

DEVICE void fill_16(u8 *shared, u32 word) { *(uint4 *)shared = make_uint4(word, word, word, word); }

// Four bytes with one code 0 .. 15 each, minus z, without borrows between bytes.
DEVICE u32 less_zero_point(u32 codes, u32 zero_points) {
  return ((codes | 0x80808080u) - zero_points) ^ 0x80808080u;
}

// Values shared by the outputs of one row. `image` < 0: the row does not exist.
struct OutRow {
  float scale;
  int image, pixel, low, window;
};

#if NATIVE_4
DEVICE OutRow out_row(const Shape &s, i64 m, const float *tables, const i64 *step, const int *sums,
                      int group, int padded) {
#else
DEVICE OutRow out_row(const Shape &s, i64 m, const float *tables, const i64 *step) {
#endif
  const Row row = row_of(s, m);
  OutRow out = {0.0f, row.image, (int)(m % (s.out_height * s.out_width)), 0, 0};
  if (row.image < 0) return out;
  const StepRow numbers = step_row(tables, s.steps, step[row.image]);
  out.scale = numbers.scale;
#if NATIVE_4
  out.low = (int)numbers.low;
  // Sum of u over the window; beyond the edge, u is the code of zero.
  for (int ky = 0; ky < s.kernel_h; ++ky)
    for (int kx = 0; kx < s.kernel_w; ++kx) {
      int y = row.top + ky * s.dilation_h, x = row.left + kx * s.dilation_w;
      bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
      i64 index = ((i64)row.image * s.height + y) * s.width + x;
      out.window += inside ? sums[index * s.groups + group] : -out.low * padded;
    }
#endif
  return out;
}

static_assert(SLICE * MAX_COLUMNS * 4 + TILE_M * (int)sizeof(OutRow) <= STAGES * STAGE_BYTES,
              "sums and rows fit the memory of the tiles");

// Converts sums to outputs. A thread handles eight neighbours in memory together: of one row with
// channels last, otherwise of one channel.
struct Finish {
  const Shape &s;
  const OutRow *out_rows;
  const float *terms;
  const Value *residual;
  Value *out;
  i64 first_m;
  int first_n, group, per_group;

  DEVICE Value finished(int sum, const OutRow &row, int n, i64 index) const {
    if (NATIVE_4)
      sum += row.low * (int)terms[3 * s.out_channels + n] -
             (int)terms[2 * s.out_channels + n] * row.window;
    float y = multiply((float)sum, multiply(terms[n], row.scale));
    y = add(y, terms[s.out_channels + n]);
    if (residual) y = add(y, to_float(residual[index]));
    if (s.flags & SILU) y = y / (1.0f + expf(-y));
    Value value;
    from_float(y, &value);
    return value;
  }

  DEVICE void rows(const int *slice, int columns, int first_row) const {
    const bool last = s.flags & CHANNELS_LAST;
    const int pixels = s.out_height * s.out_width;
    // Whether eight neighbours always belong to one image and their store is aligned.
    const bool whole = (last ? per_group : pixels) % 8 == 0 && (u64)out % 16 == 0;
    for (int slot = threadIdx.x; slot < SLICE * TILE_N / 8; slot += THREADS) {
      const int row = last ? slot / (TILE_N / 8) : slot % (SLICE / 8) * 8;
      const int column = last ? slot % (TILE_N / 8) * 8 : slot / (SLICE / 8);
      const OutRow &head = out_rows[first_row + row];
      const int n = group * per_group + first_n + column;
      if (head.image < 0 || first_n + column >= per_group) continue;
      const i64 start = last ? ((i64)head.image * pixels + head.pixel) * s.out_channels + n
                             : ((i64)head.image * s.out_channels + n) * pixels + head.pixel;
      __align__(16) Value values[8];
      if (whole) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int sum = slice[last ? row * columns + column + e : (row + e) * columns + column];
          const OutRow &item = last ? head : out_rows[first_row + row + e];
          values[e] = finished(sum, item, last ? n + e : n, start + e);
        }
#pragma unroll
        for (int part = 0; part < (int)sizeof(values) / 16; ++part)
          ((uint4 *)(out + start))[part] = ((const uint4 *)values)[part];
        continue;
      }
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        const OutRow &item = out_rows[first_row + (last ? row : row + e)];
        if (item.image < 0 || (last && first_n + column + e >= per_group)) break;
        const i64 index = last ? start + e
                               : ((i64)item.image * s.out_channels + n) * pixels + item.pixel;
        const int sum = slice[last ? row * columns + column + e : (row + e) * columns + column];
        out[index] = finished(sum, item, last ? n + e : n, index);
      }
    }
  }
};

#if FUSED
// Codes of sixteen channels of one input pixel; channels beyond the last are 0.
DEVICE uint4 quantized_16(const Value *x, const Shape &s, const StepRow &step, int image, i64 pixel,
                          int group, int channel) {
  i64 pixels = (i64)s.height * s.width;
  bool last = s.flags & CHANNELS_LAST;
  i64 all = (i64)s.groups * s.channels;
  i64 first = (i64)group * s.channels + channel;
  const Value *source =
      last ? x + ((i64)image * pixels + pixel) * all + first : x + (image * all + first) * pixels + pixel;
  i64 stride = last ? 1 : pixels;
  u32 words[4];
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    int codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int c = 4 * word + i;
      codes[i] = channel + c < s.channels ? code_of(to_float(source[c * stride]), step) : 0;
    }
    words[word] = four_bytes(codes);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
#endif

#if FUSED
#define A_PARAMETERS const Value *x
#else
#define A_PARAMETERS const u8 *codes, const int *sums
#endif

// codes     u8[batch, height, width, groups, ceil(channels / 32) * 32], signed bytes, or nibbles
// sums      int[batch, height, width, groups], sums of u; read only with NATIVE_4
// x         Value[batch, channels, height, width] or channels last
// weight    u8[out_channels, kernel_h, kernel_w, ceil(channels / 32) * 32], signed bytes, or nibbles
// terms     float[4, out_channels]: scale d, bias, zero point z, sum of (q - z)
// tables    float[4, steps]: scale, reciprocal, smallest code, largest code
// step      i64[batch]
// residual  Value, in the layout of out, or null
// out       Value[batch, out_channels, out_height, out_width] or channels last
extern "C" __global__ void __launch_bounds__(THREADS)
    low_bit(A_PARAMETERS, const u8 *weight, const float *terms, const float *tables,
            const i64 *step,
#if !FUSED
            const Value *residual,
#endif
            SHAPE_PARAMETERS, Value *out) {
  DYNAMIC_SHARED(shared);
  const Shape s = SHAPE_VALUES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / WARPS_N * 16, warp_n = warp % WARPS_N * WARP_N;
  const int group = blockIdx.z;
  const int per_group = s.out_channels / s.groups;
  const i64 first_m = (i64)blockIdx.y * TILE_M;
  const int first_n = blockIdx.x * TILE_N;
  const int padded = (s.channels + 31) / 32 * 32;
  const int channel_bytes = NATIVE_4 ? padded / 2 : padded;
  const int taps = s.kernel_h * s.kernel_w;
  const int k_bytes = taps * channel_bytes;
  const int weight_row = WEIGHT_BITS == 4 ? taps * padded / 2 : taps * padded;
  const int tiles = (k_bytes + TILE_K - 1) / TILE_K;

  // Loads of this thread: the same rows and chunk of each tile.
  Row rows[A_PER_THREAD];
  Tap tap = {0, 0, 0};
  int a_chunk = threadIdx.x % CHUNKS;
  advance(tap, s, channel_bytes, a_chunk * CHUNK);
  u32 outside[A_PER_THREAD];
#if FUSED
  StepRow row_steps[A_PER_THREAD];
#endif
#pragma unroll
  for (int i = 0; i < A_PER_THREAD; ++i) {
    rows[i] = row_of(s, first_m + threadIdx.x / CHUNKS + i * (THREADS / CHUNKS));
    outside[i] = 0;
    if (rows[i].image < 0) continue;
#if FUSED
    row_steps[i] = step_row(tables, s.steps, step[rows[i].image]);
#elif NATIVE_4
    // The code of zero.
    outside[i] = 0x11111111u * (u32)(int)-step_row(tables, s.steps, step[rows[i].image]).low;
#endif
  }

  auto load_a = [&](int tile) {
    u8 *destination = shared + tile % STAGES * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) {
      int row = threadIdx.x / CHUNKS + i * (THREADS / CHUNKS);
      u8 *here = place(destination, row, a_chunk);
      int y = rows[i].top + tap.row * s.dilation_h, x_ = rows[i].left + tap.column * s.dilation_w;
      if (rows[i].image < 0 || tap.row >= s.kernel_h) {
        fill_16(here, 0);
      } else if (y < 0 || y >= s.height || x_ < 0 || x_ >= s.width) {
        fill_16(here, outside[i]);
      } else {
        i64 pixel = (i64)y * s.width + x_;
#if FUSED
        *(uint4 *)here =
            quantized_16(x, s, row_steps[i], rows[i].image, pixel, group, tap.offset);
#else
        i64 index = ((i64)rows[i].image * s.height * s.width + pixel) * s.groups + group;
        copy_16(here, codes + index * channel_bytes + tap.offset);
#endif
      }
    }
    advance(tap, s, channel_bytes, TILE_K);
  };

  uint4 packed[B_PER_THREAD];
  u32 zero_points[B_PER_THREAD];
  if (UNPACK) {
#pragma unroll
    for (int i = 0; i < B_PER_THREAD; ++i) {
      int n = first_n + threadIdx.x / B_CHUNKS + i * (THREADS / B_CHUNKS);
      int all = group * per_group + n;
      zero_points[i] = n < per_group ? 0x01010101u * (u32)(int)terms[2 * s.out_channels + all] : 0;
    }
  }

  // Weights without unpacking are copied to shared memory, other weights to registers.
  auto load_b = [&](int tile) {
    u8 *destination = shared + tile % STAGES * STAGE_BYTES + A_BYTES;
    int chunk = threadIdx.x % B_CHUNKS;
    i64 offset = (i64)tile * (UNPACK ? TILE_K / 2 : TILE_K) + chunk * CHUNK;
#pragma unroll
    for (int i = 0; i < B_PER_THREAD; ++i) {
      int row = threadIdx.x / B_CHUNKS + i * (THREADS / B_CHUNKS);
      int n = first_n + row;
      bool inside = n < per_group && offset < weight_row;
      const u8 *source = weight + (i64)(group * per_group + n) * weight_row + offset;
      if (UNPACK) {
        packed[i] = inside ? *(const uint4 *)source : make_uint4(0, 0, 0, 0);
      } else if (inside) {
        copy_16(place(destination, row, chunk), source);
      } else {
        fill_16(place(destination, row, chunk), 0);
      }
    }
  };

  // A word of eight packed codes holds channels 0 .. 3 in its low nibbles and 4 .. 7 in its high
  // nibbles. Rows and chunks beyond the last become -z instead of 0; the activation codes for them
  // are 0.
  auto unpack_b = [&](int tile) {
    u8 *destination = shared + tile % STAGES * STAGE_BYTES + A_BYTES;
    int chunk = threadIdx.x % B_CHUNKS;
#pragma unroll
    for (int i = 0; i < B_PER_THREAD; ++i) {
      int row = threadIdx.x / B_CHUNKS + i * (THREADS / B_CHUNKS);
      const u32 words[4] = {packed[i].x, packed[i].y, packed[i].z, packed[i].w};
      u32 bytes[8];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        bytes[2 * word] = less_zero_point(words[word] & 0x0f0f0f0fu, zero_points[i]);
        bytes[2 * word + 1] = less_zero_point(words[word] >> 4 & 0x0f0f0f0fu, zero_points[i]);
      }
      *(uint4 *)place(destination, row, 2 * chunk) =
          make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
      *(uint4 *)place(destination, row, 2 * chunk + 1) =
          make_uint4(bytes[4], bytes[5], bytes[6], bytes[7]);
    }
  };

  int product[WARP_M / 16][WARP_N / 8][4] = {};

  auto multiply_tile = [&](int tile) {
    u8 *a_tile = shared + tile % STAGES * STAGE_BYTES, *b_tile = a_tile + A_BYTES;
#pragma unroll
    for (int half = 0; half < CHUNKS; half += 2) {
      u32 a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i)
        load_matrices(a[i], place(a_tile, SLICE * i + warp_m + lane % 16, half + lane / 16));
#pragma unroll
      for (int j = 0; j < WARP_N / 16; ++j)
        load_matrices(b[j], place(b_tile, warp_n + 16 * j + lane % 8 + lane / 16 * 8,
                                  half + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j) {
          u32 b0 = b[j / 2][j % 2 * 2], b1 = b[j / 2][j % 2 * 2 + 1];
#if NATIVE_4
          multiply_u4(product[i][j], a[i], b0, b1);
#else
          multiply_s8(product[i][j], a[i], b0, b1);
#endif
        }
    }
  };

  // The first iterations only load.
#pragma unroll 1
  for (int tile = 1 - STAGES; tile < tiles; ++tile) {
    if (tile >= 0) {
      copies_wait<STAGES - 2>();
      // All threads see this tile, and all have finished with the tile that is overwritten next.
      __syncthreads();
    }
    const int ahead = tile + STAGES - 1;
    if (ahead < tiles) {
      load_a(ahead);
      load_b(ahead);
    }
    copies_commit();
    if (tile >= 0) multiply_tile(tile);
    if (UNPACK && ahead < tiles) unpack_b(ahead);
  }

  copies_wait<0>();
  __syncthreads();

  // The memory of the tiles is reused for the sums, SLICE rows at a time, and for the rows' values.
  int *slice = (int *)shared;
  OutRow *out_rows = (OutRow *)(slice + SLICE * MAX_COLUMNS);
  for (int row = threadIdx.x; row < TILE_M; row += THREADS)
#if NATIVE_4
    out_rows[row] = out_row(s, first_m + row, tables, step, sums, group, padded);
#else
    out_rows[row] = out_row(s, first_m + row, tables, step);
#endif
#if FUSED
  const Value *residual = nullptr;
#endif
  const Finish finish = {s, out_rows, terms, residual, out, first_m, first_n, group, per_group};
  const int columns = s.flags & CHANNELS_LAST ? TILE_N + 8 : TILE_N + 1;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i) {
#pragma unroll
    for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int row = warp_m + e / 2 * 8 + lane / 4;
        slice[row * columns + warp_n + 8 * j + lane % 4 * 2 + e % 2] = product[i][j][e];
      }
    __syncthreads();
    finish.rows(slice, columns, i * SLICE);
    __syncthreads();
  }
}
