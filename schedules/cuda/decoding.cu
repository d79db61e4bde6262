// Codes of the layout "mma16x256" as operands of tensor cores, and the sums of their products.
#ifndef MOQC_DECODING
#define MOQC_DECODING

namespace moqc {

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

}  // namespace moqc
#endif
