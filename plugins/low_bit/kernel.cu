// Linear layer or 2-D convolution of integer codes: implicit matrix product on tensor cores.
//
//   out[m, n] = sum_k A[m, k] * W[n, k] * (d[n] * s[step]) + bias[n]      (+ residual, then SiLU)
//
// m counts images and output pixels, n the output channels of a group (blockIdx.z), k kernel rows,
// kernel columns and channels of the group, padded to 32. A linear layer is a convolution with a
// 1 x 1 kernel over an image of one column.
//
// One block computes TILE_M x TILE_N outputs and loops over k in tiles of 64 bytes of codes:
//
//            k ->  64 B                   64 or 32 B          each warp: WARP_M x WARP_N,
//          +---------+                 +---------+             as m16n8 products of 32 bytes
//   m      | codes   | TILE_M      n   | weights | TILE_N
//          +---------+                 +---------+
//
// Shared memory holds STAGES tiles (layer.cuh), filled by asynchronous copies ahead of the product
// (loads.cuh). epilogue.cuh makes outputs of the sums.
//
// Compiled once per combination of
//   VALUE_HALF   inputs and outputs are half (1) or float (0)
//   WEIGHT_BITS  8: W[n, k] are signed bytes.
//                4: two codes q per byte (layout: trtq/plugins/low_bit/pack.py), W = q - z[n]. They are
//                multiplied as unsigned bytes, and
//                  sum A W = sum A q - z[n] sum A
//                where sum A over the kernel's window is computed from the sums per pixel. A 32-bit word
//                of weights is what one thread of a product needs: its low nibbles are the codes of four
//                neighbours k, its high nibbles those of the next four. So A has another order of k,
//                see trtq/plugins/spec.py.
//   NATIVE_4     1: with WEIGHT_BITS 4, codes A are stored as u = A - lo[step] in 4 bits each, and both
//                factors are multiplied as nibbles. Then
//                  sum A W = sum u q - z[n] sum u + lo[step] sum (q - z[n])
//   FUSED        1: the kernel quantises A while it loads shared memory: one launch, no buffer
//   POINTWISE    1: a 1 x 1 kernel with stride 1 and without padding
//   CHANNELS_LAST, RESIDUAL, SILU   layout of values; what follows the bias
//   TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES
//
// Sums are int32, exact below 2^31. Scaling is in float32, with each operation rounded as in torch.

#include "epilogue.cuh"
#include "layer.cuh"
#include "loads.cuh"

#if FUSED
#define A_PARAMETERS const Value *x
#else
#define A_PARAMETERS const u8 *codes, const int *sums
#endif

// The products of a warp, from one stage of shared memory.
struct Products {
  Shared a, b;  // Rows that the lane passes to `load_matrices`, of the first half of k.
  int sums[WARP_M / 16][WARP_N / 8][4];

  DEVICE Products(int warp_m, int warp_n) : sums() {
    const int lane = threadIdx.x % 32;
    a = a_place(warp_m + lane % 16, lane / 16);
    b = A_BYTES + b_place(warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  DEVICE void add(Shared stage) {
    u32 words[WARP_N / 16][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Two chunks further is a change of one bit of the address.
      const u32 bit = 2 * CHUNK * half;
      const Shared a_rows = (stage + a) ^ bit, b_rows = (stage + b) ^ bit;
      u32 rows[WARP_M / 16][4];
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i) load_matrices(rows[i], a_rows + i * 16 * TILE_K);
      // With mixed products, a matrix of weights has both halves.
      if (!MIXED || half == 0)
#pragma unroll
        for (int j = 0; j < WARP_N / 16; ++j) load_matrices(words[j], b_rows + j * 16 * B_ROW);
#pragma unroll
      for (int j = 0; j < WARP_N / 8; ++j) {
        const u32 word = words[j / 2][j % 2 * 2 + (MIXED ? half : 0)];
        const u32 b0 = MIXED ? word & 0x0f0f0f0fu : word;
        const u32 b1 = MIXED ? word >> 4 & 0x0f0f0f0fu : words[j / 2][j % 2 * 2 + 1];
#pragma unroll
        for (int i = 0; i < WARP_M / 16; ++i) {
          if (NATIVE_4)
            multiply_u4_u4(sums[i][j], rows[i], b0, b1);
          else if (MIXED)
            multiply_s8_u8(sums[i][j], rows[i], b0, b1);
          else
            multiply_s8_s8(sums[i][j], rows[i], b0, b1);
        }
      }
    }
  }
};

#if !FUSED
// Adds up the sums of all blocks with the same outputs; false in all blocks but the last, which has the
// result. Integers, so the order does not matter.
//
// `parts`: int[splits, sums of a block] of these outputs.
DEVICE bool add_splits(Products &products, int split, int splits, uint4 *parts, int *arrived,
                       u8 *shared) {
  constexpr int PARTS = WARP_M / 16 * WARP_N / 8;
  auto part = [&](int of, int number) { return parts + (of * PARTS + number) * THREADS + threadIdx.x; };
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
    for (int j = 0; j < WARP_N / 8; ++j) {
      const int(&sums)[4] = products.sums[i][j];
      *part(split, i * (WARP_N / 8) + j) = make_uint4(sums[0], sums[1], sums[2], sums[3]);
    }
  publish();
  __syncthreads();
  if (threadIdx.x == 0) *(int *)shared = arrive(arrived);
  __syncthreads();
  if (*(const int *)shared != splits - 1) return false;
  publish();
#pragma unroll 1
  for (int other = 0; other < splits; ++other)
    if (other != split)
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j) {
          int(&sums)[4] = products.sums[i][j];
          const uint4 more = load_published(part(other, i * (WARP_N / 8) + j));
          sums[0] += more.x, sums[1] += more.y, sums[2] += more.z, sums[3] += more.w;
        }
  __syncthreads();
  return true;
}
#endif

// codes     u8[batch, height, width, groups, ceil(channels / 32) * 32], signed bytes, or nibbles; then,
//           with NATIVE_4, u8[batch, 16], the code of zero
// sums      int[batch, height, width, groups], sums of the codes; read only with WEIGHT_BITS 4
// x         Value[batch, channels, height, width] or channels last
// weight    u8[out_channels, kernel_h, kernel_w, ceil(channels / 32) * 32], signed bytes, or nibbles
// terms     float[4, out_channels]: scale d, bias, zero point z, sum of (q - z)
// tables    float[4, steps]: scale, reciprocal, smallest code, largest code
// step      i64[batch]
// residual  Value, in the layout of out; read only with RESIDUAL
// partial   int[tiles of outputs, splits, TILE_M * TILE_N], arrived int[tiles of outputs]: used only
//           with several splits
// out       Value[batch, out_channels, out_height, out_width] or channels last
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    low_bit(A_PARAMETERS, const u8 *weight, const float *terms, const float *tables,
            const i64 *step,
#if !FUSED
            const Value *residual,
#endif
            SHAPE_PARAMETERS,
#if !FUSED
            PATH_PARAMETERS, SPLIT_PARAMETERS,
#endif
            Value *out) {
  DYNAMIC_SHARED(shared);
  const Shape s = SHAPE_VALUES;
  const int warp = threadIdx.x / 32;
  const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
  const int first_m = blockIdx.y * TILE_M, first_n = blockIdx.x * TILE_N;
#if FUSED
  const int first_tile = 0, end_tile = s.tiles(), splits = 1;
  const Path path = fused_path(s);
  Activations a(s, path, x, tables, step, first_m, blockIdx.z);
  const int *sums = nullptr;
  const Value *residual = nullptr;
  const Shared a_target = 0;
#else
  const u32 part = blockIdx.z % splits;
  const int first_tile = s.tiles() * part / splits, end_tile = s.tiles() * (part + 1) / splits;
  const u32 zeros = (u32)s.batch * s.height * s.width * s.groups * (s.channel_bytes() / CHUNK);
  const Path path = PATH_VALUES;
  Activations a(s, path, codes, zeros, first_m, blockIdx.z / splits);
  const Shared a_target = a_place(threadIdx.x / A_CHUNKS, threadIdx.x % A_CHUNKS);
#endif
  Weights b(s, weight, first_n, blockIdx.z / splits);
  const Shared b_target = A_BYTES + b_place(threadIdx.x / B_CHUNKS, threadIdx.x % B_CHUNKS);
#if !FUSED
  a.skip(first_tile, end_tile < s.tiles());
  b.skip(first_tile, end_tile < s.tiles());
#endif
  const int tiles = end_tile - first_tile;
  Products products(warp_m, warp_n);

  // Starts of the stages that are multiplied and filled next.
  const Shared first_stage = shared_address(shared);
  const Shared last_stage = first_stage + (STAGES - 1) * STAGE_BYTES;
  Shared stage = first_stage, ahead = first_stage;
#pragma unroll 1
  for (int tile = 0; tile < STAGES - 1; ++tile) {
    if (tile < tiles) {
      a.fetch(ahead + a_target, tile == tiles - 1);
      b.fetch(ahead + b_target, tile == tiles - 1);
      a.keep(ahead + a_target);
      b.keep(ahead + b_target);
    }
    copies_commit();
    ahead += STAGE_BYTES;
  }
#pragma unroll 1
  for (int left = tiles; left > 0; --left) {
    copies_wait<STAGES - 2>();
    // All threads see this tile, and all have finished with the tile that is overwritten next.
    __syncthreads();
    if (left >= STAGES) {
      a.fetch(ahead + a_target, left == STAGES);
      b.fetch(ahead + b_target, left == STAGES);
    }
    copies_commit();
    products.add(stage);
    if (left >= STAGES) {
      a.keep(ahead + a_target);
      b.keep(ahead + b_target);
    }
    ahead = stage;
    stage = stage == last_stage ? first_stage : stage + STAGE_BYTES;
  }
  copies_wait<0>();
  __syncthreads();
  const int z = block_z(), group = (u32)z / splits, split = z - group * splits;
#if !FUSED
  if (splits > 1) {
    const int number = (group * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    uint4 *parts = (uint4 *)partial + (i64)number * splits * (TILE_M * TILE_N / 4);
    if (!add_splits(products, split, splits, parts, arrived + number, shared)) return;
  }
#endif

  // The memory of the tiles is reused for the rows' values and for outputs.
  OutRow *rows = (OutRow *)shared;
  Value *lines = (Value *)(rows + TILE_M) + warp * LINES * LINE;
#if FUSED
  int *windows = (int *)(rows + TILE_M);
  if (MIXED) {
    a.write_sums(windows);
    __syncthreads();
  }
#endif
  for (int row = threadIdx.x; row < TILE_M; row += THREADS) {
#if FUSED
    const int window = MIXED ? windows[row] : 0;
#else
    const int window = 0;
#endif
    rows[row] = out_row(s, first_m + row, tables, step, sums, group, window);
  }
  __syncthreads();
  const int neighbours = CHANNELS_LAST ? s.per_group() : s.pixels();
  const bool whole = neighbours % VECTOR == 0 && ((u64)out | (RESIDUAL ? (u64)residual : 0)) % 16 == 0;
  const Columns columns(s, terms, first_n + warp_n, group);
  const Outputs outputs = {s, rows + warp_m, lines, residual, out, first_m + warp_m,
                           first_n + warp_n, group, whole};
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i) outputs.write(products.sums[i], columns, i);
}
