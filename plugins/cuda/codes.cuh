// Conversion of values to codes, for all kernels: k = clip(round(x * inv_s[t]), lo[t], hi[t]).

#pragma once
#include "ptx.cuh"

// One step of the tables float[4, T]: scale, its reciprocal, smallest and largest code.
struct StepRow {
  float scale, inverse, low, high;
};

// A step outside the tables has the scale NaN, so every output becomes NaN.
DEVICE StepRow step_row(const float *tables, int steps, i64 step) {
  StepRow row = {__int_as_float(0x7fffffff), 0.0f, 0.0f, 0.0f};
  if (step >= 0 && step < steps) {
    row.scale = tables[step];
    row.inverse = tables[steps + step];
    row.low = tables[2 * steps + step];
    row.high = tables[3 * steps + step];
  }
  return row;
}

// NaN becomes the smallest code.
DEVICE int code_of(float x, const StepRow &row) {
  float code = round_even(multiply(x, row.inverse));
  return (int)fminf(fmaxf(code, row.low), row.high);
}

// Four codes as signed bytes, the first in the lowest byte.
DEVICE u32 four_bytes(const int *codes) {
  return (codes[0] & 255) | (codes[1] & 255) << 8 | (codes[2] & 255) << 16 | (u32)codes[3] << 24;
}

// Eight codes 0 .. 15 in four bytes: byte j holds code j in its low and code j + 4 in its high
// nibble.
DEVICE u32 eight_nibbles(const int *codes) {
  u32 low = codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24;
  u32 high = codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24;
  return low | high << 4;
}
