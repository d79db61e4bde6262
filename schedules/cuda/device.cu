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
template <class... Fs> struct Formats {
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

// ---------------------------------------------------------------------------------------------- decoding
// Bit position, within an fp16, of the codes that meet x register i (0..15 of a half unit).
template <int BITS> __host__ __device__ constexpr int position(int i) {
  return BITS == 8 ? 0 : BITS == 3 ? ((i & 7) >= 6 ? 6 : 3 * (i & 1)) : BITS * (i % (8 / BITS));
}

// Operand A of step s (0..7) of a half unit, or of its first quarter: rows g and g + 8, x registers 2s and 2s + 1.
template <int BITS> __device__ __forceinline__ void fragment(word (&a)[4], const word* w, int s) {
  if (BITS == 8) {
    const word mask = 0x00ff00ffu, p = w[2 * s], q = w[2 * s + 1];
    a[0] = p & mask, a[1] = (p >> 8) & mask, a[2] = q & mask, a[3] = (q >> 8) & mask;
  } else if (BITS == 3) {   // three words hold 8 registers: five codes a half-word, the sixteenth in the spare bits
    const word *q = w + s / 4 * 3, m0 = 0x00070007u, m3 = 0x00380038u, m6 = 0x01c001c0u;
    if (s % 4 < 3) {
      const word low = q[s % 4], high = low >> 9;
      a[0] = low & m0, a[1] = high & m0, a[2] = low & m3, a[3] = high & m3;
    } else {
      a[0] = q[0] & m6, a[1] = q[1] & m6, a[2] = q[2] & m6;
      a[3] = ((q[0] >> 9) & 0x00400040u) | ((q[1] >> 8) & 0x00800080u) | ((q[2] >> 7) & 0x01000100u);
    }
  } else {
    constexpr int EACH = 8 / BITS;   // x registers a word
    constexpr word MASK = ((1u << BITS) - 1) * 0x00010001u;
    const int i = 2 * s, shift = BITS * (i % EACH);
    const word low = w[i / EACH], high = low >> 8;
    a[0] = low & (MASK << shift), a[1] = high & (MASK << shift);
    a[2] = low & (MASK << (shift + BITS)), a[3] = high & (MASK << (shift + BITS));
  }
}

// c += step s of a unit, or of that quarter of it whose codes w has: 16 of its columns, which x has (4 registers for one bit, else 2). For one bit, a word of codes is the metadata of four steps: its even
// bits of two, its odd bits of two, each from another two lanes of four; bit 1 of a field says which of two it picks.
template <int BITS> __device__ __forceinline__ void step(float (&c)[4], const word* w, const word* x, int s) {
  if constexpr (BITS == 1) {
    const word metadata = ((w[s / 4] >> (s / 2 % 2)) & 0x55555555u) | 0x88888888u;
    if (s % 2 == 0) mma_sparse<0>(c, metadata, x);
    else mma_sparse<1>(c, metadata, x);
  } else {
    word a[4];
    fragment<BITS>(a, w + s / 8 * (2 * BITS), s % 8);
    mma(c, a, x[0], x[1]);
  }
}

// x registers i of a unit times 2^(4 - position), or for one bit each x above a zero; and for every group
// -zero * sum(x) in the accumulator's layout (two columns); for asymmetric formats -zero_step * sum(x), to be multiplied
// by the zero byte.
template <class F> __device__ __forceinline__ void prepare(word* x, float* sums) {
  word ones[4];   // one-bit codes that are all 1
  if constexpr (F::CODE_BITS == 1) {
#pragma unroll
    for (int i = 31; i >= 0; --i) {
      const word pair = x[i];
      x[2 * i + 1] = pair & 0xffff0000u, x[2 * i] = pair << 16;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) ones[i] = 0xffffffffu;
  } else {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const word half_bits = (15 + 4 - position<F::CODE_BITS>(i % 16)) << 10, pair = half_bits | (half_bits << 16);
      const __half2 product = __hmul2(*(__half2*)&x[i], *(const __half2*)&pair);
      x[i] = *(const word*)&product;
    }
  }
  constexpr int STEPS = F::GROUP / 16;
#pragma unroll
  for (int group = 0; group < F::GROUPS; ++group) {
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int s = group * STEPS; s < (group + 1) * STEPS; ++s) {
      if constexpr (F::CODE_BITS == 1) {
        step<1>(c, ones, x + 4 * s, s);
      } else {
        const word p = 0x00010001u << position<F::CODE_BITS>(2 * s % 16), q = 0x00010001u << position<F::CODE_BITS>((2 * s + 1) % 16);
        const word a[4] = {p, p, q, q};
        mma(c, a, x[2 * s], x[2 * s + 1]);
      }
    }
    const float factor = F::SYMMETRIC ? -F::ZERO : -F::ZERO_STEP;
    sums[2 * group] = factor * c[0];
    sums[2 * group + 1] = factor * c[1];
  }
}

__device__ __forceinline__ float byte_value(word w, int byte) {
  return __uint_as_float(__byte_perm(w, 0x4b000000u, 0x7650 | byte)) - 8388608.0f;
}

// Scales of rows g and g + 8, of a lane's as they are stored.
template <class F> __device__ __forceinline__ __half2 scale_of(const word* scales, int group) {
  word pair = scales[F::BYTES ? group / 2 : group];
  if (F::BYTES) pair = __byte_perm(pair, 0, group % 2 ? 0x4342 : 0x4140) << 7;
  return *(const __half2*)&pair;
}

// acc = one unit times x. w: the lane's codes, scales: two (row g, row g + 8) a group, zeros: two bytes a group.
template <class F>
__device__ __forceinline__ void dot(float (&acc)[4], const word* w, const word* x, const float* sums, const word* scales, const word* zeros) {
  constexpr int STEPS = F::GROUP / 16;
  Quarter<F> quarter;
  acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
#pragma unroll
  for (int group = 0; group < F::GROUPS; ++group) {
    float c[4] = {sums[2 * group], sums[2 * group + 1], sums[2 * group], sums[2 * group + 1]};
    if (!F::SYMMETRIC) {
      const float z0 = byte_value(zeros[group / 2], group % 2 * 2), z8 = byte_value(zeros[group / 2], group % 2 * 2 + 1);
      c[0] *= z0, c[1] *= z0, c[2] *= z8, c[3] *= z8;
    }
#pragma unroll
    for (int s = group * STEPS; s < (group + 1) * STEPS; ++s)
      step<F::CODE_BITS>(c, quarter.of(w, s / 4, s % 4 == 0), x + (F::CODE_BITS == 1 ? 4 : 2) * s, s % 4);
    const float2 scale = __half22float2(scale_of<F>(scales, group));
    acc[0] = fmaf(scale.x, c[0], acc[0]), acc[1] = fmaf(scale.x, c[1], acc[1]);
    acc[2] = fmaf(scale.y, c[2], acc[2]), acc[3] = fmaf(scale.y, c[3], acc[3]);
  }
}

// The sum of `mine` over the block's threads up to this one; `sums`: a place for each warp. The block has whole warps.
template <class T> __device__ __forceinline__ T sum_up_to(T mine, T* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, mine, step);
    if (lane >= step) mine += other;
  }
  if (lane == 31) sums[warp] = mine;
  __syncthreads();
  for (int i = 0; i < warp; ++i) mine += sums[i];
  return mine;
}

// ---------------------------------------------------------------------------------------------- activations in
__device__ __forceinline__ uint4 load_columns(const __half* p) { return load_now((const uint4*)p); }   // 8 columns
__device__ __forceinline__ uint4 load_columns(const float* p) {
  const float4 a = load_now((const float4*)p), b = load_now((const float4*)p + 1);
  const __half2 h[4] = {__floats2half2_rn(a.x, a.y), __floats2half2_rn(a.z, a.w), __floats2half2_rn(b.x, b.y), __floats2half2_rn(b.z, b.w)};
  return *(const uint4*)h;
}

// 2^shift that brings |largest| under 2048 (0 or more), and that power of two.
__device__ __forceinline__ int shift_of(float largest) { return max(0, (int)(__float_as_uint(largest) >> 23 & 255) - 127 - 10); }
__device__ __forceinline__ float power(int shift) { return __uint_as_float((127 + shift) << 23); }
__device__ __forceinline__ __half2 scaled(__half2 pair, float by) {
  const float2 values = __half22float2(pair);
  return __floats2half2_rn(values.x * by, values.y * by);
}
__device__ __forceinline__ __half2 scaled(float2 pair, float by) { return __floats2half2_rn(pair.x * by, pair.y * by); }
__device__ __forceinline__ float largest_of(__half2 pair) { return fmaxf(fabsf(__low2float(pair)), fabsf(__high2float(pair))); }
__device__ __forceinline__ float largest_of(float2 pair) { return fmaxf(fabsf(pair.x), fabsf(pair.y)); }
template <class T> struct PairOf;
template <> struct PairOf<__half> { using type = __half2; };
template <> struct PairOf<float> { using type = float2; };

// `mine`: a factor of this lane's token (lane / 4); returned: those of the accumulators' columns.
__device__ __forceinline__ float2 factors(float mine, int lane) {
  return make_float2(__shfl_sync(0xffffffffu, mine, lane % 4 * 8), __shfl_sync(0xffffffffu, mine, lane % 4 * 8 + 4));
}

// The lane's 64 of the unit's 256 columns: chunk v is columns first + 32 v + 8 (lane % 4) .. + 7 of `row`, zero from N on.
// Returns whether any of the warp's is too large.
template <int N, class T> __device__ __forceinline__ bool load_raw(word* x, const T* row, int first, bool there, int lane) {
  __half2 largest = __float2half2_rn(0.0f);
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    const int k = first + 32 * v + 8 * (lane % 4);
    uint4 values = {0, 0, 0, 0};
    if (there && (N % COLUMNS == 0 || k < N)) values = load_columns(row + k);
    x[4 * v] = values.x, x[4 * v + 1] = values.y, x[4 * v + 2] = values.z, x[4 * v + 3] = values.w;
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) largest = __hmax2(largest, __habs2(*(const __half2*)&x[i]));
  return __any_sync(0xffffffffu, largest_of(largest) >= LIMIT);
}
// The power of two that large columns of the lane's token are to be divided by, from what may be beyond fp16.
template <int N, class T> __device__ __forceinline__ int shift_in(const T* row, int first, bool there, int lane) {
  using Pair = typename PairOf<T>::type;
  float most = 0.0f;
#pragma unroll 1
  for (int i = 0; i < 32; ++i) {
    const int k = first + 32 * (i / 4) + 8 * (lane % 4) + 2 * (i % 4);
    if (there && (N % COLUMNS == 0 || k < N)) most = fmaxf(most, largest_of(*(const Pair*)(row + k)));
  }
  most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
  most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
  return shift_of(most);
}
template <int N, class T> __device__ __forceinline__ void load_divided(word* x, const T* row, int first, bool there, int lane, int shift) {
  using Pair = typename PairOf<T>::type;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int k = first + 32 * (i / 4) + 8 * (lane % 4) + 2 * (i % 4);
    __half2 pair = __float2half2_rn(0.0f);
    if (there && (N % COLUMNS == 0 || k < N)) pair = scaled(*(const Pair*)(row + k), power(-shift));
    x[i] = *(const word*)&pair;
  }
}
// All of it. Returns what the products of the accumulators' two columns are to be multiplied by.
template <int N, class T> __device__ __forceinline__ float2 load_x(word* x, const T* row, int first, bool there, int lane) {
  if (!load_raw<N>(x, row, first, there, lane)) return make_float2(1.0f, 1.0f);
  const int shift = shift_in<N>(row, first, there, lane);
  load_divided<N>(x, row, first, there, lane, shift);
  return factors(power(shift), lane);
}

// The lane's columns 8 lane .. 8 lane + 7 of the unit, for one token.
template <int N> __device__ __forceinline__ void load_eight(float (&x)[8], const float* row, int first, int lane) {
  const int k = first + 8 * lane;
  float4 values[2] = {};
  if (N % COLUMNS == 0 || k < N) values[0] = load_now((const float4*)(row + k)), values[1] = load_now((const float4*)(row + k) + 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) x[4 * i] = values[i].x, x[4 * i + 1] = values[i].y, x[4 * i + 2] = values[i].z, x[4 * i + 3] = values[i].w;
}
template <int N> __device__ __forceinline__ void load_eight(float (&x)[8], const __half* row, int first, int lane) {
  const int k = first + 8 * lane;
  uint4 values = {0, 0, 0, 0};
  if (N % COLUMNS == 0 || k < N) values = load_columns(row + k);
  const word pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*(const __half2*)&pairs[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

// The same of activations that `route_and_halve` made: fp16, rows padded to whole units, none too large.
__device__ __forceinline__ void load_halves(word* x, const __half* row, int first, bool there, int lane) {
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    uint4 values = {0, 0, 0, 0};
    if (there) values = load_columns(row + first + 32 * v + 8 * (lane % 4));
    x[4 * v] = values.x, x[4 * v + 1] = values.y, x[4 * v + 2] = values.z, x[4 * v + 3] = values.w;
  }
}
template <class X> constexpr bool HALVES = false;   // what X* points to, if it is those
template <> constexpr bool HALVES<unsigned char> = true;

// The same from `hidden`, of which each 16 columns are divided by 2^shift: a byte each in `shifts`, 16 a unit; here the unit's.
template <int N> __device__ __forceinline__ uint4 load_shifts(const unsigned char* shifts, int first, bool there) {
  uint4 given = {0, 0, 0, 0};
  if (there) given = load_columns((const __half*)(shifts + first / ROWS));
  if (N % COLUMNS != 0) {   // nobody wrote the bytes past the last row tile
    const int tiles = (N + ROWS - 1) / ROWS - first / ROWS;
    const auto kept = [&](int i) {
      const int valid = min(max(tiles - 4 * i, 0), 4);
      return valid == 4 ? 0xffffffffu : (1u << (8 * valid)) - 1;
    };
    given.x &= kept(0), given.y &= kept(1), given.z &= kept(2), given.w &= kept(3);
  }
  return given;
}
__device__ __forceinline__ int largest_byte(uint4 bytes) {
  const word most = __vmaxu4(__vmaxu4(bytes.x, bytes.y), __vmaxu4(bytes.z, bytes.w));
  return max(max(most & 255, most >> 8 & 255), max(most >> 16 & 255, most >> 24));
}
// x, as it was loaded, made what it is times 2^-most.
__device__ __forceinline__ void apply_shifts(word* x, uint4 given, int most, int lane) {
  const word each[4] = {given.x, given.y, given.z, given.w};
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    const int shift = each[v / 2] >> (8 * (v % 2 * 2 + lane % 4 / 2)) & 255;
    const float by = power(max(shift - most, -126));
#pragma unroll
    for (int i = 4 * v; i < 4 * v + 4; ++i) {
      const __half2 pair = scaled(*(const __half2*)&x[i], by);
      x[i] = *(const word*)&pair;
    }
  }
}
template <int N> __device__ __forceinline__ void load_hidden_raw(word* x, const __half* row, int first, bool there, int lane) {
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    const int k = first + 32 * v + 8 * (lane % 4);
    uint4 values = {0, 0, 0, 0};
    if (there && (N % COLUMNS == 0 || k < N)) values = load_columns(row + k);
    x[4 * v] = values.x, x[4 * v + 1] = values.y, x[4 * v + 2] = values.z, x[4 * v + 3] = values.w;
  }
}
template <int N> __device__ __forceinline__ void load_hidden_eight(float (&x)[8], const __half* row, const unsigned char* shifts, int first, int lane) {
  const int k = first + 8 * lane;
  const float by = power(N % COLUMNS == 0 || k < N ? *(const volatile unsigned char*)(shifts + k / ROWS) : 0);
  load_eight<N>(x, row, first, lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= by;
}
template <int N> __device__ __forceinline__ float2 load_hidden(word* x, const __half* row, const unsigned char* shifts, int first, bool there, int lane) {
  const uint4 given = load_shifts<N>(shifts, first, there);
  load_hidden_raw<N>(x, row, first, there, lane);
  if (!__any_sync(0xffffffffu, (given.x | given.y | given.z | given.w) != 0)) return make_float2(1.0f, 1.0f);
  const int most = largest_byte(given);
  apply_shifts(x, given, most, lane);
  return factors(power(most), lane);
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
