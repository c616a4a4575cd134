// Arithmetic of single instructions that takes more than a line; part of runtime.cpp.

#pragma once

u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 choice = selector >> 4 * i & 15;
    u32 byte = (u32)(bytes >> 8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}

u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 out = 0;
  for (int i = 0; i < 32; ++i)
    out |= (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i;
  return out;
}

// a b + c, rounded once in a direction. In double the product is exact and the sum has an exact error.
float fma_directed(float a, float b, float c, char rounding) {
  const float nearest = std::fma(a, b, c);
  const double product = (double)a * b, sum = product + c, late = sum - product;
  const double error = (product - (sum - late)) + (c - late);
  const double above = (sum - nearest) + error;  // Exact value minus the nearest float.
  if (nearest != nearest || above != above) return nearest;
  if (rounding == 'z') rounding = (sum > 0) || (sum == 0 && error > 0) ? 'm' : 'p';
  if (rounding == 'm') {
    if (nearest == 0 && above == 0 && std::signbit(product) != std::signbit(c)) return -0.0f;
    return above < 0 ? std::nextafter(nearest, -INFINITY) : nearest;
  }
  return above > 0 ? std::nextafter(nearest, INFINITY) : nearest;
}

u16 half_of(float value, bool to_zero) {
  const u32 bits = bits_of(value), sign = bits >> 16 & 0x8000, all = bits & 0x7fffffff;
  if (all > 0x7f800000) return 0x7fff;
  if (all == 0x7f800000) return (u16)(sign | 0x7c00);
  // The value in units of the result's last place.
  const int exponent = (int)(all >> 23) - 127, unit = (exponent < -14 ? -14 : exponent) - 10;
  const double exact = std::ldexp((double)f32(all), -unit);
  const u32 whole = (u32)(to_zero ? std::trunc(exact) : std::nearbyint(exact));
  // A carry into the exponent is meant.
  const u32 half = exponent < -14 ? whole : ((u32)(exponent + 14) << 10) + whole;
  return (u16)(sign | (half >= 0x7c00 ? (to_zero ? 0x7bff : 0x7c00) : half));
}

float float_of_half(u16 bits) {
  const u32 exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? f32(0x7fffffff) : bits >> 15 ? -INFINITY : INFINITY;
  const float value = exponent ? std::ldexp((float)(1024 + fraction), (int)exponent - 25)
                               : std::ldexp((float)fraction, -24);
  return bits >> 15 ? -value : value;
}
