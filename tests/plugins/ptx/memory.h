// Checked global and shared memory, and asynchronous copies; part of runtime.cpp.

#pragma once

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

static int my_warp() { return (int)self->index.x / 32; }

// Whether a warp's own barrier is between an access of that warp and this one, of the same warp.
static bool after_warp(int warp, u32 at) { return warp == my_warp() && at < synced[warp]; }

// `me`: the reading thread, or SEVERAL.
static void check_read(u64 address, u32 bytes, u32 line, int me) {
  each_word(address, bytes, [&](Word &word, u32) {
    if (word.copier != NOBODY) fail(line, "shared memory is read before the wait for a copy to it");
    if (word.block != block) fail(line, "shared memory is read that nothing was written to");
    if (word.written == epoch && word.writer != me && !after_warp(word.writer / 32, word.written_at))
      fail(line, "shared memory is read without a barrier after the store of thread " +
                     std::to_string(word.writer));
    const bool again = word.read == epoch;
    word.reader = again && word.reader != me ? SEVERAL : me;
    word.reader_warp = again && word.reader_warp != my_warp() ? SEVERAL : my_warp();
    word.read = epoch, word.read_at = tick;
  });
}

// `same(at)`: whether the word at byte `at` already has the stored value.
template <class Same>
static void check_write(u64 address, u32 bytes, u32 line, Same same) {
  const int me = (int)self->index.x;
  each_word(address, bytes, [&](Word &word, u32 at) {
    if (word.copier != NOBODY) fail(line, "shared memory is written before the wait for a copy to it");
    if (word.written == epoch && word.writer != me && !same(at) &&
        !after_warp(word.writer / 32, word.written_at))
      fail(line, "shared memory is written without a barrier after the store of thread " +
                     std::to_string(word.writer));
    if (word.read == epoch && word.reader != me && !after_warp(word.reader_warp, word.read_at))
      fail(line, "shared memory is written without a barrier after the load of another thread");
    word.writer = me, word.written = epoch, word.written_at = tick, word.block = block;
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
        word.writer = (int)self->index.x, word.written = epoch, word.written_at = tick, word.block = block;
      });
    }
    self->groups.pop_front();
  }
}
