// Loads of a thread: the same rows and chunk of each tile, from one tile to the next. Codes and weights
// are counted in chunks of 16 bytes, so 32 bits are enough for 64 GiB.

#pragma once
#include "layer.cuh"

DEVICE const u8 *chunk_at(const u8 *base, u32 chunk) { return base + (u64)chunk * CHUNK; }

// A position along k in a convolution: pixel relative to the window's first, byte within the group's
// channels, and both as chunks from the group's first channel in the window's first pixel.
struct Position {
  int x = 0, y = 0, channel = 0, chunks = 0;

  // The position of a thread in the first tile.
  DEVICE Position(const Shape &s, const Path &path) {
#pragma unroll
    for (int chunk = 1; chunk < A_CHUNKS; ++chunk)
      if (chunk <= (int)threadIdx.x % A_CHUNKS) {
        channel += CHUNK, ++chunks;
        carry(s, path);
      }
  }

  DEVICE void carry(const Shape &s, const Path &path) {
    if (channel >= s.channel_bytes()) {
      channel -= s.channel_bytes(), chunks += path.tap_chunks;
      x += s.dilation_w;
    }
    if (x >= s.kernel_w * s.dilation_w) {
      x -= s.kernel_w * s.dilation_w, chunks += path.line_chunks;
      y += s.dilation_h;
    }
  }

  DEVICE void advance(const Shape &s, const Path &path) {
    x += path.tile_x, y += path.tile_y, channel += path.tile_channel, chunks += path.tile_chunks;
    carry(s, path);
  }
};

#if FUSED
// The fused kernel has no codes in memory, so chunks do not count.
DEVICE Path fused_path(const Shape &s) {
  const int tap = TILE_K / s.channel_bytes();
  return {tap % s.kernel_w * s.dilation_w, tap / s.kernel_w * s.dilation_h, TILE_K % s.channel_bytes(),
          0, 0, 0};
}

// Codes of the activations, quantised between global and shared memory.
struct Activations {
  const Shape &s;
  const Path &path;
  const Value *x;
  Position position;
  int group;
  const float *tables;
  const i64 *step;
  Row rows[A_PER_THREAD];
  int sums[A_PER_THREAD];

  DEVICE Activations(const Shape &s, const Path &path, const Value *x, const float *tables,
                     const i64 *step, int first_m, int group)
      : s(s), path(path), x(x), position(s, path), group(group), tables(tables), step(step) {
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) {
      rows[i] = row_of(s, min(first_m + (int)threadIdx.x / A_CHUNKS + i * A_STEP, s.rows() - 1));
      sums[i] = 0;
    }
  }

  // Stores sixteen codes of a pixel in the order of the quantise kernel, and returns their sum. Codes
  // beyond the channels, and those without a pixel, are 0.
  DEVICE int store(Shared target, const Value *pixel, i64 stride, const StepRow &row) const {
    const int block = position.channel / 32 * 32, half = position.channel / 16 % 2;
    int channel = block + (MIXED ? 4 : 16) * half, sum = 0;
    const Value *value = pixel + channel * stride;
#pragma unroll 2
    for (int word = 0; word < 4; ++word) {
      int codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i, ++channel, value += stride)
        codes[i] = pixel && channel < s.channels ? code_of(to_float(*value), row) : 0;
      const u32 bytes = four_bytes(codes);
      if (MIXED) sum = add_bytes(bytes, sum), channel += 4, value += 4 * stride;
      store_4(target + 4 * word, bytes);
    }
    return sum;
  }

  DEVICE void fetch(Shared stage, bool) {
    const i64 pixels = (i64)s.height * s.width, all = (i64)s.groups * s.channels;
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) {
      const int y = rows[i].top + position.y, x_ = rows[i].left + position.x;
      const bool inside = position.y < s.kernel_h * s.dilation_h && (u32)y < (u32)s.height &&
                          (u32)x_ < (u32)s.width;
      const i64 pixel = (i64)y * s.width + x_, first = (i64)group * s.channels;
      const Value *source =
          CHANNELS_LAST ? x + (rows[i].image * pixels + pixel) * all + first
                        : x + (rows[i].image * all + first) * pixels + pixel;
      const int row = threadIdx.x / A_CHUNKS + i * A_STEP;
      sums[i] += store(stage + a_place(row, threadIdx.x % A_CHUNKS), inside ? source : nullptr,
                       CHANNELS_LAST ? 1 : pixels, step_row(tables, s.steps, step[rows[i].image]));
    }
    position.advance(s, path);
  }

  DEVICE void keep(Shared stage) const {}

  // The sum of the codes of each row, added up over the threads of the row.
  DEVICE void write_sums(int *windows) {
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) {
      sums[i] += from_lane(sums[i], 1);
      sums[i] += from_lane(sums[i], 2);
      if (threadIdx.x % A_CHUNKS == 0) windows[threadIdx.x / A_CHUNKS + i * A_STEP] = sums[i];
    }
  }
};
#elif POINTWISE
// Rows of codes: rows beyond the last are loaded as the last row, and not stored.
struct Activations {
  const u8 *codes;
  u32 rows[A_PER_THREAD];
  bool in_last;  // Whether the last tile has the thread's chunk.
  uint4 kept[A_PER_THREAD];

  DEVICE Activations(const Shape &s, const Path &, const u8 *codes, u32, int first_m, int group)
      : codes(codes) {
    const u32 chunk = threadIdx.x % A_CHUNKS, k_chunks = s.k_bytes() / CHUNK;
    in_last = chunk < k_chunks - (s.tiles() - 1) * A_CHUNKS;
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) {
      const int m = min(first_m + (int)threadIdx.x / A_CHUNKS + i * A_STEP, s.rows() - 1);
      rows[i] = ((u32)m * s.groups + group) * k_chunks + chunk;
    }
  }

  // Begins `tiles` later; `whole`: the end of the rows is in another block's last tile.
  DEVICE void skip(int tiles, bool whole) {
    in_last |= whole;
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) rows[i] += tiles * A_CHUNKS;
  }

  DEVICE void fetch(Shared target, bool last) {
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) {
      fetch_16(target + i * A_STEP * TILE_K, chunk_at(codes, rows[i]), !last || in_last, kept[i]);
      rows[i] += A_CHUNKS;
    }
  }

  DEVICE void keep(Shared target) const {
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) keep_16(target + i * A_STEP * TILE_K, kept[i]);
  }
};
#else
// Windows of codes. Beyond the image are zeros, or, with NATIVE_4, the image's code of zero. Beyond the
// last tap is anything within the image, because the weights there are zeros.
struct Activations {
  const Shape &s;
  const Path &path;
  Position position;
  const u8 *codes;
  u32 rows[A_PER_THREAD], outside[A_PER_THREAD];
  int top[A_PER_THREAD], left[A_PER_THREAD];
  uint4 kept[A_PER_THREAD];

  DEVICE Activations(const Shape &s, const Path &path, const u8 *codes, u32 zeros, int first_m,
                     int group)
      : s(s), path(path), position(s, path), codes(codes) {
    const u32 tap = s.channel_bytes() / CHUNK;
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) {
      const Row row =
          row_of(s, min(first_m + (int)threadIdx.x / A_CHUNKS + i * A_STEP, s.rows() - 1));
      const u32 pixel = ((u32)row.image * s.height + row.top) * s.width + row.left;
      rows[i] = (pixel * s.groups + group) * tap;
      if (NATIVE_4) outside[i] = zeros + row.image;
      top[i] = row.top, left[i] = row.left;
    }
  }

  DEVICE void skip(int tiles, bool) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) position.advance(s, path);
  }

  DEVICE void fetch(Shared target, bool) {
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) {
      const int y = top[i] + position.y, x = left[i] + position.x;
      const bool inside = (u32)y < (u32)s.height && (u32)x < (u32)s.width;
      u32 chunk = rows[i] + position.chunks;
      if (NATIVE_4) chunk = inside ? chunk : outside[i];
      fetch_16(target + i * A_STEP * TILE_K, chunk_at(codes, chunk), NATIVE_4 || inside, kept[i]);
    }
    position.advance(s, path);
  }

  DEVICE void keep(Shared target) const {
#pragma unroll
    for (int i = 0; i < A_PER_THREAD; ++i) keep_16(target + i * A_STEP * TILE_K, kept[i]);
  }
};
#endif

// Rows of weights, zeros beyond k. Channels beyond the last are loaded as the last, and not stored.
struct Weights {
  const u8 *weight;
  u32 rows[B_PER_THREAD];
  bool in_last;  // Whether the last tile has the thread's chunk.
  uint4 kept[B_PER_THREAD];

  DEVICE Weights(const Shape &s, const u8 *weight, int first_n, int group) : weight(weight) {
    const u32 chunk = threadIdx.x % B_CHUNKS, k_chunks = s.weight_row() / CHUNK;
    in_last = chunk < k_chunks - (s.tiles() - 1) * B_CHUNKS;
#pragma unroll
    for (int i = 0; i < B_PER_THREAD; ++i) {
      const int n = min(first_n + (int)threadIdx.x / B_CHUNKS + i * B_STEP, s.per_group() - 1);
      rows[i] = (u32)(group * s.per_group() + n) * k_chunks + chunk;
    }
  }

  DEVICE void skip(int tiles, bool whole) {
    in_last |= whole;
#pragma unroll
    for (int i = 0; i < B_PER_THREAD; ++i) rows[i] += tiles * B_CHUNKS;
  }

  DEVICE void fetch(Shared target, bool last) {
#pragma unroll
    for (int i = 0; i < B_PER_THREAD; ++i) {
      fetch_16(target + i * B_STEP * B_ROW, chunk_at(weight, rows[i]), !last || in_last, kept[i]);
      rows[i] += B_CHUNKS;
    }
  }

  DEVICE void keep(Shared target) const {
#pragma unroll
    for (int i = 0; i < B_PER_THREAD; ++i) keep_16(target + i * B_STEP * B_ROW, kept[i]);
  }
};
