// What the grouped product (prefill.cu) does before it multiplies: copies of activations and weights into rings in shared
// memory, and weights from codes.
#ifndef MOQC_PREFILL_TILES
#define MOQC_PREFILL_TILES

namespace moqc {

constexpr int WEIGHT_COPIERS = 3;   // warps; of the same warp group, one copies activations

// ---------------------------------------------------------------------------------------------- decoding
// A lane's codes of 64 columns of a row tile as they are stored, or a trellis' values; of one bit, word i has the pairs of columns i and i + 4, row g
// in its lower bytes. And the scales (row g, row g + 8) of the two halves, and their zeros.
template <class All> struct Raw {
  word codes[All::CODE_BITS == 8 ? 8 : 4], scales[All::GROUPS == 8 ? 2 : 1], zeros[All::GROUPS == 8 ? 2 : 1];
};
template <class F, class All> __device__ __forceinline__ void load_raw(Raw<All>& raw, const char* tile, int quarter, int lane) {
  const char *scales = tile + All::BITS * 512, *zeros = scales + All::GROUPS * 32;
  if constexpr (F::TRELLIS) {
    word planes[F::BITS], fields[F::CODE_BITS];
#pragma unroll
    for (int i = 0; i < F::BITS; ++i) planes[i] = *(const word*)(tile + (F::BITS * quarter + i) / 4 * 512 + lane * 16 + (F::BITS * quarter + i) % 4 * 4);
    trellis_fields<F::BITS>(fields, planes);
#pragma unroll
    for (int i = 0; i < F::CODE_BITS; ++i) raw.codes[i] = fields[i];
  } else if constexpr (F::BITS == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 w = *(const uint4*)(tile + (2 * quarter + i) * 512 + lane * 16);
      raw.codes[4 * i] = w.x, raw.codes[4 * i + 1] = w.y, raw.codes[4 * i + 2] = w.z, raw.codes[4 * i + 3] = w.w;
    }
  } else if constexpr (F::BITS == 4) {
    const uint4 w = *(const uint4*)(tile + quarter * 512 + lane * 16);
    raw.codes[0] = w.x, raw.codes[1] = w.y, raw.codes[2] = w.z, raw.codes[3] = w.w;
  } else if constexpr (F::BITS == 3) {
#pragma unroll
    for (int i = 0; i < 3; ++i) raw.codes[i] = *(const word*)(tile + (3 * quarter + i) / 4 * 512 + lane * 16 + (3 * quarter + i) % 4 * 4);
  } else if constexpr (F::BITS == 2) {
    const uint2 w = *(const uint2*)(tile + quarter / 2 * 512 + lane * 16 + quarter % 2 * 8);
    raw.codes[0] = w.x, raw.codes[1] = w.y;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.codes[i] = __byte_perm(*(const word*)(tile + (lane / 4 * 4 + i) * 16 + quarter * 4) >> (2 * (lane % 4)), 0, 0x3120);
  }
  if (64 * quarter % F::GROUP != 0) return;   // those of the quarter before
#pragma unroll
  for (int half = 0; half < (F::GROUP == 32 ? 2 : 1); ++half) {
    const int at = (lane / 4 * F::GROUPS + (64 * quarter + 32 * half) / F::GROUP) * 2;
    raw.scales[half] = F::BYTES ? *(const unsigned short*)(scales + at) : *(const word*)(scales + 2 * at);
    if (!F::SYMMETRIC) raw.zeros[half] = *(const unsigned short*)(zeros + at);
  }
}

// Weights are made 2^SMALLER too small, so that what a code is multiplied by fits fp16; scales are below 1 (quant/layouts.py).
constexpr int SMALLER = 8;
// Bit positions that codes have within an fp16: how many, and which one register `i` of step `step` has.
template <int BITS> struct Positions {
  static constexpr int COUNT = BITS == 8 ? 1 : BITS == 3 ? 3 : BITS == 1 ? 2 : 8 / BITS;
  __device__ static constexpr int number(int step, int i) { return BITS == 1 ? step / 2 : position<BITS>(2 * step + i / 2) / BITS; }
};
// What a group multiplies codes by, for each of their positions, and adds: rows g and g + 8.
struct Affine { __half2 scale[2][4], offset[2]; };
template <class F, class All> __device__ __forceinline__ Affine affine(const Raw<All>& raw, int half) {
  constexpr float SMALL = 1.0f / (1 << SMALLER);
  const __half2 scale = scale_of<F>(&raw.scales[half], 0), up = __float2half2_rn(1 << (24 - SMALLER) / 2);
  Affine result;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const __half2 mine = row == 0 ? __low2half2(scale) : __high2half2(scale);
    result.scale[row][0] = __hmul2(__hmul2(mine, up), up);
#pragma unroll
    for (int i = 1; i < Positions<F::CODE_BITS>::COUNT; ++i) result.scale[row][i] = __hmul2(result.scale[row][i - 1], __float2half2_rn(1.0f / (1 << F::CODE_BITS)));
    if constexpr (F::SYMMETRIC) {
      result.offset[row] = __hmul2(mine, __float2half2_rn(-F::ZERO * SMALL));
    } else {
      const word zero = raw.zeros[half] >> (8 * row) & 255;
      result.offset[row] = __float2half2_rn(__low2float(mine) * (-F::ZERO_STEP * SMALL * (float)zero));
    }
  }
  return result;
}

// Where codes of operand A are: register `i` of step `step` of 4 wants these bits of this word.
template <int BITS> __device__ __forceinline__ word masked_by(int step, int i) {
  if (BITS == 1) return 0x00010001u << (step / 2);
  if (BITS == 3) return step == 3 ? 0x01c001c0u : 0x00070007u << (i / 2 * 3);
  return ((1u << BITS) - 1) * 0x00010001u << (BITS == 8 ? 0 : BITS * ((2 * step + i / 2) % (8 / BITS)));
}
template <int BITS> __device__ __forceinline__ word word_of(const word* codes, int step, int i) {
  if constexpr (BITS == 3) {
    if (step < 3) return codes[step] >> (i % 2 * 9);
    return i < 3 ? codes[i] : (codes[0] >> 9 & 0x00400040u) | (codes[1] >> 8 & 0x00800080u) | (codes[2] >> 7 & 0x01000100u);
  } else {
    return codes[BITS == 1 ? (2 * step + i / 2) % 4 : (2 * step + i / 2) * BITS / 8] >> (i % 2 * 8);
  }
}

// Operand A of 16 columns. A code masked in place is a small number of fp16, below its normal ones: code * 2^(position - 24).
template <class F, class All> __device__ __forceinline__ void weights_of(word (&a)[4], const Raw<All>& raw, const Affine& by, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {   // row i % 2 of pair i / 2
    const word code = word_of<F::CODE_BITS>(raw.codes, step, i) & masked_by<F::CODE_BITS>(step, i);
    const __half2 weight = __hfma2(*(const __half2*)&code, by.scale[i % 2][Positions<F::CODE_BITS>::number(step, i)], by.offset[i % 2]);
    a[i] = *(const word*)&weight;
  }
}

// ---------------------------------------------------------------------------------------------- copies
// Shared memory of a block: the ring of activations, 64 columns a stage; that of weights, a unit of all row tiles a
// stage, each with scales and zeros; results on their way; barriers; what is known of the tile's tokens.
template <int SLOTS_, int X_STAGES_, int W_STAGES_, int GROUPS_, class All_> struct Rings {
  using All = All_;
  static constexpr bool BYTES = false;   // see prefill_bytes.cu
  static constexpr int SLOTS = SLOTS_;   // of a tile of tokens, at most
  static constexpr int GROUPS = GROUPS_, MULTIPLIERS = 4 * GROUPS;   // warp groups that multiply, and their warps
  static constexpr int EACH = SLOTS > 16 || GROUPS == 4 ? 1 : 2;   // blocks of 64 rows of a warp group: 128 registers of results a thread
  static constexpr int ROW_TILES = MULTIPLIERS * EACH, TOKENS = SLOTS * 8;   // of a tile
  static constexpr int X_STAGES = X_STAGES_, W_STAGES = W_STAGES_, X_BYTES = SLOTS_ * ATOM;
  static constexpr int SCALES = All::GROUPS * 32, ZEROS = All::HAS_ZEROS ? All::GROUPS * 16 : 0;   // of a row tile
  static constexpr int TILE = All::BITS * 512 + SCALES + ZEROS, W_BYTES = ROW_TILES * TILE, OUT_BYTES = SLOTS > 16 ? 16 * ATOM : X_BYTES;   // OUT: of a warp group
  static constexpr int W_AT = X_STAGES * X_BYTES, OUT_AT = W_AT + W_STAGES * W_BYTES, BARRIERS_AT = OUT_AT + GROUPS * OUT_BYTES, FACTS_AT = BARRIERS_AT + 256;   // 8 bytes a token, for each warp group
  static constexpr int AHEAD = 3;   // stages by which the first warp group starts ahead of the second
  static_assert(X_STAGES % 4 == 0, "whole units of columns");
};

template <int VALUE> struct Number { static constexpr int value = VALUE; };

// A matrix of one expert: where its tiles are, and its format.
struct Matrix { const char *codes, *scales, *zeros; int id; };
template <class... Fs> __device__ __forceinline__ Matrix matrix_of(Formats<Fs...>, const void* const* tensors, int2 place, long long units) {
  Matrix result = {nullptr, nullptr, nullptr, 0};
  int number = 0;
  (((sizeof...(Fs) == 1 || place.x == number)
        ? (result = {(const char*)tensors[3 * number] + place.y * units * (Fs::BITS * 512), (const char*)tensors[3 * number + 1] + place.y * units * (Fs::GROUPS * 16 * Fs::SCALE),
                     (const char*)tensors[3 * number + 2] + place.y * units * (Fs::GROUPS * 16), Fs::ID}, 0)
        : 0, ++number), ...);
  return result;
}

#if __CUDA_ARCH_FEAT_SM90_ALL
// The copying warp group's share of one tile: its first warp fetches the activations, 64 columns at a time, the others
// UNITS units of weights, of the matrix and the row tile that `where` gives for each of the block's.
template <class R>
__device__ __forceinline__ void copy_x(word shared, const char* images, long long block_stride, int slots, int units, int& count) {
  const word barriers = shared + R::BARRIERS_AT;
#pragma unroll 1
  for (int block = 0; block < 4 * units; ++block, ++count) {
    const int stage = count % R::X_STAGES;
    const word full = barriers + 8 * stage, empty = full + 8 * R::X_STAGES;
    barrier_wait(empty, (count / R::X_STAGES & 1) ^ 1);
    barrier_expect(full, slots * ATOM);
    bulk_copy(shared + stage * R::X_BYTES, images + block * block_stride, slots * ATOM, full);
  }
}
template <class R, int UNITS, class Where> __device__ __forceinline__ void copy_weights(word shared, Where where, int begin, int end, int& count, int warp, int lane) {
  const word barriers = shared + R::BARRIERS_AT;
  const int number = warp + WEIGHT_COPIERS * lane;   // of the row tiles, a lane each
  int row_tile = 0, bytes = 0;
  Matrix matrix = {nullptr, nullptr, nullptr, 0};
  if (number < R::ROW_TILES) {
    matrix = where(number, row_tile);
    with_format(typename R::All{}, matrix.id, [&](auto format) {
      using F = decltype(format);
      bytes = F::BITS * 512 + F::GROUPS * (16 * F::SCALE + (F::SYMMETRIC ? 0 : 16));
    });
  }
#pragma unroll
  for (int other = 4; other > 0; other /= 2) bytes += __shfl_xor_sync(0xffffffffu, bytes, other);   // of lanes 0 to 7
#pragma unroll 1
  for (int unit = begin; unit < end; ++unit, ++count) {
    const int stage = count % R::W_STAGES;
    const word full = barriers + 8 * (2 * R::X_STAGES + stage), empty = full + 8 * R::W_STAGES;
    barrier_wait(empty, (count / R::W_STAGES & 1) ^ 1);
    if (lane == 0) barrier_expect(full, bytes);
    __syncwarp();
    if (number < R::ROW_TILES) with_format(typename R::All{}, matrix.id, [&](auto format) {
      using F = decltype(format);
      const long long at = (long long)row_tile * UNITS + unit;
      const word to = shared + R::W_AT + stage * R::W_BYTES + number * R::TILE, scales = to + R::All::BITS * 512;
      bulk_copy(to, matrix.codes + at * (F::BITS * 512), F::BITS * 512, full);
      bulk_copy(scales, matrix.scales + at * (F::GROUPS * 16 * F::SCALE), F::GROUPS * 16 * F::SCALE, full);
      if (!F::SYMMETRIC) bulk_copy(scales + R::SCALES, matrix.zeros + at * (F::GROUPS * 16), F::GROUPS * 16, full);
    });
  }
}

// Where a warp is in a ring of STAGES.
template <int STAGES> struct RingPlace {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void step(int stages) {
    stage += stages;
    const bool around = stage == STAGES;
    stage = around ? 0 : stage, phase ^= around;
  }
};

// Lanes g and g ^ 1 of 8 (rows) swap, so that each has both rows of one of two tokens.
__device__ __forceinline__ float2 both_rows(float token0, float token1, int lane) {
  const bool odd = lane & 4;
  const float other = __shfl_xor_sync(0xffffffffu, odd ? token0 : token1, 4);
  return odd ? make_float2(other, token1) : make_float2(token0, other);
}
#endif

}  // namespace moqc
#endif
