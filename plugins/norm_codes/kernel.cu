// Conversion of values to codes together with the operators in front of it:
//
//   STATISTICS   mean and inverse deviation of each group of channels
//   PIXELS       images with channels first: group norm -> SiLU -> factor -> codes
//   ROWS         rows with channels last: layer norm | gated GELU -> SiLU -> factor -> codes
//
// The codes, their sums and the counters are those of the quantise kernel, for one group of channels of
// the layer. All values are float32 until they are codes: nothing between is rounded to half. Every
// operation rounds once, in the order that plugins/fused/reference.py states, so that the codes are equal
// on every machine.
//
// Compiled once per combination of FORM, VALUE_HALF, WEIGHT_BITS and NATIVE_4.

#include "codes.cuh"
#include "ptx.cuh"

#if VALUE_HALF
typedef f16 Value;
#else
typedef float Value;
#endif

static constexpr int STATISTICS = 0, PIXELS = 1, ROWS = 2;
static constexpr int WARPS = FORM == STATISTICS ? 16 : 4, BLOCK = 32;
static constexpr bool MIXED = WEIGHT_BITS == 4 && !NATIVE_4, SUMS = WEIGHT_BITS == 4;
// Words of a block of 32 channels, and codes of a word.
static constexpr int WORDS = NATIVE_4 ? 4 : 8, CODES = NATIVE_4 ? 8 : 4;
static constexpr int LAYER_NORM = 1, GATED = 2;

// The sum over the lanes of a warp, the same in all lanes: lanes 16 apart first, neighbours last.
DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2)
    value = add(value, __int_as_float(from_lane(__float_as_int(value), mask)));
  return value;
}

// e^x for -87 <= x <= 88, clipped to this range: 2^n e^r with a Taylor polynomial of degree 7.
DEVICE float exponential(float x) {
  x = fminf(fmaxf(x, -87.0f), 88.0f);
  const float n = round_even(multiply(x, 1.44269504f));
  // ln 2 in two parts; n times the first is exact.
  const float r = add(add(x, multiply(n, -0.693359375f)), multiply(n, 2.12194440e-4f));
  float y = 1.0f / 5040.0f;
  y = add(multiply(y, r), 1.0f / 720.0f);
  y = add(multiply(y, r), 1.0f / 120.0f);
  y = add(multiply(y, r), 1.0f / 24.0f);
  y = add(multiply(y, r), 1.0f / 6.0f);
  y = add(multiply(y, r), 0.5f);
  y = add(multiply(y, r), 1.0f);
  y = add(multiply(y, r), 1.0f);
  return multiply(y, __int_as_float(((int)n + 127) << 23));
}

DEVICE float silu(float y) { return y / add(1.0f, exponential(-y)); }

// x (1 + erf(x / sqrt 2)) / 2. 1 - erf(z) for z >= 0 is Abramowitz and Stegun's formula 7.1.26, whose
// error is below 1.5e-7.
DEVICE float gelu(float x) {
  const float z = multiply(fabsf(x), 0.70710678f);
  const float t = 1.0f / add(1.0f, multiply(0.3275911f, z));
  float y = 1.061405429f;
  y = add(multiply(y, t), -1.453152027f);
  y = add(multiply(y, t), 1.421413741f);
  y = add(multiply(y, t), -0.284496736f);
  y = add(multiply(y, t), 0.254829592f);
  const float rest = multiply(multiply(y, t), exponential(-multiply(z, z)));
  return multiply(multiply(0.5f, x), x < 0.0f ? rest : add(2.0f, -rest));
}

// float[4, C]: scale, shift and factor of each channel; the norm's epsilon first in the last row.
struct Affine {
  const float *rows;
  int channels;

  DEVICE float epsilon() const { return rows[3 * (i64)channels]; }
  DEVICE float apply(float y, int channel, bool activated) const {
    y = add(multiply(y, rows[channel]), rows[channels + channel]);
    if (activated) y = silu(y);
    return multiply(y, rows[2 * channels + channel]);
  }
};

// The code of a value, or u.
DEVICE int stored_code(float y, const StepRow &row) {
  return code_of(y, row) - (NATIVE_4 ? (int)row.low : 0);
}

DEVICE u32 word_of(const int *codes) { return NATIVE_4 ? eight_nibbles(codes) : four_bytes(codes); }

// The first channel of a word: of eight channels, or four.
DEVICE int first_channel(int block, int number) {
  if (NATIVE_4) return block + 8 * number;
  return block + (MIXED ? number % 4 * 8 + number / 4 * 4 : 4 * number);
}

DEVICE void clear(int *counters, int count) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  for (int i = block * 32 * WARPS + threadIdx.x; i < count;
       i += gridDim.x * gridDim.y * gridDim.z * 32 * WARPS)
    counters[i] = 0;
}

// With NATIVE_4 the code of zero of an image, in each nibble, follows the codes.
DEVICE void store_zero(u8 *codes, i64 code_bytes, const StepRow &row) {
  if (!NATIVE_4 || blockIdx.x || threadIdx.x) return;
  const u32 zero = 0x11111111u * (u32)(int)-row.low;
  ((uint4 *)(codes + code_bytes * gridDim.z))[blockIdx.z] = make_uint4(zero, zero, zero, zero);
}

#if FORM == 0

// x            Value[batch, channels, pixels]
// image_shift  Value[batch, shift_width], of which the first `channels` are added; null: none
// affine       float[4, channels]
// statistics   float[batch, groups, 2]: mean, and 1 / sqrt(variance + epsilon)
// Blocks: (groups, 1, batch) of 512 threads.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    norm_codes(const Value *x, const Value *image_shift, int shift_width, const float *affine, int pixels,
               int channels, float *statistics) {
  __shared__ float partial[2][WARPS];
  const int group = blockIdx.x, groups = gridDim.x, image = blockIdx.z;
  const int per_group = channels / groups, count = per_group * pixels;
  const Value *values = x + ((i64)image * channels + group * per_group) * pixels;
  const Value *shifts = image_shift + image * shift_width + group * per_group;
  auto value = [&](int i) {
    const float y = to_float(values[i]);
    return image_shift ? add(y, to_float(shifts[i / pixels])) : y;
  };
  // The sum over the block: of a thread, of a warp, and of the warps in order.
  auto total = [&](float sum, int number) {
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) partial[number][threadIdx.x / 32] = sum;
    __syncthreads();
    sum = partial[number][0];
    for (int warp = 1; warp < WARPS; ++warp) sum = add(sum, partial[number][warp]);
    return sum;
  };
  float sum = 0.0f, squares = 0.0f;
  for (int i = threadIdx.x; i < count; i += 32 * WARPS) sum = add(sum, value(i));
  const float mean = total(sum, 0) / (float)count;
  for (int i = threadIdx.x; i < count; i += 32 * WARPS) {
    const float centred = add(value(i), -mean);
    squares = add(squares, multiply(centred, centred));
  }
  const float variance = total(squares, 1) / (float)count;
  if (threadIdx.x) return;
  const Affine numbers = {affine, channels};
  statistics[2 * (image * groups + group)] = mean;
  statistics[2 * (image * groups + group) + 1] = 1.0f / sqrtf(add(variance, numbers.epsilon()));
}

#elif FORM == 1

// x            Value[batch, channels, pixels]
// image_shift  Value[batch, shift_width], of which the first `channels` are added; null: none
// statistics   float[batch, groups, 2]; null: no norm
// affine       float[4, channels]
// tables       float[4, steps]
// step         i64[batch]
// codes, sums, counters: as the quantise kernel has them, for one group
// Blocks: (ceil(pixels / 32), 1, batch) of 128 threads. A lane has one pixel; warps divide channels.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    norm_codes(const Value *x, const Value *image_shift, int shift_width, const float *statistics,
               const float *affine, const float *tables, const i64 *step, int pixels, int channels,
               int groups, int activated, int steps, u8 *codes, int *sums, int *counters, int count) {
  __shared__ int partial[WARPS][32];
  clear(counters, count);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, image = blockIdx.z;
  const int padded = (channels + BLOCK - 1) / BLOCK * BLOCK, row_bytes = NATIVE_4 ? padded / 2 : padded;
  const int pixel = blockIdx.x * 32 + lane, per_group = channels / groups;
  const StepRow row = step_row(tables, steps, step[image]);
  const Affine numbers = {affine, channels};
  const Value *source = x + (i64)image * channels * pixels + pixel;
  u8 *out = codes + ((i64)image * pixels + pixel) * row_bytes;
  auto value = [&](int channel) {
    float y = to_float(source[(i64)channel * pixels]);
    if (image_shift) y = add(y, to_float(image_shift[image * shift_width + channel]));
    if (statistics) {
      const float *its = statistics + 2 * (image * groups + channel / per_group);
      y = multiply(add(y, -its[0]), its[1]);
    }
    return numbers.apply(y, channel, activated);
  };
  int sum = 0;
  for (int block = warp * BLOCK; pixel < pixels && block < padded; block += WARPS * BLOCK)
    for (int number = 0; number < WORDS; ++number) {
      int word[CODES];
#pragma unroll
      for (int i = 0; i < CODES; ++i) {
        const int channel = first_channel(block, number) + i;
        word[i] = channel < channels ? stored_code(value(channel), row) : 0;
        sum += word[i];
      }
      ((u32 *)(out + (NATIVE_4 ? block / 2 : block)))[number] = word_of(word);
    }
  store_zero(codes, (i64)pixels * row_bytes, row);
  if (!SUMS) return;
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && pixel < pixels) {
    for (int i = 1; i < WARPS; ++i) sum += partial[i][lane];
    sums[(i64)image * pixels + pixel] = sum;
  }
}

#else

// x            Value[batch, pixels, channels]; GATED: [batch, pixels, 2 channels], values and gates;
//              with heads: [batch, heads, pixels, channels / heads]
// affine       float[4, channels]
// tables       float[4, steps]
// step         i64[batch]
// codes, sums, counters: as the quantise kernel has them, for one group
// Blocks: (ceil(pixels / 4), 1, batch) of 128 threads. A warp has one row.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    norm_codes(const Value *x, const float *affine, const float *tables, const i64 *step, int pixels,
               int channels, int norm, int heads, int activated, int steps, u8 *codes, int *sums,
               int *counters, int count) {
  clear(counters, count);
  const int lane = threadIdx.x % 32, image = blockIdx.z;
  const int padded = (channels + BLOCK - 1) / BLOCK * BLOCK, row_bytes = NATIVE_4 ? padded / 2 : padded;
  const int pixel = blockIdx.x * WARPS + threadIdx.x / 32;
  const StepRow row = step_row(tables, steps, step[image]);
  store_zero(codes, (i64)pixels * row_bytes, row);
  if (pixel >= pixels) return;
  const Affine numbers = {affine, channels};
  const int width = norm == GATED ? 2 * channels : channels, head_channels = channels / max(heads, 1);
  const i64 place = (i64)image * pixels + pixel;
  auto loaded = [&](int channel) {
    if (heads == 0) return to_float(x[place * width + channel]);
    const i64 head = (i64)image * heads + channel / head_channels;
    return to_float(x[(head * pixels + pixel) * head_channels + channel % head_channels]);
  };
  float mean = 0.0f, inverse = 1.0f;
  if (norm == LAYER_NORM) {
    float sum = 0.0f, squares = 0.0f;
    for (int channel = lane; channel < channels; channel += 32) sum = add(sum, loaded(channel));
    mean = warp_sum(sum) / (float)channels;
    for (int channel = lane; channel < channels; channel += 32) {
      const float centred = add(loaded(channel), -mean);
      squares = add(squares, multiply(centred, centred));
    }
    inverse = 1.0f / sqrtf(add(warp_sum(squares) / (float)channels, numbers.epsilon()));
  }
  auto value = [&](int channel) {
    float y = loaded(channel);
    if (norm == LAYER_NORM) y = multiply(add(y, -mean), inverse);
    if (norm == GATED) y = multiply(y, gelu(loaded(channels + channel)));
    return numbers.apply(y, channel, activated);
  };
  int sum = 0;
  u32 *out = (u32 *)(codes + place * row_bytes);
  for (int index = lane; index < row_bytes / 4; index += 32) {
    const int first = first_channel(index / WORDS * BLOCK, index % WORDS);
    int word[CODES];
#pragma unroll
    for (int i = 0; i < CODES; ++i) {
      word[i] = first + i < channels ? stored_code(value(first + i), row) : 0;
      sum += word[i];
    }
    out[index] = word_of(word);
  }
  if (!SUMS) return;
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += from_lane(sum, mask);
  if (lane == 0) sums[place] = sum;
}

#endif
