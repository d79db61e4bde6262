// Device code of moqc's decode kernels (each expert hit, 1 or 8 tokens at a time) for NVIDIA GPUs, sm_80 and later.
//
// Weights lie in the layout "mma16x256" (moqc/quant/pack_mma.py): a *unit* is 16 rows x 256 columns of one
// matrix, `bits` times 512 bytes, so that lane l of a warp reads its part with `bits` loads of 16 bytes. A code is
// never converted: masked in place it is an fp16 subnormal, code * 2^(position - 24), exact in the tensor core, and
// the position is divided out of the activations once. The zero point is the accumulator's start value. One-bit codes
// are not decoded at all: they are the metadata of a sparse product, which picks the activation or a zero beside it.
//
// A warp keeps one unit's 256 columns of activations in 32 registers and streams the row tiles of a matrix past
// them, STAGES tiles ahead: in registers, or through a ring of its own in shared memory.
//
// Activations are fp16 here, and preparing them multiplies by up to 16: where they reach LIMIT, a warp divides its
// columns of a token by a power of two and multiplies it back into its partial sums.
#ifndef MOQC_DEVICE
#define MOQC_DEVICE
#include <cuda_fp16.h>

namespace moqc {

constexpr int ROWS = 16, COLUMNS = 256;   // of a unit
constexpr float SCALE = 1048576.0f;       // 2^20: what prepare() leaves in every product
constexpr float LIMIT = 4094.0f;          // of activations: 16 times it is the largest fp16

__host__ __device__ constexpr int largest(int a) { return a; }
template <class... Rest> __host__ __device__ constexpr int largest(int a, int b, Rest... rest) { return largest(a > b ? a : b, rest...); }

// ---------------------------------------------------------------------------------------------- formats
// BYTES: scales are the upper bytes of fp16. TRELLIS: see trellis.cu; BITS are stored of a weight, CODE_BITS multiplied with.
template <int BITS_, int GROUP_, bool SYMMETRIC_, bool BYTES_, bool TRELLIS_ = false> struct Format {
  static constexpr int BITS = BITS_, GROUP = GROUP_, GROUPS = COLUMNS / GROUP_;   // GROUPS: in a unit
  static constexpr bool SYMMETRIC = SYMMETRIC_, BYTES = BYTES_, TRELLIS = TRELLIS_;
  static constexpr int CODE_BITS = TRELLIS ? 1 << BITS : BITS;
  static constexpr int ID = (((TRELLIS * 16 + BITS) * 256 + GROUP) * 2 + SYMMETRIC) * 2 + BYTES, SCALE = BYTES ? 1 : 2;   // SCALE: bytes of one
  static constexpr float ZERO = TRELLIS ? trellis_value(BITS, (2 << BITS) - 1) * 0.5f : BITS <= 2 || BYTES ? ((1 << BITS) - 1) * 0.5f : (1 << BITS) * 0.5f;
  static constexpr float ZERO_STEP = ((1 << BITS) - 1) / 255.0f;
};

// The formats of one projection's classes, in the order of its tensors; or of a whole kernel, each once.
template <class... Fs> struct FirstOf { using type = void; };
template <class F, class... Rest> struct FirstOf<F, Rest...> { using type = F; };
template <class... Fs> struct Formats {
  using First = typename FirstOf<Fs...>::type;
  static constexpr int COUNT = sizeof...(Fs);
  static constexpr int BITS = largest(0, Fs::BITS...), CODE_BITS = largest(0, Fs::CODE_BITS...), GROUPS = largest(0, Fs::GROUPS...);
  static constexpr bool HAS_ZEROS = (!Fs::SYMMETRIC || ...);
  static constexpr int X = ((Fs::CODE_BITS == 1) || ...) ? 64 : 32;   // registers of activations
  static constexpr int CODES = BITS * 512, SCALES = GROUPS * 128, ZEROS = HAS_ZEROS ? GROUPS * 64 : 0;
  static constexpr int SLOT = CODES + SCALES + ZEROS;   // bytes of a unit in the ring, scales as each lane wants them
};

// One lane's view of one unit; `step` moves it down a row tile. With one format all of it but the pointers is constant.
struct Unit {
  const char *codes, *scales, *zeros;
  int id, bits, groups, scale, symmetric;   // scale: bytes of one

  template <class F> __device__ static Unit at(const void* const* tensors, long long unit, int lane) {
    Unit first = with_facts<F>({(const char*)tensors[0], (const char*)tensors[1], (const char*)tensors[2]});
    first.advance(unit, lane);
    return first;
  }
  template <class F> __device__ static Unit with_facts(const Unit& unit) {   // its format made known to the compiler
    return {unit.codes, unit.scales, unit.zeros, F::ID, F::BITS, F::GROUPS, F::SCALE, F::SYMMETRIC};
  }
  __device__ void advance(long long unit, int lane) {   // from the first of a class
    codes += unit * (bits * 512) + lane * 16;
    scales += (unit * 8 + lane / 4) * (groups * scale * 2);
    if (!symmetric) zeros += (unit * 8 + lane / 4) * (groups * 2);
  }
  __device__ void step(int units) {   // units: a row tile's
    codes += units * bits * 512;
    scales += units * groups * scale * 16;
    if (!symmetric) zeros += units * groups * 16;
  }
};

// Selected without branches, so that the addresses of all tensors are read together.
template <class... Fs>
__device__ __forceinline__ Unit locate(Formats<Fs...>, const void* const* tensors, int2 place, long long units, long long unit, int lane) {
  const char* const* const parts = (const char* const*)tensors;
  Unit result = {};
  int at = 0;
  ((result = sizeof...(Fs) == 1 || place.x == at / 3 ? Unit::with_facts<Fs>({parts[at], parts[at + 1], parts[at + 2]}) : result, at += 3), ...);
  result.advance(place.y * units + unit, lane);
  return result;
}

// ---------------------------------------------------------------------------------------------- instructions
// Weights: read once, not kept in L1. Not .nc: ptxas moves such loads behind the wait for the kernel ahead.
__device__ __forceinline__ void load16(word* d, const void* p) {
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(p));
}
__device__ __forceinline__ void load8(word* d, const void* p) {   // scales and zeros, likewise
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "l"(p));
}
__device__ __forceinline__ void load4(word* d, const void* p) { asm volatile("ld.global.u32 %0, [%1];" : "=r"(d[0]) : "l"(p)); }
__device__ __forceinline__ void copy16(word shared, const void* p) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared), "l"(p) : "memory");
}
template <int BYTES> __device__ __forceinline__ void copy(word shared, const void* p) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(p), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
__device__ __forceinline__ void add(float* p, float v) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory"); }
// Issued here, wherever the value is used: lists are read together, not one after the other.
__device__ __forceinline__ int load_now(const int* p) {
  int v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ long long load_now(const long long* p) {
  long long v;
  asm volatile("ld.global.s64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float load_now(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_now(const uint4* p) {   // not .nc: another kernel may just have written it
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_now(const float4* p) {
  float4 v;
  asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void mma(float (&d)[4], const word (&a)[4], word b0, word b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bytes(int (&d)[4], const word (&a)[4], word b0, word b1) {   // A without signs
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The sparse product: of 4 rows of B, each row of A takes the two that `metadata` names, here times 2^-20.
template <int LANES> __device__ __forceinline__ void mma_sparse(float (&d)[4], word metadata, const word* b) {
  const word a = 0x00100010u;
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%4,%4,%4},{%5,%6,%7,%8},{%0,%1,%2,%3},%9,%10;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(LANES));
}

// ---------------------------------------------------------------------------------------------- partial sums
// A tile's partial sums of one warp, TOKENS == 1: [16 rows]; TOKENS == 8: [16 rows][8 tokens] with token pairs
// swizzled by row, so that neither the accumulators' stores nor reads along rows conflict.
template <int TOKENS> __device__ __forceinline__ int place(int row, int token) {
  return TOKENS == 1 ? row : row * 8 + (((token >> 1 ^ row >> 2) & 3) << 1) + (token & 1);
}
template <int TOKENS> __device__ __forceinline__ void store_partial(float* tile, const float (&acc)[4], float2 factor, int lane) {
  const int row = lane / 4, token = lane % 4 * 2;
  if (TOKENS == 1) {
    if (token == 0) tile[row] = acc[0] * factor.x, tile[row + 8] = acc[2] * factor.x;
  } else {
    *(float2*)(tile + place<TOKENS>(row, token)) = make_float2(acc[0] * factor.x, acc[1] * factor.y);
    *(float2*)(tile + place<TOKENS>(row + 8, token)) = make_float2(acc[2] * factor.x, acc[3] * factor.y);
  }
}
template <int WARPS, int TOKENS> __device__ __forceinline__ float sum_partials(const float* tile, int row, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) sum += tile[warp * (ROWS * TOKENS) + place<TOKENS>(row, token)];
  return sum * SCALE;
}

}  // namespace moqc
#endif
