// Products of 2 and more tokens by int8, four tokens (a *quad*) at a time, for NVIDIA GPUs, sm_80 and later.
//
// A word of codes, masked in place, is four bytes of operand A: one mask makes four codes, where fp16 makes two. The layout
// puts rows g and g + 8 into each word; a byte permutation of two words parts them, before masks are applied. An activation
// is an integer of 16 bits, whose bytes (*planes*) are two columns of operand B: columns 2 t and 2 t + 1 are token t's, so the
// accumulators of lane l are both planes of token l % 4, for rows g and g + 8. Every 256 columns of a token have a scale.
//
// Codes stay where they are in their bytes, times 2^position. Products of the lower positions come first; their sums are
// multiplied once, and the other products added (*steps*: 1 with 8 bits, else 2). Where a step has several positions, the
// activations that meet lower ones are larger to match (*gain*, up to 8: those columns have 13 of 16 bits). Accumulators of
// the second step start from the bits of a float so large that what is added to its bits is added to its value, minus the
// zero point's part: sums become floats without being converted.
#ifndef MOQC_QUADS
#define MOQC_QUADS

namespace moqc::quads {

template <class F> constexpr bool BY_QUADS = F::GROUP == 128 || (F::GROUP == 64 && F::BITS % 2 == 0);   // what two words make is of one group

template <int N> struct Count { static constexpr int VALUE = N; };

// body(Count<n>{}) for a number from 1 to MOST.
template <int MOST, class Body> __device__ __forceinline__ void with_count(int number, Body body) {
  if constexpr (MOST > 1)
    if (number < MOST) return with_count<MOST - 1>(number, body);
  body(Count<MOST>{});
}

// How a group's products follow one another; product m (0..3) of 128 columns.
template <class F> struct Steps {
  static constexpr int BITS = F::BITS, PRODUCTS = F::GROUP / 32;      // of a group
  static constexpr int FIRST = BITS == 8 ? 0 : BITS == 3 ? 3 : PRODUCTS / 2;   // products of the first step; BITS 8 has only the second
  static constexpr int GAIN = BITS == 2 ? 4 : BITS == 4 || BITS == 8 ? 1 : 8;   // the largest
  static constexpr int UNIT = BITS == 1 ? 128 : BITS == 2 ? 64 : BITS == 3 ? 32 : BITS == 4 ? 16 : 1;   // of sums: what a code of gain 1 counts
  __host__ __device__ static constexpr int block(int m) { return F::GROUP == 128 ? m % 2 : m / 2; }      // of 64 columns; 2 and 4 bits
  __host__ __device__ static constexpr int step(int m) { return F::GROUP == 128 ? m / 2 : m % 2; }
  __host__ __device__ static constexpr int product(int block, int step) { return F::GROUP == 128 ? 2 * step + block : 2 * block + step; }
  // Where columns 2 j and 2 j + 1 of the eight that lane 4 v + q has of 128 go: the product, the half of its bytes, and the pair in it; `gain`: how
  // much larger they are than those of the highest position.
  struct Place { int product, half, pair, gain; };
  __device__ static __forceinline__ Place place(int v, int q, int j) {
    if constexpr (BITS == 1) return {q, v % 2, v / 2, 8 >> (2 * q + v % 2) % 4};
    else if constexpr (BITS == 2) return {product(v / 2, j / 2), j % 2, v % 2, j % 2 ? 1 : 4};
    else if constexpr (BITS == 3) return {v % 2 * 2 + j / 2, j % 2, v / 2, j % 2 == 0 && v % 2 * 2 + j / 2 < 3 ? 8 : 1};
    else if constexpr (BITS == 4) return {product(v / 2, j % 2), v % 2, j / 2, 1};
    else return {v, j / 2, j % 2, 1};
  }
  // What the first step's sums are multiplied by, in rows g and g + 8.
  __host__ __device__ static constexpr int factor(int row) { return BITS == 3 ? (row ? 2 : 4) : 16; }
};

__device__ __forceinline__ word bytes_of(word a, word b, int row) { return __byte_perm(a, b, row ? 0x7531 : 0x6420); }

// Operand A of product m of 128 columns, whose 2 BITS words w has.
template <class F> __device__ __forceinline__ void codes_of(word (&a)[4], const word* w, int m) {
  using S = Steps<F>;
  constexpr int BITS = F::BITS;
  if constexpr (BITS == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = bytes_of(w[4 * m + i / 2 * 2], w[4 * m + i / 2 * 2 + 1], i % 2);
  } else if constexpr (BITS == 4 || BITS == 2) {
    const int block = S::block(m), shift = 4 * S::step(m);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const word* const pair = BITS == 4 ? w + 4 * block + i / 2 * 2 : w + 2 * block;
      const word mask = BITS == 4 ? 0x0f0f0f0fu : i / 2 ? 0x0c0c0c0cu : 0x03030303u;
      a[i] = bytes_of(pair[0], pair[1], i % 2) & (mask << shift);
    }
  } else if constexpr (BITS == 1) {   // rows are halves of its words
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __byte_perm(w[0], w[1], i % 2 ? 0x7632 : 0x5410) & (0x01010101u << (2 * m + i / 2));
  } else if (m < 3) {
    const word low = bytes_of(w[m], w[3 + m], 0), high = bytes_of(w[m], w[3 + m], 1);
    a[0] = low & 0x07070707u, a[1] = high & 0x0e0e0e0eu, a[2] = low & 0x38383838u, a[3] = high & 0x70707070u;
  } else {   // the codes across bytes, and those of single bits, brought to bit 5
    word low[3], high[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) low[i] = bytes_of(w[i], w[3 + i], 0), high[i] = bytes_of(w[i], w[3 + i], 1);
    const auto across = [&](int i) { return ((low[i] >> 1) & 0x60606060u) | ((high[i] << 7) & 0x80808080u); };
    a[0] = across(0), a[1] = across(1), a[2] = across(2);
    a[3] = ((high[0] >> 2) & 0x20202020u) | ((high[1] >> 1) & 0x40404040u) | (high[2] & 0x80808080u);
  }
}

// The activations of a block in shared memory: of every unit and quad operand B, the accumulators' starts, and factors.
template <class P, class All> struct Activations {
  static constexpr int IMAGE = 2048, STARTS = All::GROUPS * 32, FLOATS = 16 * (1 + All::GROUPS), UNIT = IMAGE + STARTS + FLOATS;
  static constexpr int BYTES = P::UNITS * P::QUADS * UNIT;
  char* memory;

  __device__ __forceinline__ char* at(int unit, int quad) const { return memory + (quad * P::UNITS + unit) * UNIT; }
  // Four words of B: products 2 i and 2 i + 1 of the unit.
  __device__ __forceinline__ uint4 operand(int unit, int quad, int i, int lane) const { return ((const uint4*)at(unit, quad))[i * 32 + lane]; }
  __device__ __forceinline__ int2* start(int unit, int quad, int group, int token) const { return (int2*)(at(unit, quad) + IMAGE) + group * 4 + token; }
  // What sums are multiplied by, and from 1 on: a zero byte's part of a group.
  __device__ __forceinline__ float* factor(int unit, int quad, int number, int token) const { return (float*)(at(unit, quad) + IMAGE + STARTS) + number * 4 + token; }

  // A warp stores 256 columns of the token at a place of the block's: lane l has 8 l .. 8 l + 7.
  template <class F> __device__ __forceinline__ void write(const float (&x)[8], int unit, int place, int lane) const {
    using S = Steps<F>;
    const int quad = place / 4, token = place % 4;
    constexpr int BITS = F::BITS;
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i]));
    most = fmaxf(__uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(most))), 1e-30f);
    const float by = __fdividef(32512.0f / S::GAIN, most);   // 127 * 256: both bytes have signs
    const int half = lane / 16, v = lane / 4 % 4, q = lane % 4;
    int all = 0, upper = 0;   // sums of values, and of their upper bytes, in units of the largest gain
    char* const image = at(unit, quad) + 1024 * half + 128 * token;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto to = S::place(v, q, j);
      int value[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        value[h] = (int)(__float_as_uint(fmaf(x[2 * j + h], by * to.gain, 12582912.0f)) - 0x4b400000u);
        all += S::GAIN / to.gain * value[h], upper += S::GAIN / to.gain * ((value[h] + 128) >> 8);
      }
      char* const place = image + to.product / 2 * 512 + (BITS == 1 ? j : q) * 16 + to.product % 2 * 8 + to.half * 4 + to.pair * 2;
      *(unsigned short*)place = (unsigned short)__byte_perm(value[0], value[1], 0x0040);
      *(unsigned short*)(place + 64) = (unsigned short)__byte_perm(value[0] + 128, value[1] + 128, 0x0051);
    }
#pragma unroll
    for (int group = 0; group < F::GROUPS; ++group) {
      const bool mine = lane / (F::GROUP / 8) == group;
      const float whole = (float)__reduce_add_sync(0xffffffffu, mine ? all : 0), high = (float)__reduce_add_sync(0xffffffffu, mine ? upper : 0);
      constexpr float EACH = (F::SYMMETRIC ? F::ZERO : F::ZERO_STEP) * S::UNIT / S::GAIN;   // of a zero point, or of its byte
      if (lane == 0) {
        *start(unit, quad, group, token) = F::SYMMETRIC ? make_int2(0x4b400000 - __float2int_rn(EACH * (whole - 256.0f * high)), 0x4b400000 - __float2int_rn(EACH * high))
                                                        : make_int2(0x4b400000, 0x4b400000);
        *factor(unit, quad, 1 + group, token) = EACH * whole;
      }
    }
    if (lane == 0) *factor(unit, quad, 0, token) = most * (S::GAIN / (32512.0f * S::UNIT * SCALE));
  }
};

// acc += one unit of two row tiles times the activations of QUADS quads: acc[tile][2 * row half + quad], of token l % 4.
template <class F, int QUADS, class P, class All, class W>
__device__ __forceinline__ void dot_quads(float (&acc)[2][4], const W (&window)[2], int i, const Activations<P, All>& x, int unit, int lane) {
  using S = Steps<F>;
  static_assert(BY_QUADS<F>, "a group of whole products");
  float part[2][QUADS][2] = {};
#pragma unroll
  for (int group = 0; group < F::GROUPS; ++group) {
    int c[2][QUADS][4] = {};
    const auto begin_last_step = [&] {
#pragma unroll
      for (int quad = 0; quad < QUADS; ++quad) {
        const int2 start = *x.start(unit, quad, group, lane % 4);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
          for (int j = 0; j < 4; ++j) c[tile][quad][j] = c[tile][quad][j] * S::factor(j / 2) + (j % 2 ? start.y : start.x);
      }
    };
    uint4 b[QUADS];
#pragma unroll
    for (int n = 0; n < S::PRODUCTS; ++n) {
      const int m = group * S::PRODUCTS + n;   // of the unit
      if (n == S::FIRST) begin_last_step();
      if (m % 2 == 0)
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) b[quad] = x.operand(unit, quad, m / 2, lane);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        word a[4];
        codes_of<F>(a, window[tile].codes[i] + m / 4 * (2 * F::BITS), m % 4);
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) mma_bytes(c[tile][quad], a, m % 2 ? b[quad].z : b[quad].x, m % 2 ? b[quad].w : b[quad].y);
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float2 scales = __half22float2(scale_of<F>(window[tile].scales[i], group));
#pragma unroll
      for (int quad = 0; quad < QUADS; ++quad)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          // Both are 12582912 = 3 x 2^22 too large, and 257 / 256 of that is 12632064.
          float sum = fmaf(__int_as_float(c[tile][quad][2 * row + 1]) - 12632064.0f, 256.0f, __int_as_float(c[tile][quad][2 * row]));
          if (!F::SYMMETRIC) sum = fmaf(-byte_value(window[tile].zeros[i][group / 2], group % 2 * 2 + row), *x.factor(unit, quad, 1 + group, lane % 4), sum);
          part[tile][quad][row] = fmaf(row ? scales.y : scales.x, sum, part[tile][quad][row]);
        }
    }
  }
#pragma unroll
  for (int quad = 0; quad < QUADS; ++quad) {
    const float factor = *x.factor(unit, quad, 0, lane % 4);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& sum = acc[tile][2 * row + quad];
        sum = fmaf(part[tile][quad][row], factor, sum);
      }
  }
}

}  // namespace moqc::quads
#endif
