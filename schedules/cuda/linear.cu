// Products with one packed matrix [N, K] (layout "mma16x256"): 8 tokens at a time as the experts' decode kernels do it,
// for many on tiles of tokens with the weights turned into fp16 in registers.
#ifndef MOQC_LINEAR
#define MOQC_LINEAR

namespace moqc {

// One of the matrices that are multiplied with the same x in one launch; TILES and STAGES are its plan for few tokens.
template <int N_, class F_, int TILES_, int STAGES_, bool BIAS_, bool RESIDUAL_> struct Member {
  static constexpr int N = N_, TILES = TILES_, STAGES = STAGES_, ROW_TILES = (N + ROWS - 1) / ROWS;
  static constexpr bool BIAS = BIAS_, RESIDUAL = RESIDUAL_;
  using F = F_;
};

// y[token][N] = W x (+ bias) (+ residual), of the tokens from `first` on. `block`: of row tiles of N / TILES. A block holds whole rows:
// its warps take the units of columns warp, warp + WARPS, ... of K.
template <int N, int K, class F, class P, bool BIAS, bool RESIDUAL>
__device__ __forceinline__ void linear_few(void* memory, const float* x, int tokens, const void* codes, const void* scales,
                                           const void* zeros, const float* bias, const float* residual, float* y, int block, int first) {
  constexpr int UNITS = (K + COLUMNS - 1) / COLUMNS, PASSES = (UNITS + P::WARPS - 1) / P::WARPS, TILE = P::WARPS * ROWS * P::TOKENS;
  static_assert((N + ROWS - 1) / ROWS % P::TILES == 0 && P::ITEMS == 1 && P::REGISTERS, "whole groups of row tiles");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = block * P::TILES, token = P::TOKENS == 1 ? 0 : lane / 4;
  const void* const tensors[] = {codes, scales, zeros};
  float* const partials = (float*)memory;
  start_next_kernel();
#pragma unroll 1
  for (int pass = 0; pass < PASSES; ++pass) {
    const int column = pass * P::WARPS + warp;
    const bool there = UNITS % P::WARPS == 0 || column < UNITS;   // else: weights of another unit times zeros
    const Unit unit = Unit::at<F>(tensors, (long long)tile * UNITS + (there ? column : UNITS - 1), lane);
    const auto wait = [&] { if (pass == 0) wait_for_previous_kernel(); };
    const auto get_x = [&](word* values) {
      return load_x<K>(values, x + (long long)(first + token) * K, column * COLUMNS, there && first + token < tokens, lane);
    };
    const auto finish = [&](int) {
      __syncthreads();
      for (int i = threadIdx.x; i < P::TILES * ROWS * P::TOKENS; i += P::THREADS) {
        const int t = i / (ROWS * P::TOKENS), row = i % ROWS, column = i / ROWS % P::TOKENS, out = (tile + t) * ROWS + row;
        if (first + column >= tokens || (N % ROWS != 0 && out >= N)) continue;
        const long long place = (long long)(first + column) * N + out;
        float sum = sum_partials<P::WARPS, P::TOKENS>(partials + t * TILE, row, column);
        if (pass > 0) sum += y[place];
        else {
          if (BIAS) sum += bias[out];
          if (RESIDUAL) sum += residual[place];
        }
        y[place] = sum;
      }
      if (pass + 1 < PASSES) __syncthreads();   // before the partial sums are overwritten
    };
    stream_registers<P, F, UNITS, 1, 1>(partials + warp * (ROWS * P::TOKENS), unit, unit, lane, wait, get_x, finish);
  }
}

// fp16 copies of x [T][K], rows padded with zeros to whole units: what `linear_many` copies to shared memory. A row of
// which fp16 cannot hold the largest is divided by a power of two, kept in `factors`. A block a token.
template <int K> __device__ __forceinline__ void to_half(const float* x, void* halves, void* factors) {
  constexpr int PADDED = (K + COLUMNS - 1) / COLUMNS * COLUMNS;
  __shared__ float found[32];
  start_next_kernel();
  wait_for_previous_kernel();
  const float* row = x + (long long)blockIdx.x * K;
  float most = 0.0f;
  for (int k = threadIdx.x; k < K; k += blockDim.x) most = fmaxf(most, fabsf(row[k]));
#pragma unroll
  for (int i = 16; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = most;
  __syncthreads();
  for (int i = 0; i < blockDim.x / 32; ++i) most = fmaxf(most, found[i]);
  const int shift = max(0, (int)(__float_as_uint(most) >> 23 & 255) - 127 - 12);
  const float by = __uint_as_float((127 - shift) << 23);
  for (int k = threadIdx.x; k < PADDED; k += blockDim.x)
    ((__half*)halves)[(long long)blockIdx.x * PADDED + k] = __float2half(k < K ? row[k] * by : 0.0f);
  if (threadIdx.x == 0) ((float*)factors)[blockIdx.x] = __uint_as_float((127 + shift) << 23);
}

// Masked codes, of rows g and g + 8 by turns, `at` bits up, become fp16 weights: (code - zero) * scale. 1024 + code << at is an fp16
// with the code in its fraction.
__device__ __forceinline__ word weight_of(word code, int at, __half2 scale, __half2 offset) {
  const word magic = code | 0x64006400u, half_bits = (15 - at) << 10, power = half_bits | half_bits << 16;
  __half2 value = __hsub2(*(const __half2*)&magic, __float2half2_rn(1024.0f));
  if (at > 0) value = __hmul2(value, *(const __half2*)&power);
  value = __hfma2(value, scale, offset);
  return *(const word*)&value;
}
// Those of step s (0..7) of a half unit, or of its first quarter.
template <int BITS>
__device__ __forceinline__ void weights(word (&a)[4], const word* w, int s, const __half2 (&scale)[2], const __half2 (&offset)[2]) {
  fragment<BITS>(a, w, s);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = weight_of(a[i], position<BITS>(2 * s + i / 2), scale[i % 2], offset[i % 2]);
}

// acc += one unit of a matrix times a staged unit of activations. x: the lane's first 16 bytes of the first 8 tokens, rows
// STAGED_PITCH apart (which keeps them off each other's banks).
constexpr int STAGED_PITCH = COLUMNS + 8;
template <class F, int COLUMN_TILES>
__device__ __forceinline__ void multiply_staged(float (&acc)[COLUMN_TILES][4], const word* codes, const word* scales, const word* zeros, const __half* x, int lane) {
  word words[4];   // of one bit
  Quarter<F> quarter;
#pragma unroll
  for (int pair = 0; pair < 8; ++pair) {   // two steps: 32 columns
    const int group = 32 * pair / F::GROUP;
    const __half2 both = scale_of<F>(scales, group);
    const __half2 scale[2] = {__low2half2(both), __high2half2(both)};
    __half2 offset[2];
    float zero[2] = {F::ZERO, F::ZERO};
    if (!F::SYMMETRIC) {
      zero[0] = F::ZERO_STEP * byte_value(zeros[group / 2], group % 2 * 2);
      zero[1] = F::ZERO_STEP * byte_value(zeros[group / 2], group % 2 * 2 + 1);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) offset[i] = __float2half2_rn(-zero[i] * __low2float(scale[i]));
    if constexpr (F::CODE_BITS == 1) {   // the codes that a lane multiplies are in the four lanes of its row
      if (pair % 2 == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const word w = __shfl_sync(0xffffffffu, codes[pair / 2], (lane & 28) + i) >> (2 * (lane % 4));
          words[i] = __byte_perm(w, 0, 0x3120);
        }
      }
    }
    word a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = pair % 2 * 2 + i;
      if constexpr (F::CODE_BITS == 1) {
#pragma unroll
        for (int k = 0; k < 4; ++k) a[i][k] = weight_of(word_of<1>(words, step, k) & masked_by<1>(step, k), step / 2, scale[k % 2], offset[k % 2]);
      } else {
        weights<F::CODE_BITS>(a[i], quarter.of(codes, pair / 2, pair % 2 == 0 && i == 0), step, scale, offset);
      }
    }
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
      const uint4 b = *(const uint4*)(x + n * 8 * STAGED_PITCH + pair * 32);
      mma(acc[n], a[0], b.x, b.y);
      mma(acc[n], a[1], b.z, b.w);
    }
  }
}

// y[T][N] for many tokens. A block takes WARPS row tiles and 8 * COLUMN_TILES tokens; a unit of their activations
// is in shared memory, the next one on its way. `block`: blocks of tokens within blocks of rows.
template <int N, int K, class F, int WARPS, int COLUMN_TILES, bool BIAS, bool RESIDUAL>
__device__ __forceinline__ void linear_many(void* memory, const void* halves, const void* factors, int tokens, const void* codes,
                                            const void* scales, const void* zeros, const float* bias, const float* residual, float* y, int block) {
  constexpr int UNITS = (K + COLUMNS - 1) / COLUMNS, ROW_TILES = (N + ROWS - 1) / ROWS, TOKENS = 8 * COLUMN_TILES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, across = (tokens + TOKENS - 1) / TOKENS;
  const int first = block % across * TOKENS, tile = block / across * WARPS + warp;
  const bool there = tile < ROW_TILES;
  __half* const staged = (__half*)memory;
  const void* const tensors[] = {codes, scales, zeros};
  Unit unit = Unit::at<F>(tensors, (long long)(there ? tile : ROW_TILES - 1) * UNITS, lane);
  Window<Formats<F>, 2> window;
  start_next_kernel();
  window.load(0, unit);
  wait_for_previous_kernel();
  const auto stage = [&](int number) {
    if (number < UNITS) {
      for (int i = threadIdx.x; i < TOKENS * (COLUMNS / 8); i += 32 * WARPS) {
        const int row = i / (COLUMNS / 8), k = i % (COLUMNS / 8) * 8;
        const __half* from = (const __half*)halves + (long long)min(first + row, tokens - 1) * (UNITS * COLUMNS) + number * COLUMNS + k;
        copy16((word)__cvta_generic_to_shared(staged + (number % 2 * TOKENS + row) * STAGED_PITCH + k), from);
      }
    }
    copy_commit();
  };
  float acc[COLUMN_TILES][4] = {};
  stage(0);
  const auto take = [&](int number, int slot) {   // slot: of the window, constant
    stage(number + 1);
    if (number + 1 < UNITS) {
      unit.step(1);
      window.load(1 - slot, unit);
    }
    copy_wait<1>();
    __syncthreads();
    const __half* x = staged + (number % 2 * TOKENS + lane / 4) * STAGED_PITCH + lane % 4 * 8;
    multiply_staged<F, COLUMN_TILES>(acc, window.codes[slot], window.scales[slot], window.zeros[slot], x, lane);
    __syncthreads();   // before the next unit but one takes its place
  };
#pragma unroll 1
  for (int number = 0; number < UNITS; number += 2) {
    take(number, 0);
    if (number + 1 < UNITS) take(number + 1, 1);
  }
  copy_wait<0>();
  if (!there) return;
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + n * 8 + lane % 4 * 2 + i % 2, out = tile * ROWS + lane / 4 + i / 2 * 8;
      if (token >= tokens || (N % ROWS != 0 && out >= N)) continue;
      const long long place = (long long)token * N + out;
      float sum = acc[n][i] * ((const float*)factors)[token];
      if (BIAS) sum += bias[out];
      if (RESIDUAL) sum += residual[place];
      y[place] = sum;
    }
}

// The block's share of several matrices, one after the other: for each member codes, scales, zeros, bias, residual, y.
template <int K, int WARPS, int TOKENS, class First, class... Rest, class... Others>
__device__ __forceinline__ void linears_few_at(void* memory, int block, int first, const float* x, int tokens, const void* codes, const void* scales, const void* zeros,
                                            const float* bias, const float* residual, float* y, Others... others) {
  constexpr int BLOCKS = First::ROW_TILES / First::TILES;
  using P = Plan<WARPS, First::TILES, First::STAGES, true, TOKENS, 1>;
  if (block < BLOCKS)
    linear_few<First::N, K, typename First::F, P, First::BIAS, First::RESIDUAL>(memory, x, tokens, codes, scales, zeros, bias, residual, y, block, first);
  else if constexpr (sizeof...(Rest) > 0)
    linears_few_at<K, WARPS, TOKENS, Rest...>(memory, block - BLOCKS, first, x, tokens, others...);
}
template <int K, int WARPS, int COLUMN_TILES, class First, class... Rest, class... Others>
__device__ __forceinline__ void linears_many_at(void* memory, int block, const void* halves, const void* factors, int tokens, const void* codes,
                                             const void* scales, const void* zeros, const float* bias, const float* residual, float* y, Others... others) {
  const int blocks = (First::ROW_TILES + WARPS - 1) / WARPS * ((tokens + 8 * COLUMN_TILES - 1) / (8 * COLUMN_TILES));
  if (block < blocks)
    linear_many<First::N, K, typename First::F, WARPS, COLUMN_TILES, First::BIAS, First::RESIDUAL>(memory, halves, factors, tokens, codes, scales, zeros, bias, residual, y, block);
  else if constexpr (sizeof...(Rest) > 0)
    linears_many_at<K, WARPS, COLUMN_TILES, Rest...>(memory, block - blocks, halves, factors, tokens, others...);
}
// Blocks of TOKENS tokens that read the same weights are neighbours: only the first reads them from memory.
template <int K, int WARPS, int TOKENS, class... Members, class... Others>
__device__ __forceinline__ void linears_few(void* memory, const float* x, int tokens, Others... others) {
  const int across = max((tokens + TOKENS - 1) / TOKENS, 1), block = blockIdx.x / across;
  linears_few_at<K, WARPS, TOKENS, Members...>(memory, block, (blockIdx.x - block * across) * TOKENS, x, tokens, others...);
}
template <int K, int WARPS, int COLUMN_TILES, class... Members, class... Others>
__device__ __forceinline__ void linears_many(void* memory, Others... others) {
  linears_many_at<K, WARPS, COLUMN_TILES, Members...>(memory, (int)blockIdx.x, others...);
}

}  // namespace moqc
#endif
