// Runs kernels that were translated from PTX: threads, memory with checks, and what a warp does together.
//
// Every access is checked. Global memory is what `ptx_allow` has named. Of shared memory each word knows
// who wrote and read it since the last barrier, and whether a copy is on its way to it, so that a missing
// barrier or wait is a fault in every order of threads, and a read of what nobody wrote is one, too.
// A fault ends the launch; `ptx_fault` says what happened.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "device.h"

struct Copy {
  u32 target;
  const u8 *source;
  u32 bytes, given;
};

struct Lane {
  std::deque<std::vector<Copy>> groups{1};
  Operation operation;
  u32 kind, line, in[10], out[4];
};

#include "fibers.h"

// The kernel, in the translated source.
extern "C" {
extern const u32 ptx_parameters[], ptx_parameter_count, ptx_max_threads;
extern const u32 ptx_static_bytes, ptx_dynamic_start;
void ptx_kernel(void **values);
}

struct Range {
  std::string name;
  u64 start, end;
  bool writable;
};

struct Word {
  u32 written, read;          // Epochs: barriers of the block.
  int writer, reader;         // Threads; SEVERAL.
  int reader_warp;            // SEVERAL.
  u32 written_at, read_at;    // Ticks: barriers of warps.
  int copier;                 // Thread whose copy is on its way; NOBODY.
  u32 block;                  // In which something was written.
};
enum { NOBODY = -1, SEVERAL = -2 };

static std::vector<Range> ranges;
static size_t usual;
static Word words[SHARED_BYTES / 4];
static u32 epoch, tick, block, shared_limit, threads_of_block;
static u32 synced[32];  // Tick of each warp's last barrier of its own.
static Index blocks;
static void **arguments;
static std::string message;

static void note(u32 line, const std::string &what, const Thread *thread) {
  if (stopped) return;
  stopped = true;
  char where[160];
  std::snprintf(where, sizeof where, " (PTX line %u, block %u,%u,%u, thread %u)", line, blockIdx.x,
                blockIdx.y, blockIdx.z, thread ? thread->index.x : 0);
  message = what + where;
}

[[noreturn]] static void fail(u32 line, const std::string &what) {
  note(line, what, self);
  swapcontext(&self->context, &scheduler);
  __builtin_unreachable();  // The scheduler resumes no thread after a fault.
}

void fault(u32 line, const char *what) { fail(line, what); }

Place place() {
  return {self->index.x,
          threads_of_block,
          {blockIdx.x, blockIdx.y, blockIdx.z},
          {blocks.x, blocks.y, blocks.z}};
}

#include "memory.h"
#include "numbers.h"
#include "warp.h"

void barrier(u32 line) {
  self->line = line;
  wait_at(Thread::AT_BLOCK);
}

// --- what a warp does together ---

const u32 *together(Operation operation, u32 kind, const u32 *in, u32 count, u32 line) {
  self->operation = operation, self->kind = kind, self->line = line;
  std::memcpy(self->in, in, 4 * count);
  if (operation == LDMATRIX && self->index.x % 32 < 8 * kind % 256) {
    check_shared(in[0], 16, line, "a row of ldmatrix");
    check_read(in[0], 16, line, SEVERAL);
  }
  if ((operation == SHFL || operation == VOTE || operation == SYNC) && in[0] != ~0u)
    fail(line, "only all threads of a warp together are known, not a part of them");
  sync_warp();
  return self->out;
}

static void met(Thread *lanes) {
  for (int l = 0; l < 32; ++l)
    if (lanes[l].line != lanes[0].line)
      return note(lanes[l].line, "threads of a warp wait in different instructions", &lanes[l]);
  const u32 kind = lanes[0].kind;
  switch (lanes[0].operation) {
    case MMA: return mma(lanes, kind);
    case LDMATRIX: return ldmatrix(lanes, kind);
    case SHFL: return shfl(lanes, kind);
    case VOTE: return vote(lanes);
    case SYNC: synced[lanes[0].index.x / 32] = ++tick;
  }
}

static void started() {
  ++block, ++epoch;
  std::memset(synced, 0, sizeof synced);
  for (u32 i = 0; i < shared_limit / 4; ++i) words[i].copier = NOBODY;
}

// bar.sync is `.aligned`: the threads of a warp wait in the same instruction, other warps anywhere.
static void released() {
  ++epoch;
  for (size_t i = 1; i < threads->size(); ++i) {
    const Thread &thread = (*threads)[i], &other = (*threads)[i - 1];
    if (i % 32 && thread.state == other.state && thread.line != other.line)
      return note(thread.line, "threads of a warp wait in different barriers", &thread);
  }
}

// --- interface ---

extern "C" {

void ptx_forget() { ranges.clear(); }

void ptx_allow(const char *name, u64 start, u64 bytes, int writable) {
  ranges.push_back({name, start, start + bytes, writable != 0});
}

const char *ptx_fault() { return message.c_str(); }

// 0: the grid is done; 1: a fault.
int ptx_run(void **values, u32 x, u32 y, u32 z, u32 count, u32 dynamic, int seed) {
  message.clear();
  usual = 0;
  if (count % 32 || count > ptx_max_threads || ptx_dynamic_start + dynamic > SHARED_BYTES) {
    message = "a block of this kernel has at most " + std::to_string(ptx_max_threads) + " threads, in whole warps";
    return 1;
  }
  shared_limit = ptx_dynamic_start + dynamic;
  threads_of_block = count, blocks = {x, y, z}, arguments = values;
  body = [] { ptx_kernel(arguments); };
  if (run_grid({x, y, z}, (int)count, seed)) return 0;
  if (message.empty()) message = "threads wait for ever";
  return 1;
}
}
