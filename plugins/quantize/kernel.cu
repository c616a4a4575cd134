// Conversion of values to codes, in the layout of the product kernel: channels of a pixel are
// adjacent.
//
//   k = clip(round(x * inv_s[step]), lo[step], hi[step])
//
// stored as signed bytes, or, with NATIVE_4, as u = k - lo[step] in 4 bits together with the sum of
// u per pixel and group. Channels are padded to 32 with zeros. (u = 0 is not the code of zero, but
// the weights of these channels are q = z, so their terms cancel.)
//
// A block handles 32 pixels of one image and one group; its warps divide the channels, 32 at a
// time. With channels last, a lane handles 8 channels of one of 8 pixels; otherwise all 32 channels
// of one pixel. In both cases neighbouring lanes read neighbouring addresses.
//
// Compiled once per combination of VALUE_HALF and NATIVE_4.

#include "codes.cuh"
#include "ptx.cuh"

#if VALUE_HALF
typedef f16 Value;
#else
typedef float Value;
#endif

static constexpr int WARPS = 4, PIXELS = 32, BLOCK = 32, CHANNELS_LAST = 1;

// Stores eight codes and returns the sum of u.
DEVICE int store_8(u8 *out, const int *codes, const StepRow &row, int valid) {
#if NATIVE_4
  int shifted[8], sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    shifted[i] = i < valid ? codes[i] - (int)row.low : 0;
    sum += shifted[i];
  }
  *(u32 *)out = eight_nibbles(shifted);
  return sum;
#else
  *(uint2 *)out = make_uint2(four_bytes(codes), four_bytes(codes + 4));
  return 0;
#endif
}

// x       Value[batch, groups * channels, pixels] or channels last
// tables  float[4, steps]
// step    i64[batch]
// codes   u8[batch, pixels, groups, ceil(channels / 32) * 32], or half of it with NATIVE_4
// sums    int[batch, pixels, groups]; written only with NATIVE_4
// Blocks: (ceil(pixels / 32), groups, batch) of 128 threads.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    quantize(const Value *x, const float *tables, const i64 *step, int pixels, int channels,
             int groups, int steps, int flags, u8 *codes, int *sums) {
  __shared__ int partial[WARPS][PIXELS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = blockIdx.y, image = blockIdx.z;
  const int padded = (channels + BLOCK - 1) / BLOCK * BLOCK;
  const int row_bytes = NATIVE_4 ? padded / 2 : padded;
  const bool last = flags & CHANNELS_LAST;
  const StepRow row = step_row(tables, steps, step[image]);
  // With channels last, four lanes share a pixel, so a warp needs four rounds for the block's 32
  // pixels.
  const int rounds = last ? 4 : 1, octets = last ? 1 : 4;
  const i64 stride = last ? 1 : pixels;
  for (int round = 0; round < rounds; ++round) {
    const int slot = last ? 8 * round + lane / 4 : lane;
    const int pixel = blockIdx.x * PIXELS + slot;
    int sum = 0;
    for (int block = warp * BLOCK; pixel < pixels && block < padded; block += WARPS * BLOCK) {
      for (int octet = 0; octet < octets; ++octet) {
        const int channel = block + 8 * (last ? lane % 4 : octet);
        const int valid = channels - channel;
        const i64 first = last
            ? (((i64)image * pixels + pixel) * groups + group) * channels + channel
            : (((i64)image * groups + group) * channels + channel) * pixels + pixel;
        __align__(16) Value values[8];
        if (last && valid >= 8 && (u64)(x + first) % 16 == 0) {
#pragma unroll
          for (int i = 0; i < (int)sizeof(values) / 16; ++i)
            ((uint4 *)values)[i] = ((const uint4 *)(x + first))[i];
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) values[i] = i < valid ? x[first + i * stride] : (Value)0;
        }
        int octet_codes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) octet_codes[i] = i < valid ? code_of(to_float(values[i]), row) : 0;
        const i64 place = ((i64)image * pixels + pixel) * groups + group;
        u8 *out = codes + place * row_bytes + (NATIVE_4 ? channel / 2 : channel);
        sum += store_8(out, octet_codes, row, valid);
      }
    }
#if NATIVE_4
    if (last) {
      // Sum over the four lanes of a pixel.
      sum += from_lane(sum, 1);
      sum += from_lane(sum, 2);
    }
    partial[warp][slot] = sum;
#endif
  }
#if NATIVE_4
  __syncthreads();
  const int pixel = blockIdx.x * PIXELS + threadIdx.x;
  if (threadIdx.x < PIXELS && pixel < pixels) {
    int sum = 0;
    for (int i = 0; i < WARPS; ++i) sum += partial[i][threadIdx.x];
    sums[((i64)image * pixels + pixel) * groups + group] = sum;
  }
#endif
}
