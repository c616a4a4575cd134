// CUDA C on a CPU: the threads of a block are fibers, whose order depends on a seed.
//
// Replaces plugins/cuda/ptx.cuh; fibers.h runs the threads. Asynchronous copies happen as late as
// possible (even seeds) or at once (odd seeds).

#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <tuple>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short f16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE inline
#define ASYNCHRONOUS 1
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(X) alignas(X)
#define DYNAMIC_SHARED(NAME) extern u8 NAME[]

struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

struct Copy {
  u8 *target;
  const u8 *source;  // Null: zeros.
};

struct Lane {
  std::deque<std::vector<Copy>> groups{1};
  u32 a[4], b[2];
  const u8 *address;
  int value;
};

#include "fibers.h"

static void met(Thread *) {}
static void started() {}
static void released() {}

static bool early_copies;
static Index gridDim;
using std::max;
using std::min;
#define threadIdx (self->index)

static inline void __syncthreads() { wait_at(Thread::AT_BLOCK); }

static inline float to_float(f16 bits) { return _cvtsh_ss(bits); }
static inline float to_float(float value) { return value; }
static inline void from_float(float value, f16 *out) { *out = _cvtss_sh(value, 0); }
static inline void from_float(float value, float *out) { *out = value; }
static inline float multiply(float a, float b) { return a * b; }
static inline float add(float a, float b) { return a + b; }
static inline float round_even(float value) { return std::nearbyint(value); }
static inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
static inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline u32 two_halves(float first, float second) {
  f16 low, high;
  from_float(first, &low), from_float(second, &high);
  return low | (u32)high << 16;
}

// The number of a byte in shared memory.
typedef u32 Shared;
static inline Shared shared_address(const u8 *pointer) { return (Shared)(pointer - shared); }

static inline void perform(const Copy &copy) {
  if (copy.source)
    std::memcpy(copy.target, copy.source, 16);
  else
    std::memset(copy.target, 0, 16);
}

static inline void fetch_16(Shared target, const u8 *source, bool inside, uint4 &) {
  if (target % 16 || (uintptr_t)source % 16) {
    std::fprintf(stderr, "a copy is not aligned to 16 bytes\n");
    std::abort();
  }
  const Copy copy = {shared + target, inside ? source : nullptr};
  if (early_copies)
    perform(copy);
  else
    self->groups.back().push_back(copy);
}

static inline void store_4(Shared target, u32 value) { std::memcpy(shared + target, &value, 4); }
static inline void keep_16(Shared, const uint4 &) {}

static inline void copies_commit() { self->groups.emplace_back(); }

template <int NEWER>
static inline void copies_wait() {
  // The last group is the open one.
  while (self->groups.size() > NEWER + 1) {
    for (const Copy &copy : self->groups.front()) perform(copy);
    self->groups.pop_front();
  }
}

static inline void load_matrices(u32 (&found)[4], Shared row) {
  self->address = shared + row;
  sync_warp();
  int own = self->index.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&found[matrix], lane(8 * matrix + own / 4).address + 4 * (own % 4), 4);
  sync_warp();
}

template <int BITS, bool SIGNED>
static inline int integer(const u32 *words, int index) {
  constexpr int PER_WORD = 32 / BITS;
  const u32 field = words[index / PER_WORD] >> (BITS * (index % PER_WORD));
  if (BITS == 4) return (int)(field & 15);
  return SIGNED ? (int)(int8_t)field : (int)(uint8_t)field;
}

// Rows of 32 bytes, assembled from the parts in the lanes.
template <int BITS, bool SIGNED_A, bool SIGNED_B>
static inline void multiply_integers(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  std::memcpy(self->a, a, 16);
  self->b[0] = b0, self->b[1] = b1;
  sync_warp();
  int own = self->index.x % 32, g = own / 4, t = own % 4;
  for (int upper = 0; upper < 2; ++upper)
    for (int side = 0; side < 2; ++side) {
      u32 left[8], right[8];
      for (int part = 0; part < 4; ++part) {
        left[part] = lane(4 * g + part).a[upper];
        left[4 + part] = lane(4 * g + part).a[2 + upper];
        right[part] = lane(4 * (2 * t + side) + part).b[0];
        right[4 + part] = lane(4 * (2 * t + side) + part).b[1];
      }
      int sum = 0;
      for (int k = 0; k < 256 / BITS; ++k)
        sum += integer<BITS, SIGNED_A>(left, k) * integer<BITS, SIGNED_B>(right, k);
      sums[2 * upper + side] += sum;
    }
  sync_warp();
}

static inline void multiply_s8_s8(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_integers<8, true, true>(sums, a, b0, b1);
}
static inline void multiply_s8_u8(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_integers<8, true, false>(sums, a, b0, b1);
}
static inline void multiply_u4_u4(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_integers<4, false, false>(sums, a, b0, b1);
}

static inline int add_bytes(u32 word, int sum) {
  for (int i = 0; i < 4; ++i) sum += (int8_t)(word >> 8 * i);
  return sum;
}

static inline u32 choose_bytes(u32 low, u32 high, u32 order) {
  const u64 bytes = (u64)high << 32 | low;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= (u32)(bytes >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

static inline int block_z() { return (int)blockIdx.z; }
static inline void publish() {}
static inline int arrive(int *counter) { return (*counter)++; }
static inline uint4 load_published(const uint4 *source) { return *source; }

static inline void warp_barrier() { sync_warp(); }

static inline int from_lane(int value, int mask) {
  self->value = value;
  sync_warp();
  int found = lane((int)(self->index.x % 32) ^ mask).value;
  sync_warp();
  return found;
}

template <typename... Arguments, size_t... Places>
static void call(void (*kernel)(Arguments...), void **values, std::index_sequence<Places...>) {
  kernel(*(Arguments *)values[Places]...);
}

template <typename... Arguments>
static void call_kernel(void (*kernel)(Arguments...), void **values) {
  call(kernel, values, std::index_sequence_for<Arguments...>{});
}

static void **arguments;

#define EMULATE(KERNEL)                                                                         \
  extern "C" int emulate(void **values, unsigned x, unsigned y, unsigned z, int count, int seed) { \
    early_copies = seed % 2;                                                                    \
    arguments = values;                                                                         \
    gridDim = {x, y, z};                                                                        \
    body = [] { call_kernel(KERNEL, arguments); };                                              \
    return !run_grid({x, y, z}, count, seed); /* 1: a deadlock */                               \
  }
