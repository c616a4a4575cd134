// Conversion of values to codes, in the layout of the product kernel: channels of a pixel are
// adjacent.
//
//   k = clip(round(x * inv_s[step]), lo[step], hi[step])
//
// stored as signed bytes, or, with NATIVE_4, as u = k - lo[step] in 4 bits each. For 4-bit weights the
// kernel also adds up the stored codes per pixel and group. Channels are padded to 32 with zeros. (u = 0
// is not the code of zero, but the weights of these channels are q = z, so their terms cancel.)
//
// For signed bytes and 4-bit weights (MIXED), the 32 channels of a block have the order in which a thread
// of the product finds their weights: channel 8 t + 4 h + i is byte 16 h + 4 t + i, for t and i in 0 .. 3
// and h in 0, 1.
//
// A block handles 32 pixels of one image and one group; its warps divide the channels, 32 at a
// time. With channels last, a lane handles 8 channels of one of 8 pixels; otherwise all 32 channels
// of one pixel. In both cases neighbouring lanes read neighbouring addresses, and a lane writes
// neighbouring bytes.
//
// Compiled once per combination of VALUE_HALF, WEIGHT_BITS and NATIVE_4.

#include "codes.cuh"
#include "ptx.cuh"

#if VALUE_HALF
typedef f16 Value;
#else
typedef float Value;
#endif

static constexpr int WARPS = 4, PIXELS = 32, BLOCK = 32, CHANNELS_LAST = 1;
static constexpr bool MIXED = WEIGHT_BITS == 4 && !NATIVE_4, SUMS = WEIGHT_BITS == 4;

// Signed codes, or u, of four neighbouring channels, of which the first `valid` exist; 0 for others.
DEVICE void codes_of_4(int *codes, const Value *x, i64 stride, int valid, const StepRow &row) {
  Value values[4];
  if (stride == 1 && valid >= 4 && (u64)x % (4 * sizeof(Value)) == 0) {
#if VALUE_HALF
    const uint2 pairs = *(const uint2 *)x;
    values[0] = (f16)pairs.x, values[1] = (f16)(pairs.x >> 16);
    values[2] = (f16)pairs.y, values[3] = (f16)(pairs.y >> 16);
#else
    const float4 all = *(const float4 *)x;
    values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
#endif
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = i < valid ? x[i * stride] : (Value)0;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    codes[i] = i < valid ? code_of(to_float(values[i]), row) - (NATIVE_4 ? (int)row.low : 0) : 0;
}

// x       Value[batch, groups * channels, pixels] or channels last
// tables  float[4, steps]
// step    i64[batch]
// codes   u8[batch, pixels, groups, ceil(channels / 32) * 32], or half of it with NATIVE_4; then, with
//         NATIVE_4, u8[batch, 16]: the code of zero in each nibble
// sums    int[batch, pixels, groups]; written only with WEIGHT_BITS 4
// counters int[count], set to zero for the product kernel
// Blocks: (ceil(pixels / 32), groups, batch) of 128 threads.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    quantize(const Value *x, const float *tables, const i64 *step, int pixels, int channels,
             int groups, int steps, int flags, u8 *codes, int *sums, int *counters, int count) {
  __shared__ int partial[WARPS][PIXELS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = blockIdx.y, image = blockIdx.z;
  const int block_number = (image * gridDim.y + group) * gridDim.x + blockIdx.x;
  for (int i = block_number * 32 * WARPS + threadIdx.x; i < count;
       i += gridDim.x * gridDim.y * gridDim.z * 32 * WARPS)
    counters[i] = 0;
  const int padded = (channels + BLOCK - 1) / BLOCK * BLOCK;
  const int row_bytes = NATIVE_4 ? padded / 2 : padded;
  const bool last = flags & CHANNELS_LAST;
  const StepRow row = step_row(tables, steps, step[image]);
  // With channels last, four lanes share a pixel, so a warp needs four rounds for the block's 32
  // pixels.
  const int rounds = last ? 4 : 1;
  const i64 stride = last ? 1 : pixels;
  for (int round = 0; round < rounds; ++round) {
    const int slot = last ? 8 * round + lane / 4 : lane;
    const int pixel = blockIdx.x * PIXELS + slot;
    const i64 place = ((i64)image * pixels + pixel) * groups + group;
    const Value *source = last ? x + place * channels
                               : x + ((i64)image * groups + group) * channels * pixels + pixel;
    int sum = 0;
    for (int block = warp * BLOCK; pixel < pixels && block < padded; block += WARPS * BLOCK) {
      u8 *out = codes + place * row_bytes + (NATIVE_4 ? block / 2 : block);
      // A word of the block: four codes, with NATIVE_4 eight.
      auto word = [&](int number) {
        int found[8];
        if (NATIVE_4) {
          const int channel = block + 8 * number;
          codes_of_4(found, source + channel * stride, stride, channels - channel, row);
          codes_of_4(found + 4, source + (channel + 4) * stride, stride, channels - channel - 4, row);
        } else {
          const int channel = block + (MIXED ? number % 4 * 8 + number / 4 * 4 : 4 * number);
          codes_of_4(found, source + channel * stride, stride, channels - channel, row);
        }
        if (SUMS)
#pragma unroll
          for (int i = 0; i < (NATIVE_4 ? 8 : 4); ++i) sum += found[i];
        return NATIVE_4 ? eight_nibbles(found) : four_bytes(found);
      };
      constexpr int WORDS = NATIVE_4 ? 4 : 8;
      if (last) {
        if (NATIVE_4)
          ((u32 *)out)[lane % 4] = word(lane % 4);
        else
          ((uint2 *)out)[lane % 4] = make_uint2(word(lane % 4 * 2), word(lane % 4 * 2 + 1));
      } else {
        u32 words[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = word(i);
#pragma unroll
        for (int i = 0; i < WORDS; i += 4)
          ((uint4 *)out)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      }
    }
    if (SUMS) {
      if (last) {
        // Sum over the four lanes of a pixel.
        sum += from_lane(sum, 1);
        sum += from_lane(sum, 2);
      }
      partial[warp][slot] = sum;
    }
  }
  if (!SUMS) return;
  __syncthreads();
  const int pixel = blockIdx.x * PIXELS + threadIdx.x;
  if (threadIdx.x < PIXELS && pixel < pixels) {
    int sum = 0;
    for (int i = 0; i < WARPS; ++i) sum += partial[i][threadIdx.x];
    sums[((i64)image * pixels + pixel) * groups + group] = sum;
  }
  if (NATIVE_4 && blockIdx.x == 0 && group == 0 && threadIdx.x == 0) {
    u8 *zeros = codes + (i64)gridDim.z * pixels * groups * row_bytes;
    const u32 zero = 0x11111111u * (u32)(int)-row.low;
    ((uint4 *)zeros)[image] = make_uint4(zero, zero, zero, zero);
  }
}
