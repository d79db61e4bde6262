// Device code of moqc's decode kernels whose warps own rows, for NVIDIA GPUs, sm_80 and later.
//
// In decode.cu a warp keeps the activations of 256 columns in registers and streams row tiles past them, and a block's warps
// add up what they have. Here a block prepares the activations of one slot (an expert and up to 8 of its tokens) once, in
// shared memory, as the tensor core's operand B, and every warp takes *runs*: a pair of row tiles along the columns. The
// pair shares what is read of the activations; nothing waits for other warps until the block's end; and with 32 registers
// less a thread, a multiprocessor holds more warps, which is what hides the latencies of decoding. Where experts have more
// tokens, a block takes a tile of several slots (prefill.cu lists them), and codes are decoded once for all of them.
#ifndef MOQC_ROWS
#define MOQC_ROWS

namespace moqc {

// Geometry. A block takes PAIRS pairs of row tiles (of each projection) and UNITS units of columns, which SPLIT runs share;
// WARPS warps take the runs in turn, each with DEPTH units of both tiles on their way. TOKENS is 8 for each slot of a tile;
// with several slots a warp keeps its results (SPLIT is 1), else they meet in shared memory.
template <int WARPS_, int PAIRS_, int UNITS_, int SPLIT_, int DEPTH_, int TOKENS_> struct RowsPlan {
  static constexpr int WARPS = WARPS_, PAIRS = PAIRS_, UNITS = UNITS_, SPLIT = SPLIT_, DEPTH = DEPTH_, TOKENS = TOKENS_;
  static constexpr int THREADS = 32 * WARPS, RUN = UNITS / SPLIT, RUNS = PAIRS * SPLIT;   // RUN: units of a run; RUNS: of a matrix
  static constexpr int SLOTS = TOKENS / 8;
  static constexpr int RESULT = SLOTS == 1 ? ROWS * TOKENS : 0;   // floats of a row tile in shared memory
  static_assert(UNITS % SPLIT == 0 && (SLOTS == 1 || SPLIT == 1), "whole units");
};

// Prepared activations of one format in shared memory: operand B of each unit, and the groups' sums (see `prepare`).
template <class P, class All> struct Prepared {
  static constexpr int UNIT = All::X * 128, SUMS = All::GROUPS * 32, COUNT = P::UNITS * P::SLOTS, BYTES = COUNT * (UNIT + SUMS);
  char* memory;

  // `unit` counts those of one slot after the other.
  __device__ __forceinline__ uint4* operand(int unit, int quad, int lane) const {
    return (uint4*)(memory + unit * UNIT) + quad * 32 + lane;
  }
  __device__ __forceinline__ float2* sum(int unit, int group, int lane) const {
    return (float2*)(memory + COUNT * UNIT + unit * SUMS) + group * 4 + lane % 4;
  }
  template <class F> __device__ __forceinline__ void write(word* x, int unit, int lane) const {   // x: raw, changed
    constexpr int QUADS = Formats<F>::X / 4;
    float sums[2 * F::GROUPS];
    prepare<F>(x, sums);
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) *operand(unit, quad, lane) = make_uint4(x[4 * quad], x[4 * quad + 1], x[4 * quad + 2], x[4 * quad + 3]);
    if (lane < 4)
#pragma unroll
      for (int group = 0; group < F::GROUPS; ++group) *sum(unit, group, lane) = make_float2(sums[2 * group], sums[2 * group + 1]);
  }
};

// A pair's sums: of two row tiles, the accumulators of each slot.
template <class P> using Sums = float[2][P::SLOTS][4];

// acc += one unit of two row tiles times the activations.
template <class F, class P, class All, class W>
__device__ __forceinline__ void dot_pair(Sums<P>& acc, const W (&window)[2], int i, const Prepared<P, All>& x, int unit, int lane) {
  constexpr int STEPS = F::GROUP / 16;
  Quarter<F> quarters[2];
#pragma unroll
  for (int group = 0; group < F::GROUPS; ++group) {
    Sums<P> c;
#pragma unroll
    for (int slot = 0; slot < P::SLOTS; ++slot) {
      const float2 sum = *x.sum(slot * P::UNITS + unit, group, lane);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        float(&d)[4] = c[tile][slot];
        d[0] = d[2] = sum.x, d[1] = d[3] = sum.y;
        if (!F::SYMMETRIC) {
          const word zeros = window[tile].zeros[i][group / 2];
          const float z0 = byte_value(zeros, group % 2 * 2), z8 = byte_value(zeros, group % 2 * 2 + 1);
          d[0] *= z0, d[1] *= z0, d[2] *= z8, d[3] *= z8;
        }
      }
    }
#pragma unroll
    for (int s = group * STEPS; s < (group + 1) * STEPS; s += F::CODE_BITS == 1 ? 1 : 2) {
      word operand[P::SLOTS][4];
#pragma unroll
      for (int slot = 0; slot < P::SLOTS; ++slot) {
        const uint4 b = *x.operand(slot * P::UNITS + unit, F::CODE_BITS == 1 ? s : s / 2, lane);
        operand[slot][0] = b.x, operand[slot][1] = b.y, operand[slot][2] = b.z, operand[slot][3] = b.w;
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const word* codes = quarters[tile].of(window[tile].codes[i], s / 4, s % 4 == 0);
        if constexpr (F::CODE_BITS == 1) {
#pragma unroll
          for (int slot = 0; slot < P::SLOTS; ++slot) step<1>(c[tile][slot], codes, operand[slot], s % 4);
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            word a[4];
            fragment<F::CODE_BITS>(a, codes, s % 4 + half);
#pragma unroll
            for (int slot = 0; slot < P::SLOTS; ++slot) mma(c[tile][slot], a, operand[slot][2 * half], operand[slot][2 * half + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float2 scale = __half22float2(scale_of<F>(window[tile].scales[i], group));
#pragma unroll
      for (int slot = 0; slot < P::SLOTS; ++slot)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[tile][slot][j] = fmaf(j < 2 ? scale.x : scale.y, c[tile][slot][j], acc[tile][slot][j]);
    }
  }
}

// A warp's runs 0 to count - 1. `at(run, tile)` is the first unit of one of a run's tiles, `begin(run)` the number of that
// unit in the block; `ready()` is called once the first weights are on their way, and makes the activations; `finish(run,
// sums)` takes what a run gives.
template <class F, class P, class All, class At, class Begin, class Ready, class Finish>
__device__ __forceinline__ void take_runs(const Prepared<P, All>& x, int count, int lane, At at, Begin begin, Ready ready, Finish finish) {
  Window<Formats<F>, P::DEPTH> window[2];
  Unit next[2];
  int loaded = 0, run = 0, unit = 0;
  const int total = count * P::RUN;
  const auto load = [&](int i) {
    if (loaded % P::RUN == 0) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) next[tile] = Unit::with_facts<F>(at(loaded / P::RUN, tile));
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) window[tile].load(i, next[tile]), next[tile].step(1);
    ++loaded;
  };
#pragma unroll
  for (int i = 0; i < P::DEPTH; ++i)
    if (i < total) load(i);
  ready();
  Sums<P> acc = {};
#pragma unroll 1
  for (int done = 0; done < total; done += P::DEPTH)
#pragma unroll
    for (int i = 0; i < P::DEPTH; ++i) {
      if (done + i >= total) break;
      dot_pair<F>(acc, window, i, x, begin(run) + unit, lane);
      if (loaded < total) load(i);
      if (++unit == P::RUN) {
        finish(run, acc);
#pragma unroll
        for (int j = 0; j < 8 * P::SLOTS; ++j) (&acc[0][0][0])[j] = 0.0f;
        unit = 0, ++run;
      }
    }
}

// Prepares a block's activations, a warp a unit of a slot in turn. raw(x, slot, unit) loads them and says whether any are too
// large; then shift(slot, unit) is the exponent that the lane's token needs there, and divided(x, slot, unit, shift) loads
// them once more. What a token is divided by, besides given(slot, column), is left in `factors`. write(x, number) stores them.
// All threads call this.
template <class P, class Raw, class Shift, class Divided, class Write, class Given>
__device__ __forceinline__ void prepare_block(float* factors, int warp, int lane, Raw raw, Shift shift, Divided divided, Write write, Given given) {
  word x[32];
  bool large = false;
  int* const most = (int*)factors;
  if (threadIdx.x < 8 * P::SLOTS) most[threadIdx.x] = 0;
#pragma unroll 1
  for (int i = warp; i < P::UNITS * P::SLOTS; i += P::WARPS) large |= raw(x, i / P::UNITS, i % P::UNITS), write(x, i);
  if (__syncthreads_or(large)) {
#pragma unroll 1
    for (int i = warp; i < P::UNITS * P::SLOTS; i += P::WARPS) atomicMax(most + i / P::UNITS * 8 + lane / 4, shift(i / P::UNITS, i % P::UNITS));
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < P::UNITS * P::SLOTS; i += P::WARPS) divided(x, i / P::UNITS, i % P::UNITS, most[i / P::UNITS * 8 + lane / 4]), write(x, i);
    __syncthreads();
  }
  if (threadIdx.x < 8 * P::SLOTS) factors[threadIdx.x] = power(most[threadIdx.x]) * given(threadIdx.x / 8, threadIdx.x % 8);
  __syncthreads();
}

// The slots of a block: all of one expert.
struct Place { int first, slots; long long expert; };

// Results of a run in shared memory, [tile][row][token].
template <class P> __device__ __forceinline__ void keep(float* result, const Sums<P>& sums, const float* factors, int lane) {
  const float2 factor = *(const float2*)(factors + lane % 4 * 2);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) store_partial<8>(result + tile * P::RESULT, sums[tile][0], factor, lane);
}

}  // namespace moqc
#endif
