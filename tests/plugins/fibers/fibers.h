// Threads of a block as fibers on a CPU, in an order that depends on a seed.
//
// A thread runs until it waits for its warp or its block, so accesses without a barrier occur in an
// arbitrary order; shared memory is initialised with garbage. The includer defines before:
//
//   struct Lane   what a thread keeps besides its fiber
//
// and after it
//
//   void met(Thread *first)   called when the 32 threads from `first` on wait for their warp
//   void started()            called when a block starts
//   void released()           called when all threads of the block have reached its barrier

#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

struct Index {
  unsigned x, y, z;
};

constexpr int SHARED_BYTES = 1 << 18, STACK_BYTES = 1 << 18;
alignas(128) unsigned char shared[SHARED_BYTES];

struct Thread : Lane {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK_BYTES]};
  Index index;
  enum State { READY, AT_WARP, AT_BLOCK, DONE } state = READY;
};

static std::vector<Thread> *threads;
static Thread *self;
static ucontext_t scheduler;
static Index blockIdx;
static bool stopped;  // By a fault; no thread runs any more.

static void met(Thread *first);
static void started();
static void released();

static inline void wait_at(Thread::State state) {
  self->state = state;
  Thread *me = self;
  swapcontext(&me->context, &scheduler);
}

static inline void sync_warp() { wait_at(Thread::AT_WARP); }
static inline Thread &lane(int index) { return (*threads)[self->index.x / 32 * 32 + index]; }

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
  if (waiting == 32) {
    met(&all[first]);
    for (int i : order) all[i].state = Thread::READY;
  }
  std::shuffle(order, order + 32, random);
  bool moved = false;
  for (int i : order)
    if (all[i].state == Thread::READY && !stopped) {
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
  released();
  for (Thread &thread : all)
    if (thread.state == Thread::AT_BLOCK) thread.state = Thread::READY;
  return true;
}

static bool run_block(std::vector<Thread> &all, std::mt19937 &random) {
  int count = (int)all.size();
  threads = &all;
  std::memset(shared, 0xa5, SHARED_BYTES);
  for (int i = 0; i < count; ++i) {
    (Lane &)all[i] = Lane();
    all[i].state = Thread::READY;
    all[i].index = {(unsigned)i, 0, 0};
    getcontext(&all[i].context);
    all[i].context.uc_stack.ss_sp = all[i].stack.get();
    all[i].context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&all[i].context, thread_main, 0);
  }
  started();
  // One warp runs ahead of the others, by a random number of barriers.
  std::vector<int> warps(count / 32);
  for (int i = 0; i < count / 32; ++i) warps[i] = 32 * i;
  while (!stopped) {
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

// Run all blocks, one after the other; return false after a fault or if threads wait for ever.
static bool run_grid(Index blocks, int count, int seed) {
  std::mt19937 random(seed);
  std::vector<Thread> all(count);
  stopped = false;
  for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x)
        if (!run_block(all, random)) return false;
  return true;
}
