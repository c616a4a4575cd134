// What a kernel that was translated from PTX calls: types, arithmetic, and the interface to runtime.cpp.
// Semantics are those of the PTX ISA, section "Instruction Set"; registers are kept as unsigned bits. The
// compiler's own functions stand for <cmath>, which takes as long to read as a small kernel.

#pragma once
#include <cstdint>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef __int128 s128;
typedef unsigned __int128 u128;

// --- in runtime.cpp; `line` is the line of the PTX, for messages ---

struct Place {
  u32 tid, ntid, ctaid[3], nctaid[3];
};
Place place();
[[noreturn]] void fault(u32 line, const char *what);
// Checked addresses: alignment to `bytes`, range, and for shared memory races and missing waits.
const u8 *global_read(u64 address, u32 bytes, u32 line);
void global_write(u64 address, const void *values, u32 bytes, u32 line);
const u8 *shared_read(u64 address, u32 bytes, u32 line);
void shared_write(u64 address, const void *values, u32 bytes, u32 line);
// cp.async: `given` bytes are copied, the others up to `bytes` become zero, not before the wait.
void copy_later(u64 target, u64 source, u32 bytes, u32 given, u32 line);
void copies_commit();
void copies_wait(u32 newer);
void barrier(u32 line);
// An instruction that a warp's 32 threads execute together.
enum Operation { MMA, LDMATRIX, SHFL, VOTE, SYNC };
const u32 *together(Operation operation, u32 kind, const u32 *in, u32 count, u32 line);
// The old value; additions of a block are never interrupted.
enum Atomic { ADD, MIN, MAX, AND, OR, XOR, EXCH, SMIN, SMAX };
u64 atomic(Atomic operation, u64 address, u64 value, u32 bytes, u32 line);
u16 half_of(float value, bool to_zero);
float float_of_half(u16 bits);
float fma_directed(float a, float b, float c, char rounding);
u32 prmt(u32 a, u32 b, u32 selector);
u32 lop3(u32 a, u32 b, u32 c, u32 table);

// kind of an MMA: sizes as powers of two, bits, signs.
constexpr u32 mma_kind(u32 m, u32 k, u32 bits, u32 signed_a, u32 signed_b, u32 saturate) {
  return m | k << 8 | bits << 16 | signed_a << 24 | signed_b << 25 | saturate << 26;
}

// --- bits ---

static inline float f32(u32 bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static inline u32 bits_of(float value) {
  u32 bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
// Arithmetic gives only one NaN.
static inline u32 result(float value) { return value != value ? 0x7fffffffu : bits_of(value); }
template <class T>
static inline T get(const u8 *at) {
  T value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

// --- integers ---

template <class T>
static inline T shifted_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? 0 : (T)(a << n);
}
template <class T>
static inline T shifted_right(T a, u32 n) {
  constexpr u32 WIDTH = 8 * sizeof(T);
  if (n >= WIDTH) return a < 0 ? (T)-1 : (T)0;
  return (T)(a >> n);
}
static inline u32 funnel(u32 low, u32 high, u32 n, bool left, bool wrap) {
  n = wrap ? n & 31 : n > 32 ? 32 : n;
  u64 both = (u64)high << 32 | low;
  return left ? (u32)(both << n >> 32) : (u32)(both >> n);
}
template <class T>
static inline T bfi(T field, T base, u32 at, u32 length) {
  at &= 255, length &= 255;
  constexpr u32 WIDTH = 8 * sizeof(T);
  for (u32 i = 0; i < length && at + i < WIDTH; ++i) {
    T bit = (T)1 << (at + i);
    base = (T)(field >> i & 1 ? base | bit : base & ~bit);
  }
  return base;
}
template <class T>
static inline T bfe(T a, u32 at, u32 length) {
  at &= 255, length &= 255;
  constexpr u32 WIDTH = 8 * sizeof(T);
  constexpr bool SIGNED = (T)-1 < 0;
  u32 last = at + length - 1 < WIDTH - 1 ? at + length - 1 : WIDTH - 1;
  bool sign = SIGNED && length && a >> last & 1;
  u64 out = 0;
  for (u32 i = 0; i < WIDTH; ++i) {
    bool inside = i < length && at + i < WIDTH;
    out |= (u64)(inside ? a >> (at + i) & 1 : sign) << i;
  }
  return (T)out;
}
template <class T>
static inline T quotient(T a, T b, u32 line) {
  if (b == 0) fault(line, "division by zero");
  return b == (T)-1 && (T)-1 < 0 ? (T)(0 - (u64)a) : (T)(a / b);
}
template <class T>
static inline T remainder_of(T a, T b, u32 line) {
  if (b == 0) fault(line, "division by zero");
  return b == (T)-1 && (T)-1 < 0 ? (T)0 : (T)(a % b);
}
template <class A, class B>
static inline u32 dot_4(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 4; ++i) c += (u32)((s32)(A)(a >> 8 * i) * (s32)(B)(b >> 8 * i));
  return c;
}

// --- float ---

static inline float lesser(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return __builtin_signbit(a) ? a : b;
  return a < b ? a : b;
}
static inline float greater(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return __builtin_signbit(a) ? b : a;
  return a > b ? a : b;
}
static inline float saturated(float a) { return a > 0 ? a < 1 ? a : 1.0f : 0.0f; }
static inline float without_subnormal(float a) {
  return a != 0 && __builtin_fabsf(a) < 0x1p-126f ? __builtin_copysignf(0.0f, a) : a;
}
static inline float whole(float a, char rounding) {
  return rounding == 'n'   ? __builtin_nearbyintf(a)
         : rounding == 'z' ? __builtin_truncf(a)
         : rounding == 'm' ? __builtin_floorf(a)
                           : __builtin_ceilf(a);
}
// NaN becomes 0, values beyond the range become the nearest one.
template <class T>
static inline T integer_of(float a, char rounding) {
  constexpr bool SIGNED = (T)-1 < 0;
  constexpr int BITS = 8 * (int)sizeof(T) - SIGNED;
  const T largest = (T)(~(u64)0 >> (64 - BITS));
  if (a != a) return 0;
  a = whole(a, rounding);
  if (a >= __builtin_ldexpf(1.0f, BITS)) return largest;
  if (SIGNED ? a < -__builtin_ldexpf(1.0f, BITS) : a < 0) return SIGNED ? (T)(-largest - 1) : (T)0;
  return (T)a;
}
