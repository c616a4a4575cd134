// Runs kernels that were translated from PTX: threads, memory with checks, and what a warp does together.
//
// Every access is checked. Global memory is what `ptx_allow` has named. Of shared memory each word knows
// who wrote and read it since the last barrier, and whether a copy is on its way to it, so that a missing
// barrier or wait is a fault in every order of threads, and a read of what nobody wrote is one, too.
// A fault ends the launch; `ptx_fault` says what happened.

#include <cstdint>
#include <cstdio>
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
  u32 written, read;      // Epochs.
  int writer, reader;     // Threads; SEVERAL.
  int copier;             // Thread whose copy is on its way; NOBODY.
  u32 block;              // In which something was written.
};
enum { NOBODY = -1, SEVERAL = -2 };

static std::vector<Range> ranges;
static size_t usual;
static Word words[SHARED_BYTES / 4];
static u32 epoch, block, shared_limit, threads_of_block;
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

// --- global memory ---

static void check_alignment(u64 address, u32 bytes, u32 line, const char *what) {
  if (address % bytes)
    fail(line, std::string(what) + " of " + std::to_string(bytes) + " bytes at an address that is not aligned");
}

static u8 *global(u64 address, u32 bytes, u32 line, bool write) {
  const char *what = write ? "a global store" : "a global load";
  auto inside = [&](const Range &r) { return address >= r.start && address + bytes <= r.end; };
  if (usual >= ranges.size() || !inside(ranges[usual])) {
    usual = 0;
    while (usual < ranges.size() && !inside(ranges[usual])) ++usual;
  }
  if (usual == ranges.size()) {
    std::string near = "no buffer is near";
    u64 least = 1 << 16;
    for (const Range &r : ranges) {
      u64 away = address >= r.end ? address - r.end : address < r.start ? r.start - address : 0;
      if (away >= least) continue;
      least = away;
      near = address < r.start ? std::to_string(away) + " bytes before " + r.name
                               : std::to_string(address - r.start) + " bytes into " + r.name + ", which has " +
                                     std::to_string(r.end - r.start);
    }
    fail(line, std::string(what) + " of " + std::to_string(bytes) + " bytes outside of memory: " + near);
  }
  if (write && !ranges[usual].writable) fail(line, "a store to " + ranges[usual].name + ", which is read only");
  return (u8 *)address;
}

const u8 *global_read(u64 address, u32 bytes, u32 line) {
  check_alignment(address, bytes, line, "a global load");
  return global(address, bytes, line, false);
}

void global_write(u64 address, const void *values, u32 bytes, u32 line) {
  check_alignment(address, bytes, line, "a global store");
  std::memcpy(global(address, bytes, line, true), values, bytes);
}

u64 atomic(Atomic operation, u64 address, u64 value, u32 bytes, u32 line) {
  check_alignment(address, bytes, line, "an atomic operation");
  u8 *at = global(address, bytes, line, true);
  u64 old = 0, fresh = 0;
  std::memcpy(&old, at, bytes);
  auto sign = [&](u64 v) { return bytes == 4 ? (s64)(s32)(u32)v : (s64)v; };
  switch (operation) {
    case ADD: fresh = old + value; break;
    case MIN: fresh = old < value ? old : value; break;
    case MAX: fresh = old > value ? old : value; break;
    case SMIN: fresh = sign(old) < sign(value) ? old : value; break;
    case SMAX: fresh = sign(old) > sign(value) ? old : value; break;
    case AND: fresh = old & value; break;
    case OR: fresh = old | value; break;
    case XOR: fresh = old ^ value; break;
    case EXCH: fresh = value; break;
  }
  std::memcpy(at, &fresh, bytes);
  return old;
}

// --- shared memory ---

static void check_shared(u64 address, u32 bytes, u32 line, const char *what) {
  check_alignment(address, bytes, line, what);
  if (address + bytes > shared_limit)
    fail(line, std::string(what) + " beyond the block's " + std::to_string(shared_limit) + " bytes of shared memory");
}

template <class Check>
static void each_word(u64 address, u32 bytes, Check check) {
  for (u64 at = address / 4; at < (address + bytes + 3) / 4; ++at) check(words[at], (u32)(4 * at));
}

// `me`: the reading thread, or SEVERAL.
static void check_read(u64 address, u32 bytes, u32 line, int me) {
  each_word(address, bytes, [&](Word &word, u32) {
    if (word.copier != NOBODY) fail(line, "shared memory is read before the wait for a copy to it");
    if (word.block != block) fail(line, "shared memory is read that nothing was written to");
    if (word.written == epoch && word.writer != me)
      fail(line, "shared memory is read without a barrier after the store of thread " +
                     std::to_string(word.writer));
    word.reader = word.read == epoch && word.reader != me ? SEVERAL : me;
    word.read = epoch;
  });
}

// `same(at)`: whether the word at byte `at` already has the stored value.
template <class Same>
static void check_write(u64 address, u32 bytes, u32 line, Same same) {
  const int me = (int)self->index.x;
  each_word(address, bytes, [&](Word &word, u32 at) {
    if (word.copier != NOBODY) fail(line, "shared memory is written before the wait for a copy to it");
    if (word.written == epoch && word.writer != me && !same(at))
      fail(line, "shared memory is written without a barrier after the store of thread " +
                     std::to_string(word.writer));
    if (word.read == epoch && word.reader != me)
      fail(line, "shared memory is written without a barrier after the load of another thread");
    word.writer = me, word.written = epoch, word.block = block;
  });
}

const u8 *shared_read(u64 address, u32 bytes, u32 line) {
  check_shared(address, bytes, line, "a shared load");
  check_read(address, bytes, line, (int)self->index.x);
  return shared + address;
}

void shared_write(u64 address, const void *values, u32 bytes, u32 line) {
  check_shared(address, bytes, line, "a shared store");
  const u8 *fresh = (const u8 *)values;
  check_write(address, bytes, line, [&](u32 at) {
    return bytes >= 4 && !std::memcmp(shared + at, fresh + (at - address), 4);
  });
  std::memcpy(shared + address, values, bytes);
}

// --- asynchronous copies ---

void copy_later(u64 target, u64 source, u32 bytes, u32 given, u32 line) {
  check_shared(target, bytes, line, "an asynchronous copy");
  if (given > bytes) fail(line, "an asynchronous copy takes more bytes than it writes");
  check_alignment(source, bytes, line, "an asynchronous copy");
  if (given) global(source, given, line, false);
  check_write(target, bytes, line, [](u32) { return false; });
  each_word(target, bytes, [](Word &word, u32) { word.copier = (int)self->index.x; });
  self->groups.back().push_back({(u32)target, (const u8 *)source, bytes, given});
}

void copies_commit() { self->groups.emplace_back(); }

void copies_wait(u32 newer) {
  // The last group is the open one.
  while (self->groups.size() > newer + 1) {
    for (const Copy &copy : self->groups.front()) {
      std::memset(shared + copy.target, 0, copy.bytes);
      std::memcpy(shared + copy.target, copy.source, copy.given);
      each_word(copy.target, copy.bytes, [](Word &word, u32) {
        word.copier = NOBODY;
        word.writer = (int)self->index.x, word.written = epoch, word.block = block;
      });
    }
    self->groups.pop_front();
  }
}

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
  if ((operation == SHFL || operation == VOTE) && in[0] != ~0u)
    fail(line, "only all threads of a warp together are known, not a part of them");
  sync_warp();
  return self->out;
}

// One 4-bit or 8-bit element of a register.
static int element(u32 word, u32 index, u32 bits, bool is_signed) {
  u32 field = word >> (bits * index) & ((1u << bits) - 1);
  return is_signed && field >> (bits - 1) ? (int)field - (1 << bits) : (int)field;
}

// Positions of fragments: PTX ISA, "Matrix Fragments for mma" of .s8/.u8/.s4/.u4. Register j of A holds
// row g + 8 (j % 2) at columns 4 registers' worth apart; B and C in the same way.
static void mma(Thread *lanes, u32 kind) {
  const u32 m = kind & 255, k = kind >> 8 & 255, bits = kind >> 16 & 255, each = 32 / bits;
  const bool signed_a = kind >> 24 & 1, signed_b = kind >> 25 & 1, saturate = kind >> 26 & 1;
  const u32 count_b = k / (4 * each), count_a = count_b * (m / 8);
  static int a[16][64], b[8][64];
  for (u32 l = 0; l < 32; ++l) {
    const u32 g = l / 4, t = l % 4, *in = lanes[l].in;
    for (u32 j = 0; j < count_a; ++j)
      for (u32 e = 0; e < each; ++e) {
        const u32 half = m == 16 ? j % 2 : 0, part = m == 16 ? j / 2 : j;
        a[g + 8 * half][each * t + e + 4 * each * part] = element(in[j], e, bits, signed_a);
      }
    for (u32 j = 0; j < count_b; ++j)
      for (u32 e = 0; e < each; ++e)
        b[g][each * t + e + 4 * each * j] = element(in[count_a + j], e, bits, signed_b);
  }
  for (u32 l = 0; l < 32; ++l)
    for (u32 i = 0; i < m / 4; ++i) {
      const u32 row = l / 4 + 8 * (i / 2), column = l % 4 * 2 + i % 2;
      s64 sum = (s32)lanes[l].in[count_a + count_b + i];
      for (u32 j = 0; j < k; ++j) sum += a[row][j] * b[column][j];
      if (saturate) sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
      lanes[l].out[i] = (u32)sum;
    }
}

// Matrix i of 8 x 8 halves: row r is the 16 bytes at the address of thread 8 i + r. Thread T gets elements
// 2 (T % 4) and the next of row T / 4; transposed, of column T / 4.
static void ldmatrix(Thread *lanes, u32 kind) {
  const u32 count = kind & 255;
  for (u32 l = 0; l < 32; ++l)
    for (u32 i = 0; i < count; ++i) {
      u32 word = 0;
      for (u32 e = 0; e < 2; ++e) {
        const u32 one = l / 4, other = 2 * (l % 4) + e;
        const u32 row = kind >> 8 ? other : one, column = kind >> 8 ? one : other;
        word |= (u32)get<u16>(shared + lanes[8 * i + row].in[0] + 2 * column) << 16 * e;
      }
      lanes[l].out[i] = word;
    }
}

// in: mask, value, b, c; out: value, whether the source is in range.
static void shfl(Thread *lanes, u32 kind) {
  for (int l = 0; l < 32; ++l) {
    const u32 *in = lanes[l].in;
    const int b = (int)(in[2] & 31), clamp = (int)(in[3] & 31), segment = (int)(in[3] >> 8 & 31);
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int from = kind == 'u' ? l - b : kind == 'd' ? l + b : kind == 'b' ? l ^ b : least | (b & ~segment);
    const bool good = kind == 'u' ? from >= most : from <= most;
    if (!good) from = l;
    lanes[l].out[0] = lanes[from].in[1], lanes[l].out[1] = good;
  }
}

// in: mask, predicate; out: the predicates of all.
static void vote(Thread *lanes) {
  u32 ballot = 0;
  for (int l = 0; l < 32; ++l) ballot |= (u32)(lanes[l].in[1] != 0) << l;
  for (int l = 0; l < 32; ++l) lanes[l].out[0] = ballot;
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
  }
}

static void started() {
  ++block, ++epoch;
  for (u32 i = 0; i < shared_limit / 4; ++i) words[i].copier = NOBODY;
}

static void released() {
  ++epoch;
  for (const Thread &thread : *threads)
    if (thread.state == Thread::AT_BLOCK && thread.line != (*threads)[0].line)
      return note(thread.line, "threads of a block wait in different barriers", &thread);
}

// --- arithmetic that no line of the translation should repeat ---

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
