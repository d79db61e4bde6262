// Values of trellis formats (moqc/quant/trellis.py) from the planes that layout mma16x256 stores, for NVIDIA GPUs.
//
// A plane is one bit of each of a lane's 32 weights of 64 columns. The bits u of rows n - 1 and n - 2 are those of the lanes 4
// and 8 before: two shuffles and, where the circle of 16 rows closes, a permutation of the row halves, which are bytes. A
// value's bits are functions of the code's bits, so one logic instruction does each for all 32 weights, and a transposition
// of planes makes fields of them, where an integer format of that width has its codes. From there on it is one.
#ifndef MOQC_TRELLIS
#define MOQC_TRELLIS

namespace moqc {

using word = unsigned int;

// TRELLIS_VALUES of moqc/quant/formats.py. Of `bits` that are stored of a weight, a code has one more and a value's field 2^bits.
__host__ __device__ constexpr int trellis_value(int bits, int code) {
  constexpr int values[][16] = {{0, 1, 2, 3}, {0, 3, 5, 7, 8, 10, 12, 15}, {0, 9, 14, 18, 21, 25, 27, 30, 33, 36, 38, 42, 45, 49, 54, 63}};
  return values[bits - 1][code];
}
// Bit c: bit `bit` of the value of code c, of 16 (of which there may be fewer).
__host__ __device__ constexpr int trellis_table(int bits, int bit) {
  int table = 0;
  for (int code = 0; code < 16; ++code) table |= (trellis_value(bits, code % (2 << bits)) >> bit & 1) << code;
  return table;
}

template <int TABLE> __device__ __forceinline__ word logic(word a, word b, word c) {   // bit 4 a + 2 b + c of TABLE
  if constexpr (TABLE == 0xf0) {
    return a;
  } else if constexpr (TABLE == 0xcc) {
    return b;
  } else if constexpr (TABLE == 0xaa) {
    return c;
  } else if constexpr (TABLE == 0x00 || TABLE == 0xff) {
    return TABLE ? ~0u : 0;
  } else {
    word result;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return result;
  }
}

// Planes of the values, of those of the codes: high >> 1, high & 1, u[n] ^ u[n - 2], u[n - 1].
template <int BITS, int BIT = 0> __device__ __forceinline__ void value_planes(word (&planes)[1 << BITS], word highest, word high, word middle, word low) {
  constexpr int TABLE = trellis_table(BITS, BIT), UPPER = TABLE >> 8, LOWER = TABLE & 255;
  if constexpr (UPPER == LOWER) planes[BIT] = logic<LOWER>(high, middle, low);
  else if constexpr (UPPER == 0xff && LOWER == 0) planes[BIT] = highest;
  else planes[BIT] = logic<0xca>(highest, logic<UPPER>(high, middle, low), logic<LOWER>(high, middle, low));
  if constexpr (BIT + 1 < 1 << BITS) value_planes<BITS, BIT + 1>(planes, highest, high, middle, low);
}

// fields: the values of 64 columns, from the lane's BITS words of planes. All lanes of a warp call this.
template <int BITS> __device__ __forceinline__ void trellis_fields(word (&fields)[1 << BITS], const word* planes) {
  const int lane = threadIdx.x % 32;
  const word u = planes[0], swapped = 0x2301, straight = 0x3210;
  const word one = __byte_perm(__shfl_sync(0xffffffffu, u, lane + 28), 0, lane < 4 ? swapped : straight);
  const word two = __byte_perm(__shfl_sync(0xffffffffu, u, lane + 24), 0, lane < 8 ? swapped : straight);
  value_planes<BITS>(fields, BITS == 3 ? planes[2] : 0, BITS >= 2 ? planes[1] : 0, u ^ two, one);
#pragma unroll
  for (int stage = 0; stage < BITS; ++stage) {   // pairs of fields to fields of twice their width
    const int width = 1 << stage;
    const word lower = stage == 0 ? 0x55555555u : stage == 1 ? 0x33333333u : 0x0f0f0f0fu;
#pragma unroll
    for (int i = 0; i < 1 << BITS; ++i) {
      if (i & width) continue;
      const word low = fields[i], high = fields[i + width];
      if (BITS == 3 && stage < 2 && i + width >= 6) {   // values have 6 bits
        fields[i] = low & lower, fields[i + width] = (low >> width) & lower;
      } else {
        fields[i] = logic<0xca>(lower, low, high << width);
        fields[i + width] = logic<0xca>(lower, low >> width, high);
      }
    }
  }
}

// A unit's codes, 64 columns at a time: F::CODE_BITS words.
template <class F> struct Quarter {
  word values[F::TRELLIS ? F::CODE_BITS : 1];
  // Those of columns 64 * number ..; `first`: the first time.
  __device__ __forceinline__ const word* of(const word* unit, int number, bool first) {
    if constexpr (F::TRELLIS) {
      if (first) trellis_fields<F::BITS>(values, unit + number * F::BITS);
      return values;
    }
    return unit + number * F::BITS;
  }
};

}  // namespace moqc
#endif
