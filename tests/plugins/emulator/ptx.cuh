// CUDA C on a CPU: the threads of a block are fibers, whose order depends on a seed.
//
// Replaces plugins/cuda/ptx.cuh. A thread runs until it waits for its warp or its block, so reads
// without a barrier occur in an arbitrary order; asynchronous copies happen as late as possible
// (even seeds) or at once (odd seeds); shared memory is initialised with garbage.

#pragma once
#include <immintrin.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <tuple>
#include <algorithm>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short f16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE inline
#define __global__
#define __launch_bounds__(X)
#define __shared__ static
#define __align__(X) alignas(X)
#define DYNAMIC_SHARED(NAME) extern u8 NAME[]

struct Index {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

constexpr int SHARED_BYTES = 1 << 18, STACK_BYTES = 1 << 16;
alignas(128) u8 shared[SHARED_BYTES];

struct Copy {
  u8 *target;
  const u8 *source;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<u8[]> stack{new u8[STACK_BYTES]};
  Index index;
  enum { READY, AT_WARP, AT_BLOCK, DONE } state = READY;
  std::deque<std::vector<Copy>> groups{1};
  u32 a[4], b[2];
  const u8 *address;
  int value;
};

static std::vector<Thread> *threads;
static Thread *self;
static ucontext_t scheduler;
static Index blockIdx;
static bool early_copies;
#define threadIdx (self->index)

static inline void wait_at(int state) {
  self->state = state == Thread::AT_WARP ? Thread::AT_WARP : Thread::AT_BLOCK;
  Thread *me = self;
  swapcontext(&me->context, &scheduler);
}

static inline void __syncthreads() { wait_at(Thread::AT_BLOCK); }
static inline void sync_warp() { wait_at(Thread::AT_WARP); }
static inline Thread &lane(int index) { return (*threads)[self->index.x / 32 * 32 + index]; }

static inline float to_float(f16 bits) { return _cvtsh_ss(bits); }
static inline float to_float(float value) { return value; }
static inline void from_float(float value, f16 *out) { *out = _cvtss_sh(value, 0); }
static inline void from_float(float value, float *out) { *out = value; }
static inline float multiply(float a, float b) { return a * b; }
static inline float add(float a, float b) { return a + b; }
static inline float round_even(float value) { return std::nearbyint(value); }
static inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline void perform(const Copy &copy) { std::memcpy(copy.target, copy.source, 16); }

static inline void copy_16(u8 *target, const u8 *source) {
  if ((uintptr_t)target % 16 || (uintptr_t)source % 16) {
    std::fprintf(stderr, "a copy is not aligned to 16 bytes\n");
    std::abort();
  }
  if (early_copies)
    perform({target, source});
  else
    self->groups.back().push_back({target, source});
}

static inline void copies_commit() { self->groups.emplace_back(); }

template <int NEWER>
static inline void copies_wait() {
  // The last group is the open one.
  while (self->groups.size() > NEWER + 1) {
    for (const Copy &copy : self->groups.front()) perform(copy);
    self->groups.pop_front();
  }
}

static inline void load_matrices(u32 (&found)[4], const u8 *row) {
  self->address = row;
  sync_warp();
  int own = self->index.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&found[matrix], lane(8 * matrix + own / 4).address + 4 * (own % 4), 4);
  sync_warp();
}

template <int BITS>
static inline int integer(const u32 *words, int index) {
  constexpr int PER_WORD = 32 / BITS;
  u32 field = words[index / PER_WORD] >> (BITS * (index % PER_WORD));
  return BITS == 8 ? (int)(int8_t)field : (int)(field & 15);
}

// Rows of 32 bytes, assembled from the parts in the lanes.
template <int BITS>
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
      for (int k = 0; k < 256 / BITS; ++k) sum += integer<BITS>(left, k) * integer<BITS>(right, k);
      sums[2 * upper + side] += sum;
    }
  sync_warp();
}

static inline void multiply_s8(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_integers<8>(sums, a, b0, b1);
}
static inline void multiply_u4(int (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_integers<4>(sums, a, b0, b1);
}

static inline int from_lane(int value, int mask) {
  self->value = value;
  sync_warp();
  int found = lane((int)(self->index.x % 32) ^ mask).value;
  sync_warp();
  return found;
}

// --- execution of a grid ---

static void (*body)();

static void thread_main() {
  body();
  self->state = Thread::DONE;
  swapcontext(&self->context, &scheduler);
}

// Run every ready thread of a warp up to its next barrier; return false if no thread was ready.
static bool run_warp(std::vector<Thread> &all, int first, std::mt19937 &random) {
  int order[32], waiting = 0;
  for (int i = 0; i < 32; ++i) order[i] = first + i, waiting += all[first + i].state == Thread::AT_WARP;
  if (waiting == 32)
    for (int i : order) all[i].state = Thread::READY;
  std::shuffle(order, order + 32, random);
  bool moved = false;
  for (int i : order)
    if (all[i].state == Thread::READY) {
      self = &all[i];
      swapcontext(&scheduler, &self->context);
      moved = true;
    }
  return moved;
}

// Release the block's threads once all of them wait at the block's barrier.
static bool release(std::vector<Thread> &all) {
  size_t waiting = 0, done = 0;
  for (Thread &thread : all) {
    waiting += thread.state == Thread::AT_BLOCK;
    done += thread.state == Thread::DONE;
  }
  if (!waiting || waiting + done != all.size()) return false;
  for (Thread &thread : all)
    if (thread.state == Thread::AT_BLOCK) thread.state = Thread::READY;
  return true;
}

static bool run_block(int count, std::mt19937 &random) {
  std::vector<Thread> all(count);
  threads = &all;
  std::memset(shared, 0xa5, SHARED_BYTES);
  for (int i = 0; i < count; ++i) {
    all[i].index = {(unsigned)i, 0, 0};
    getcontext(&all[i].context);
    all[i].context.uc_stack.ss_sp = all[i].stack.get();
    all[i].context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&all[i].context, thread_main, 0);
  }
  // One warp runs ahead of the others, by a random number of barriers.
  std::vector<int> warps(count / 32);
  for (int i = 0; i < count / 32; ++i) warps[i] = 32 * i;
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), random);
    bool moved = false;
    for (int first : warps)
      for (int burst = 1 << random() % 12; burst > 0 && run_warp(all, first, random); --burst)
        moved = true;
    if (!moved && !release(all)) break;
  }
  for (Thread &thread : all)
    if (thread.state != Thread::DONE) return false;
  return true;
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
    std::mt19937 random(seed);                                                                  \
    early_copies = seed % 2;                                                                    \
    arguments = values;                                                                         \
    body = [] { call_kernel(KERNEL, arguments); };                                              \
    for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)                                          \
      for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)                                        \
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)                                      \
          if (!run_block(count, random)) return 1; /* a deadlock */             \
    return 0;                                                                                   \
  }
