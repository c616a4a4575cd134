// Sizes of a layer, and what they make of the tiles; see kernel.cu.

#pragma once
#include "codes.cuh"
#include "ptx.cuh"

#if VALUE_HALF
typedef f16 Value;
#else
typedef float Value;
#endif

static constexpr int CHUNK = 16;
static constexpr int TILE_K = 64;  // Bytes of codes in a row of a tile.
static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
static constexpr int WARP_M = TILE_M / WARPS_M;
static constexpr int WARP_N = TILE_N / WARPS_N;
// Weights of 4 bits against codes of 8 bits: two k in each byte of a weight.
static constexpr bool MIXED = WEIGHT_BITS == 4 && !NATIVE_4;
static constexpr bool ZERO_POINTS = WEIGHT_BITS == 4;
static constexpr int B_ROW = MIXED ? TILE_K / 2 : TILE_K;
static constexpr int A_CHUNKS = TILE_K / CHUNK, B_CHUNKS = B_ROW / CHUNK;
static constexpr int A_BYTES = TILE_M * TILE_K;
static constexpr int STAGE_BYTES = A_BYTES + TILE_N * B_ROW;
static constexpr int A_PER_THREAD = TILE_M * A_CHUNKS / THREADS;
static constexpr int B_PER_THREAD = TILE_N * B_CHUNKS / THREADS;
// Tiles that wait in registers take what a second block would need; on Turing it has no memory either.
static constexpr int MIN_BLOCKS = ASYNCHRONOUS ? BLOCKS : 1;
// Rows of a tile between two chunks of one thread.
static constexpr int A_STEP = THREADS / A_CHUNKS, B_STEP = THREADS / B_CHUNKS;

static_assert(TILE_M * A_CHUNKS % THREADS == 0 && TILE_N * B_CHUNKS % THREADS == 0, "even loads");
static_assert(A_STEP % 8 == 0 && B_STEP % 8 == 0, "all chunks of a thread have one place in their rows");
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "whole products");
static_assert(!(FUSED && NATIVE_4), "sums per pixel come from the quantise kernel");
static_assert(!(FUSED && RESIDUAL), "the fused kernel has no residual");

struct Shape {
  int batch, height, width, channels;      // of a group
  int out_height, out_width, out_channels; // of all groups
  int groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int steps;

  DEVICE int pixels() const { return out_height * out_width; }
  DEVICE int rows() const { return batch * pixels(); }
  DEVICE int per_group() const { return (u32)out_channels / groups; }
  DEVICE int padded() const { return (channels + 31) & -32; }
  DEVICE int channel_bytes() const { return NATIVE_4 ? padded() / 2 : padded(); }
  DEVICE int taps() const { return POINTWISE ? 1 : kernel_h * kernel_w; }
  DEVICE int k_bytes() const { return taps() * channel_bytes(); }
  DEVICE int tiles() const { return (u32)(k_bytes() + TILE_K - 1) / TILE_K; }
  DEVICE int weight_row() const { return taps() * padded() * WEIGHT_BITS / 8; }
};

#define SHAPE_PARAMETERS                                                                        \
  int batch, int height, int width, int channels, int out_height, int out_width,                \
      int out_channels, int groups, int kernel_h, int kernel_w, int stride_h, int stride_w,     \
      int pad_h, int pad_w, int dilation_h, int dilation_w, int steps
#define SHAPE_VALUES                                                                            \
  {batch,    height,   width,    channels, out_height, out_width,  out_channels, groups, kernel_h, \
   kernel_w, stride_h, stride_w, pad_h,    pad_w,      dilation_h, dilation_w,   steps}

// How positions along k move in the codes, the same for all threads: by a tile, which is some whole taps
// (pixels x and y) and bytes of a further tap's channels, all together in chunks; from beyond a tap's last channel to the next
// tap; and from beyond the last column of the kernel to the next line.
struct Path {
  int tile_x, tile_y, tile_channel, tile_chunks, tap_chunks, line_chunks;
};

#define PATH_PARAMETERS                                                                         \
  int tile_x, int tile_y, int tile_channel, int tile_chunks, int tap_chunks, int line_chunks
#define PATH_VALUES {tile_x, tile_y, tile_channel, tile_chunks, tap_chunks, line_chunks}

// Blocks that divide the tiles along k of the same outputs, and what they need if there are several:
// memory for the sums of each, and a counter for each tile of outputs, zero before the launch.
#define SPLIT_PARAMETERS int splits, int *partial, int *arrived

// An output row: its image, and the first row and column of its window.
struct Row {
  int image, top, left;
};

DEVICE Row row_of(const Shape &s, int m) {
  // Without signs, divisions are shorter.
  const u32 pixels = s.pixels(), width = s.out_width, image = m / pixels, pixel = m % pixels;
  if (POINTWISE) return {(int)image, (int)pixel, 0};
  const int line = pixel / width, column = pixel % width;
  return {(int)image, line * s.stride_h - s.pad_h, column * s.stride_w - s.pad_w};
}

// Places of 16-byte chunks in a tile: the eight rows that `load_matrices` reads together, and the chunks
// that neighbouring threads write, are in different banks.
DEVICE int a_place(int row, int chunk) {
  return row * TILE_K + (chunk ^ row / 2 % A_CHUNKS) * CHUNK;
}
DEVICE int b_place(int row, int chunk) {
  if (MIXED) return row * B_ROW + (chunk ^ row / 4 % B_CHUNKS) * CHUNK;
  return a_place(row, chunk);
}
