// Products of one token by int8, for NVIDIA GPUs, sm_80 and later.
//
// With one token seven of the eight columns of operand B are free, and make decoding cheaper: a word of codes masked in place
// is four bytes of operand A, where fp16 takes two codes at a time. The layout puts rows g and g + 8 into each word: B has the
// activations in one column at the bytes of row g, in the next at those of row g + 8, with zeros between. An activation is an
// integer of 16 bits, its two bytes (*planes*) in columns of their own. Codes of two bit positions (*kinds*) meet in one
// product, each in columns of its own; more positions have accumulators of their own (*sets*). So column n of B is
//     row half n % 2, plane n / 2 % 2, kind n / 4,
// and the accumulators of lane l are row halves 0 and 1 of plane l % 2 and kind l / 2 % 2. A's rows g and g + 8 are two row
// tiles. Sums are exact. The last set's accumulator starts as the bits of a float so large that what is added to its bits is
// added to its value, in units that are plane and position: with the other sets added, no conversion is left to do.
#ifndef MOQC_BYTES
#define MOQC_BYTES

namespace moqc {

template <class F> constexpr bool BY_BYTES = F::GROUP >= 64;   // 64 columns are whole words at every width

constexpr int BYTES_SCRATCH = 512;   // bytes of shared memory a warp needs to prepare its activations

template <int BITS> struct Bytes {
  static constexpr int SETS = BITS == 1 ? 4 : BITS <= 3 ? 2 : 1, LAST = SETS - 1;
  // The set of product m (0..3) of 64 columns.
  __host__ __device__ static constexpr int set(int m) { return BITS == 1 ? m : BITS == 2 ? m % 2 : BITS == 3 ? m / 3 : 0; }
  // Bit position, in their bytes, of the codes of a set and kind, in a row half.
  __host__ __device__ static constexpr int position(int set, int kind, int row) {
    return BITS == 1 ? 2 * set + kind : BITS == 2 ? 4 * set + 2 * kind : BITS == 3 ? (set ? 5 : 3 * kind + row) : BITS == 4 ? 4 * kind : 0;
  }
  // What a set's sums are multiplied by to have the last one's unit.
  __host__ __device__ static constexpr int weight(int set, int kind, int row) { return 1 << (position(LAST, kind, row) - position(set, kind, row)); }
};

// Operand A of product m of 64 columns, whose BITS words w has: the words of both kinds.
template <int BITS> __device__ __forceinline__ void byte_codes(word& first, word& second, const word* w, int m) {
  if (BITS == 8) {
    first = w[2 * m], second = w[2 * m + 1];
  } else if (BITS == 3 && m < 3) {
    first = w[m] & 0x0e070e07u, second = w[m] & 0x70387038u;
  } else if (BITS == 3) {
    first = ((w[0] >> 1) & 0x00e000e0u) | ((w[1] << 7) & 0xe000e000u);
    second = ((w[2] >> 1) & 0x00e000e0u) | ((w[0] >> 2) & 0x20002000u) | ((w[1] >> 1) & 0x40004000u) | (w[2] & 0x80008000u);
  } else {
    constexpr int EACH = BITS > 4 ? 1 : 4 / BITS;   // products a word
    constexpr word MASK = ((1u << BITS) - 1) * 0x01010101u;
    const int shift = 2 * BITS * (m % EACH);
    first = w[m / EACH] & (MASK << shift), second = w[m / EACH] & (MASK << (shift + BITS));
  }
}

// The 256 activations of a warp's unit.
template <class F> struct ByteActivations {
  using B = Bytes<F::CODE_BITS>;
  word b[32];              // operand B of product m of 64 columns c: 8 c + 2 m and the next
  float start;             // what the last set's accumulators start from
  float zeros[F::GROUPS];  // of a group's activations, times the zero point and added to `start`, or times its step; 0 but in one column of a row half
  int weights[B::SETS][2]; // see `Bytes`, by row half

  // From the lane's columns 8 lane .. 8 lane + 7, by way of the warp's `scratch`. Returns what sums are to be multiplied by.
  __device__ __forceinline__ float prepare(const float (&x)[8], char* scratch, int lane) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i]));
    most = fmaxf(__uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(most))), 1e-30f);
    const float by = 32512.0f / most;   // 127 * 256: both bytes have signs
    const int kind = lane / 2 % 2;
    start = __uint_as_float(0x4b400000u + ((8 * (lane % 2) - (kind ? B::position(B::LAST, 1, 0) : B::position(B::LAST, 0, 0))) << 23));
    word value[8];   // in the lower 16 bits
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = __float_as_uint(fmaf(x[i], by, 12582912.0f)), sum += (int)(value[i] - 0x4b400000u);
#pragma unroll
    for (int group = 0; group < F::GROUPS; ++group) {
      const int all = __reduce_add_sync(0xffffffffu, lane / (F::GROUP / 8) == group ? sum : 0);
      zeros[group] = (F::SYMMETRIC ? start : 0.0f) + (lane % 4 == 0 ? (F::SYMMETRIC ? F::ZERO : F::ZERO_STEP) * (float)all : 0.0f);
    }
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      word pairs[2];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const word first = __byte_perm(value[i], value[i + 1], plane ? 0x51 : 0x40), second = __byte_perm(value[i + 2], value[i + 3], plane ? 0x51 : 0x40);
        pairs[i / 4] = __byte_perm(first, second, 0x5410);
      }
      char* const place = scratch + plane * 256 + lane / 4 * 8;
      if (F::CODE_BITS == 1) {   // a lane's codes are those of pair lane % 4 of four lanes' columns
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) *(unsigned short*)(place + pair * 64 + lane % 4 * 2) = (unsigned short)(pairs[pair / 2] >> (16 * (pair % 2)));
      } else {
        *(uint2*)(place + lane % 4 * 64) = make_uint2(pairs[0], pairs[1]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] += 128;   // the upper byte, to which the lower one's sign is carried
    }
    __syncwarp();
    expand((const uint4*)(scratch + lane / 8 % 2 * 256 + lane % 4 * 64), lane / 4 % 2, lane / 16);
#pragma unroll
    for (int i = 0; i < 2 * B::SETS; ++i) weights[i / 2][i % 2] = kind ? B::weight(i / 2, 1, i % 2) : B::weight(i / 2, 0, i % 2);
    return most / 32512.0f;
  }

  // b, from pairs of bytes.
  __device__ __forceinline__ void expand(const uint4* pairs, int row, int kind) {
    word each[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 four = pairs[i];
      each[4 * i] = four.x, each[4 * i + 1] = four.y, each[4 * i + 2] = four.z, each[4 * i + 3] = four.w;
    }
    // Where the bytes of a word's pair go, by kind and the pair's place: those of a row half.
    constexpr word PLACES = F::CODE_BITS == 1 ? 0x4410 : 0x4140, OTHERS = F::CODE_BITS == 1 ? 0x1044 : 0x1404, NEXT = F::CODE_BITS == 1 ? 0x0022 : 0x0202;
    const word lower = row ? OTHERS : PLACES, upper = lower + (row ? NEXT << (F::CODE_BITS == 1 ? 8 : 4) : NEXT);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int block = i / 8, m = i / 2 % 4, e = i % 2;
      const word pair = F::CODE_BITS == 1 ? each[4 * block + 2 * e + m / 2] : each[4 * block + m];
      b[i] = __byte_perm(pair, 0, kind != e ? 0x4444 : (F::CODE_BITS == 1 ? m % 2 : e) ? upper : lower);
    }
  }
};

// acc = two units times the activations: of each row tile, row halves 0 and 1.
template <class F>
__device__ __forceinline__ void dot_bytes(float (&acc)[4], const ByteActivations<F>& x, const word* const (&codes)[2], const word* const (&scales)[2], const word* const (&zeros)[2]) {
  using B = Bytes<F::CODE_BITS>;
  constexpr int BLOCKS = F::GROUP / 64;
  Quarter<F> quarters[2];
#pragma unroll
  for (int group = 0; group < F::GROUPS; ++group) {
    int c[B::SETS][4];
#pragma unroll
    for (int i = 0; i < 4 * B::SETS; ++i) c[i / 4][i % 4] = i / 4 == B::LAST ? __float_as_int(x.start) : 0;
#pragma unroll
    for (int block = group * BLOCKS; block < (group + 1) * BLOCKS; ++block)
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        word a[4];
        byte_codes<F::CODE_BITS>(a[0], a[2], quarters[0].of(codes[0], block, m == 0), m);
        byte_codes<F::CODE_BITS>(a[1], a[3], quarters[1].of(codes[1], block, m == 0), m);
        mma_bytes(c[B::set(m)], a, x.b[8 * block + 2 * m], x.b[8 * block + 2 * m + 1]);
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int tile = i / 2, row = i % 2;
      int all = c[B::LAST][i];
#pragma unroll
      for (int set = 0; set < B::LAST; ++set) all += x.weights[set][row] * c[set][i];
      const float zero = F::SYMMETRIC ? x.zeros[group] : fmaf(x.zeros[group], byte_value(zeros[tile][group / 2], group % 2 * 2 + row), x.start);
      const float2 scale = __half22float2(scale_of<F>(scales[tile], group));
      const float sum = __int_as_float(all) - zero;
      acc[i] = group == 0 ? (row ? scale.y : scale.x) * sum : fmaf(row ? scale.y : scale.x, sum, acc[i]);
    }
  }
}

// Adds up what four lanes have of two row tiles; each stores one sum. `tile` and, for `both`, the next are the warp's places.
__device__ __forceinline__ void store_quad(float* tile, int stride, const float (&acc)[4], float factor, int lane, bool both) {
  const bool second = lane & 2, odd = lane & 1;
  const float a = (second ? acc[2] : acc[0]) + __shfl_xor_sync(0xffffffffu, second ? acc[0] : acc[2], 2);
  const float b = (second ? acc[3] : acc[1]) + __shfl_xor_sync(0xffffffffu, second ? acc[1] : acc[3], 2);
  const float sum = (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
  if (both || !second) tile[(second ? stride : 0) + (odd ? 8 : 0) + lane / 4] = sum * factor;
}

}  // namespace moqc
#endif
