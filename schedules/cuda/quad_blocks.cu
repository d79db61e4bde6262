// Blocks of moqc's int8 decode kernels for 2 and more tokens, for NVIDIA GPUs, sm_80 and later.
//
// In stream.cu a warp keeps the activations of 256 columns in registers and streams row tiles past them, and a block's warps
// add up what they have. Here a block prepares the activations of an expert's tokens once, in shared memory, as the tensor core's
// operand B (quads.cu), and every warp takes *runs*: a pair of row tiles along the columns. The pair shares what is read of the
// activations; nothing waits for other warps until the block's end. An expert with more tokens than a block takes at a time has
// several slots (quad_shares.cu).
#ifndef MOQC_QUAD_BLOCKS
#define MOQC_QUAD_BLOCKS

namespace moqc::quads {

// Geometry. A block takes up to PAIRS pairs of row tiles (of each projection) at a time, twice as many of one quad, and UNITS units of columns, of which
// SPLIT runs take every SPLIT-th, so that the warps of a pair read next to each other; WARPS warps take the runs in turn, each with DEPTH units of both tiles on their way. TOKENS: of a slot, 4 or 8.
// BLOCKS on a multiprocessor are what registers have to leave room for.
template <int WARPS_, int PAIRS_, int UNITS_, int SPLIT_, int DEPTH_, int TOKENS_, int BLOCKS_> struct Plan {
  static constexpr int WARPS = WARPS_, PAIRS = PAIRS_, UNITS = UNITS_, SPLIT = SPLIT_, DEPTH = DEPTH_, TOKENS = TOKENS_;
  static constexpr int THREADS = 32 * WARPS, RUN = UNITS / SPLIT;   // RUN: units of a run
  static constexpr int QUADS = TOKENS / 4;
  static_assert(UNITS % (SPLIT * DEPTH) == 0 && (TOKENS == 4 || TOKENS == 8), "whole units");
};

// `unit` some units on, which may be another expert's: more than 2^31 bytes.
__device__ __forceinline__ Unit moved(Unit unit, int units) {
  unit.codes += (long long)units * (unit.bits * 512);
  unit.scales += (long long)units * (unit.groups * unit.scale * 16);
  if (!unit.symmetric) unit.zeros += (long long)units * (unit.groups * 16);
  return unit;
}

// A pair's sums: of two row tiles, rows g and g + 8 (j / 2) of tokens lane % 4 and 4 + lane % 4 (j % 2).
using Sums = float[2][4];

// A warp's runs 0 to count - 1. `at(run)` is the first unit of its first tile, `second(run)` how many units on the other tile's is,
// `begin(run)` the number of that unit in the block; `ready()` is called once the first weights are on their way, makes the
// activations and returns the quads in use; `finish(run, sums, quads)` takes what a run gives.
template <class F, class P, class All, class At, class Second, class Begin, class Ready, class Finish>
__device__ __forceinline__ void take_runs(const Activations<P, All>& x, int count, int lane, At at, Second second, Begin begin, Ready ready, Finish finish) {
  Window<Formats<F>, P::DEPTH> window[2];
  Unit next;
  int apart;
  const auto turn_to = [&](int run) { next = Unit::with_facts<F>(at(run)), apart = second(run); };
  const auto load = [&](int i) {
    Unit unit = next;
    unit.step(i * P::SPLIT);
    window[0].load(i, unit);
    unit.step(apart);
    window[1].load(i, unit);
  };
  if (count > 0) {
    turn_to(0);
#pragma unroll
    for (int i = 0; i < P::DEPTH; ++i) load(i);
  }
  with_count<P::QUADS>(ready(), [&](auto quads) {
#pragma unroll 1
    for (int run = 0; run < count; ++run) {
      Activations<P, All> here{x.at(begin(run), 0)};
      Sums acc = {};
#pragma unroll 1
      for (int unit = 0; unit < P::RUN; unit += P::DEPTH) {
        bool more = true;
        if (unit + P::DEPTH < P::RUN) next.step(P::DEPTH * P::SPLIT);
        else if (run + 1 < count) turn_to(run + 1);
        else more = false;
#pragma unroll
        for (int i = 0; i < P::DEPTH; ++i) {
          dot_quads<F, quads.VALUE>(acc, window, i, here, i * P::SPLIT, lane);
          if (more) load(i);
        }
        here.memory = here.at(P::DEPTH * P::SPLIT, 0);
      }
      finish(run, acc, quads);
    }
  });
}

// Makes a round's activations, a warp 256 columns of a token in turn: load(values, place, unit), one ahead, and write(values, place, unit).
// All threads call this.
template <class P, class Load, class Write> __device__ __forceinline__ void prepare_round(const Round& round, int warp, Load load, Write write) {
  const int total = round.places() * P::UNITS;
  float next[8];
  if (warp < total) load(next, round.place(warp / P::UNITS), warp % P::UNITS);
#pragma unroll 1
  for (int i = warp; i < total; i += P::WARPS) {
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = next[j];
    const int then = i + P::WARPS;
    if (then < total) load(next, round.place(then / P::UNITS), then % P::UNITS);
    write(values, round.place(i / P::UNITS), i % P::UNITS);
  }
  __syncthreads();
}

// Results of a run in shared memory, of each of two row tiles [row][token].
template <int QUADS> __host__ __device__ constexpr int result_floats() { return 2 * ROWS * 4 * QUADS; }
template <int QUADS> __device__ __forceinline__ int result_place(int tile, int row, int token) {
  return tile * (ROWS * 4 * QUADS) + (QUADS == 1 ? row * 4 + token : place<8>(row, token));
}
template <int QUADS> __device__ __forceinline__ void keep(float* result, const Sums& sums, int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j % 2 < QUADS) result[result_place<QUADS>(j / 4, lane / 4 + j / 2 % 2 * 8, lane % 4 + j % 2 * 4)] = sums[j / 4][j % 4];
}

}  // namespace moqc::quads
#endif
