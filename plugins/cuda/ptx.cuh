// Machine instructions of the kernels: conversions, asynchronous copies, tensor cores. Comments
// describe the operands of one thread. The tests replace this file with a file that computes the
// same results on a CPU, so no other file of the kernels may use inline assembly.
//
// Letters: g = lane / 4, t = lane % 4 of a warp's 32 lanes.

#pragma once

typedef unsigned char u8;
typedef unsigned short f16;  // Bits of a half, without CUDA's headers.
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
// Whether copies from global to shared memory are asynchronous.
#define ASYNCHRONOUS (__CUDA_ARCH__ >= 800)

DEVICE float to_float(f16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

DEVICE float to_float(float value) { return value; }

DEVICE void from_float(float value, f16 *out) {
  f16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  *out = bits;
}

DEVICE void from_float(float value, float *out) { *out = value; }

// Multiplication and addition that are never fused into one rounding, as in torch.
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
// Half to even.
DEVICE float round_even(float value) { return rintf(value); }

// Two values as halves, the first in the lower bits.
DEVICE u32 two_halves(float first, float second) {
#if __CUDA_ARCH__ >= 800
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#else
  f16 low, high;
  from_float(first, &low);
  from_float(second, &high);
  return low | (u32)high << 16;
#endif
}

// An address in shared memory.
typedef u32 Shared;
DEVICE Shared shared_address(const u8 *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Copies 16 bytes from global to shared memory, both aligned to 16 bytes; zeros if not `inside`. The
// copy is complete after `copies_wait`. GPUs without asynchronous copies (Turing) load to registers, and
// `keep_16` stores them.
DEVICE void fetch_16(Shared target, const u8 *source, bool inside, uint4 &kept) {
#if ASYNCHRONOUS
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(inside ? 16 : 0)
               : "memory");
#else
  kept = make_uint4(0, 0, 0, 0);
  if (inside) kept = *(const uint4 *)source;
#endif
}

DEVICE void store_4(Shared target, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(target), "r"(value) : "memory");
}

DEVICE void keep_16(Shared target, const uint4 &kept) {
#if !ASYNCHRONOUS
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(kept.x), "r"(kept.y),
               "r"(kept.z), "r"(kept.w)
               : "memory");
#endif
}

// Ends a group of copies, which may be empty.
DEVICE void copies_commit() {
#if ASYNCHRONOUS
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `NEWER` of this thread's groups are pending.
template <int NEWER>
DEVICE void copies_wait() {
#if ASYNCHRONOUS
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWER) : "memory");
#endif
}

// Loads four matrices of 8 rows with 16 bytes each. Lane l passes the address of row l % 8 of
// matrix l / 8 and receives bytes 4t .. 4t + 3 of row g of every matrix.
DEVICE void load_matrices(u32 (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// sums[16,8] += a[16,32 bytes] b[8,32 bytes]^T over the 8-bit or 4-bit integers in the bytes; the types
// of a and b are in the names.
// a: rows g, g + 8 at bytes 4t, then the same rows at 16 + 4t; b: row g at bytes 4t and 16 + 4t;
// sums: row g at columns 2t, 2t + 1, then row g + 8.
#if __CUDA_ARCH__ >= 800
#define MMA_16(NAME, SHAPE, TYPES)                                                              \
  DEVICE void NAME(int(&sums)[4], const u32(&a)[4], u32 b0, u32 b1) {                           \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.s32." TYPES                                \
                 ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));               \
  }
MMA_16(multiply_s8_s8, "m16n8k32", "s8.s8")
MMA_16(multiply_s8_u8, "m16n8k32", "s8.u8")
MMA_16(multiply_u4_u4, "m16n8k64", "u4.u4")
#else  // Turing has a quarter of the size: 8 rows, 16 bytes.
#define MMA_8(NAME, SHAPE, TYPES)                                                               \
  DEVICE void NAME##_8(int &s0, int &s1, u32 a, u32 b) {                                        \
    asm volatile("mma.sync.aligned." SHAPE ".row.col.s32." TYPES                                \
                 ".s32 {%0, %1}, {%2}, {%3}, {%0, %1};"                                         \
                 : "+r"(s0), "+r"(s1)                                                           \
                 : "r"(a), "r"(b));                                                             \
  }                                                                                             \
  DEVICE void NAME(int(&sums)[4], const u32(&a)[4], u32 b0, u32 b1) {                           \
    NAME##_8(sums[0], sums[1], a[0], b0);                                                       \
    NAME##_8(sums[2], sums[3], a[1], b0);                                                       \
    NAME##_8(sums[0], sums[1], a[2], b1);                                                       \
    NAME##_8(sums[2], sums[3], a[3], b1);                                                       \
  }
MMA_8(multiply_s8_s8, "m8n8k16", "s8.s8")
MMA_8(multiply_s8_u8, "m8n8k16", "s8.u8")
MMA_8(multiply_u4_u4, "m8n8k32", "u4.u4")
#endif

// `sum` plus the four signed bytes of a word.
DEVICE int add_bytes(u32 word, int sum) { return __dp4a((int)word, 0x01010101, sum); }

// Bytes of the words `low` (numbers 0 .. 3) and `high` (4 .. 7), chosen by the four digits of `order`.
DEVICE u32 choose_bytes(u32 low, u32 high, u32 order) { return __byte_perm(low, high, order); }

// The threads of a warp wait for each other, and see what all have written to memory.
DEVICE void warp_barrier() { __syncwarp(); }

// blockIdx.z, read again: what is computed from it needs no register in between.
DEVICE int block_z() {
  u32 z;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
  return (int)z;
}

// Other blocks see what this thread has written to global memory before; this thread sees what others
// published before it counted an arrival.
DEVICE void publish() { __threadfence(); }
// The number of arrivals before this one.
DEVICE int arrive(int *counter) { return atomicAdd(counter, 1); }
// Reads what other blocks have published.
DEVICE uint4 load_published(const uint4 *source) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source)
               : "memory");
  return v;
}

// The value of the lane whose number differs in the bits of `mask`.
DEVICE int from_lane(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

#define DYNAMIC_SHARED(NAME) extern __shared__ __align__(128) u8 NAME[]
