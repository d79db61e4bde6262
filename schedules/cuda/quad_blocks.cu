// Blocks of moqc's int8 decode kernels for 2 and more tokens, for NVIDIA GPUs, sm_80 and later.
//
// In stream.cu a warp keeps the activations of 256 columns in registers and streams row tiles past them, and a block's warps
// add up what they have. Here a block prepares the activations of an expert's tokens once, in shared memory, as the tensor core's
// operand B (quads.cu), and every warp takes *runs*: a pair of row tiles along the columns. The pair shares what is read of the
// activations; nothing waits for other warps until the block's end. An expert with more tokens than a block takes at a time has
// several *passes*. Blocks read the router's ids themselves: there are no lists to wait for.
#ifndef MOQC_QUAD_BLOCKS
#define MOQC_QUAD_BLOCKS

namespace moqc::quads {

// Geometry. A block takes PAIRS pairs of row tiles (of each projection) and UNITS units of columns, which SPLIT runs share;
// WARPS warps take the runs in turn, each with DEPTH units of both tiles on their way. TOKENS: of a pass, 4 or 8.
template <int WARPS_, int PAIRS_, int UNITS_, int SPLIT_, int DEPTH_, int TOKENS_> struct Plan {
  static constexpr int WARPS = WARPS_, PAIRS = PAIRS_, UNITS = UNITS_, SPLIT = SPLIT_, DEPTH = DEPTH_, TOKENS = TOKENS_;
  static constexpr int THREADS = 32 * WARPS, RUN = UNITS / SPLIT, RUNS = PAIRS * SPLIT;   // RUN: units of a run; RUNS: of a matrix
  static constexpr int QUADS = TOKENS / 4, RESULT = ROWS * 8;   // RESULT: floats of a row tile in shared memory
  static_assert(UNITS % SPLIT == 0 && (TOKENS == 4 || TOKENS == 8), "whole units");
};

// A pair's sums: of two row tiles, rows g and g + 8 (j / 2) of tokens lane % 4 and 4 + lane % 4 (j % 2).
using Sums = float[2][4];

// A warp's runs 0 to count - 1. `at(run, tile)` is the first unit of one of a run's tiles, `begin(run)` the number of that
// unit in the block; `ready()` is called once the first weights are on their way, makes the activations and returns the quads in
// use; `finish(run, sums, quads)` takes what a run gives.
template <class F, class P, class All, class At, class Begin, class Ready, class Finish>
__device__ __forceinline__ void take_runs(const Activations<P, All>& x, int count, int lane, At at, Begin begin, Ready ready, Finish finish) {
  Window<Formats<F>, P::DEPTH> window[2];
  Unit next[2];
  int loaded = 0, run = 0, unit = 0;
  const int total = count * P::RUN;
  const auto load = [&](int i) { load_pair<F, P>(window, next, loaded, i, at); };
#pragma unroll
  for (int i = 0; i < P::DEPTH; ++i)
    if (i < total) load(i);
  with_count<P::QUADS>(ready(), [&](auto quads) {
    Sums acc = {};
#pragma unroll 1
    for (int done = 0; done < total; done += P::DEPTH)
#pragma unroll
      for (int i = 0; i < P::DEPTH; ++i) {
        if (done + i >= total) break;
        dot_quads<F, quads.VALUE>(acc, window, i, x, begin(run) + unit, lane);
        if (loaded < total) load(i);
        if (++unit == P::RUN) {
          finish(run, acc, quads);
#pragma unroll
          for (int j = 0; j < 8; ++j) acc[j / 4][j % 4] = 0.0f;
          unit = 0, ++run;
        }
      }
  });
}

// What a block finds out from the router's ids of up to TOKENS tokens, TOP each, in shared memory: which expert is its own, and the
// *pairs* (token * TOP + choice) that name it. Numbers out of range are ignored.
template <int EXPERTS, int TOP, int TOKENS> struct Members {
  static constexpr int MOST = TOKENS * TOP, WORDS = (EXPERTS + 31) / 32, BYTES = (4 * WORDS + 4 + 2 * MOST + 15) / 16 * 16;
  char* memory;

  __device__ __forceinline__ word* named() const { return (word*)memory; }
  __device__ __forceinline__ int* count() const { return (int*)memory + WORDS; }
  __device__ __forceinline__ unsigned short* pairs() const { return (unsigned short*)(memory + 4 * WORDS + 4); }

  // The expert of slot `slot`: those named rise; -1 past the last. All THREADS threads call this. The order of pairs may change
  // from run to run; no result depends on it.
  template <int THREADS, class Id> __device__ __forceinline__ int find(const Id* ids, int tokens, int slot, int lane) const {
    constexpr int EACH = (MOST + THREADS - 1) / THREADS;
    int chosen[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int pair = i * THREADS + threadIdx.x;
      Id id = -1;
      if (pair < tokens * TOP) id = load_now(ids + pair);
      chosen[i] = id >= 0 && id < EXPERTS ? (int)id : -1;
    }
    for (int i = threadIdx.x; i <= WORDS; i += THREADS) named()[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (chosen[i] >= 0) atomicOr(named() + chosen[i] / 32, 1u << chosen[i] % 32);
    __syncthreads();
    int expert = -1, before = 0;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      const word all = named()[w];
      const word found = __ballot_sync(0xffffffffu, (all >> lane & 1) && before + __popc(all & ((1u << lane) - 1)) == slot);
      if (found != 0) expert = 32 * w + __ffs(found) - 1;
      before += __popc(all);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (chosen[i] >= 0 && chosen[i] == expert) pairs()[atomicAdd(count(), 1)] = (unsigned short)(i * THREADS + threadIdx.x);
    __syncthreads();
    return expert;
  }
};

// Makes a block's activations, a warp 256 columns of a token in turn: load(values, place, unit), one ahead, and write(values, place, unit).
// All threads call this.
template <class P, class Load, class Write> __device__ __forceinline__ void prepare_block(int places, int warp, Load load, Write write) {
  const int total = places * P::UNITS;
  float next[8];
  if (warp < total) load(next, warp / P::UNITS, warp % P::UNITS);
#pragma unroll 1
  for (int i = warp; i < total; i += P::WARPS) {
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = next[j];
    if (i + P::WARPS < total) load(next, (i + P::WARPS) / P::UNITS, (i + P::WARPS) % P::UNITS);
    write(values, i / P::UNITS, i % P::UNITS);
  }
  __syncthreads();
}

// Results of a run in shared memory, [tile][row][token].
template <class P, int QUADS> __device__ __forceinline__ void keep(float* result, const Sums& sums, int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j % 2 < QUADS) result[j / 4 * P::RESULT + place<8>(lane / 4 + j / 2 % 2 * 8, lane % 4 + j % 2 * 4)] = sums[j / 4][j % 4];
}

}  // namespace moqc::quads
#endif
